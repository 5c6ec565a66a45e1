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
    },
    object="manyheads.mask.longca",
)
