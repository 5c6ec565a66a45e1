"""Tells the catalogue which tests hold the checks of the long-context benchmark."""

from __future__ import annotations

from manyheads.spec import evidence

evidence(
    "longca-bench",
    {
        1: "test_longca::test_slices_and_composition_equal_the_predicate",
        2: "test_longca::test_the_same_at_an_odd_length_with_the_default_draws",
        3: "test_longca::test_one_document_is_the_whole_sequence",
        4: "test_longca::test_a_window_as_long_as_the_sequence_hides_nothing",
        5: "test_longca::test_lengths_sum_exactly_and_repeat",
        6: (
            "test_schemes::test_two_processes_agree_with_one_device_and_send_what_was_planned",
            "test_schemes::test_four_processes_agree_with_one_device_and_send_what_was_planned",
        ),
        7: "test_deal::test_zigzag_is_undone_exactly",
        8: "test_deal::test_zigzag_gives_every_rank_the_same_causal_area",
    },
    object="manyheads.mask.longca",
)
