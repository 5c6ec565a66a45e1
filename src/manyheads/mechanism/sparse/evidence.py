"""Tells the catalogue which checks of neighbourhood attention the mask already holds."""

from __future__ import annotations

from manyheads.spec import evidence

evidence(
    "neighborhood-attention-fna",
    {
        1: "test_neighborhood::test_a_window_as_large_as_the_grid_is_full",
        2: "test_neighborhood::test_every_row_without_causal_axes_has_the_whole_window",
        3: "test_neighborhood::test_dilation_is_neighborhood_attention_in_each_residue_class",
        4: "test_neighborhood::test_a_causal_window_as_large_as_the_axis_is_causal",
    },
    object="manyheads.mask.Neighborhood",
)
evidence(
    "generalized-neighborhood-attention",
    {
        1: "test_neighborhood::test_stride_as_large_as_the_window_is_attention_within_blocks",
        3: "test_neighborhood::test_queries_of_a_stride_group_share_their_keys",
        4: "test_neighborhood::test_every_row_without_causal_axes_has_the_whole_window",
        7: "test_neighborhood::test_a_causal_row_never_sees_a_later_key",
    },
    object="manyheads.mask.Neighborhood",
)
