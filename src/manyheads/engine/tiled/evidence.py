"""Tells the catalogue which tests hold the checks of FlashAttention-4."""

from __future__ import annotations

from manyheads.spec import evidence

evidence(
    "fa4",
    {
        1: "test_fa4::test_late_rescaling_equals_the_softmax_for_every_threshold",
        2: "test_fa4::test_random_scores_let_most_growth_pass",
        3: (
            "test_fa4::test_the_polynomial_is_near_the_power_and_exact_at_integers",
            "test_fa4::test_the_assembly_computes_the_same_polynomial_to_its_own_rounding",
        ),
        4: "test_fa4::test_gradients_equal_those_of_the_definition",
        5: "test_fa4::test_two_backward_runs_give_the_same_bits",
        6: "test_fa4::test_longest_first_is_no_slower_than_in_order",
        7: "test_fa4::test_rows_that_see_nothing_give_zero_and_minus_infinity",
    },
    object="manyheads.engine.tiled",
    unbuilt=("split keys with their combination", "paged keys", "the model of shared-memory cycles"),
)
