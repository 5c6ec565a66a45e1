"""Tells the catalogue which tests hold the checks of the two systems behind neighbourhood attention."""

from __future__ import annotations

from manyheads.spec import evidence

evidence(
    "neighborhood-attention-fna",
    {
        1: (
            "mask/test_neighborhood::test_a_window_as_large_as_the_grid_is_full",
            "test_neighborhood_parts::test_a_window_of_the_whole_grid_is_plain_attention",
        ),
        2: (
            "mask/test_neighborhood::test_every_row_without_causal_axes_has_the_whole_window",
            "mechanism/test_neighborhood::test_every_query_sees_a_full_window_corners_included",
        ),
        3: (
            "mask/test_neighborhood::test_dilation_is_neighborhood_attention_in_each_residue_class",
            "mechanism/test_neighborhood::test_dilation_is_one_neighbourhood_per_residue",
        ),
        4: (
            "mask/test_neighborhood::test_a_causal_window_as_large_as_the_axis_is_causal",
            "mechanism/test_neighborhood::test_a_window_over_the_whole_line_is_plain_attention",
        ),
        5: (
            "test_neighborhood_parts::test_gradients_are_those_of_masked_dense_attention",
            "test_boxes::test_values_and_gradients_are_those_of_the_definition",
        ),
        6: "test_neighborhood_parts::test_extra_keys_are_keys_concatenated",
    },
    object="manyheads.mechanism.sparse.neighborhood_attention",
)
evidence(
    "generalized-neighborhood-attention",
    {
        1: (
            "mask/test_neighborhood::test_stride_as_large_as_the_window_is_attention_within_blocks",
            "mechanism/test_neighborhood::test_a_stride_of_the_window_is_attention_in_blocks",
        ),
        2: "test_neighborhood_parts::test_stride_one_is_the_plain_neighbourhood",
        3: "mask/test_neighborhood::test_queries_of_a_stride_group_share_their_keys",
        4: "mask/test_neighborhood::test_every_row_without_causal_axes_has_the_whole_window",
        5: "test_plan_neighborhood::test_a_window_of_the_whole_grid_saves_nothing",
        6: (
            "test_plan_neighborhood::test_tiles_never_save_more_than_operations",
            "test_plan_neighborhood::test_a_published_video_layout",
            "test_plan_neighborhood::test_a_published_line",
            "test_plan_neighborhood::test_ten_drawn_layouts_agree_with_brute_force",
        ),
        7: "mask/test_neighborhood::test_a_causal_row_never_sees_a_later_key",
    },
    object="manyheads.bench.planning.neighborhood.simulate",
)
