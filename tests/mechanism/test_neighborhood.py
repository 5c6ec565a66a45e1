"""Neighbourhood attention: its limits, its strides and dilations, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import attention
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.sparse import neighborhood_attention
from manyheads.mechanism.sparse.neighborhood import reference
from manyheads.testing import sample_qkv


def inputs(shape, seed=0):
    """Queries, keys and values on a grid, in float64."""
    return sample_qkv(2, 2, math.prod(shape), width=8, dtype=torch.float64, seed=seed)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((23,), {"window": 6}),
        ((23,), {"window": 5, "stride": 3, "dilation": 2}),
        ((23,), {"window": 4, "stride": 4, "causal": True, "dilation": 3}),
        ((9, 7), {"window": (4, 3), "stride": (2, 1), "dilation": (2, 1)}),
        ((9, 7), {"window": (5, 7), "causal": (True, False)}),
        ((4, 5, 6), {"window": (2, 3, 4), "stride": (1, 3, 2), "causal": (True, False, False)}),
    ],
)
def test_equals_the_definition_axis_by_axis(shape, options):
    q, k, v = inputs(shape)
    got = neighborhood_attention(q, k, v, shape=shape, **options, return_lse=True)
    torch.testing.assert_close(got, reference(q, k, v, shape=shape, **options, return_lse=True))


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_over_the_whole_line_is_plain_attention(causal):
    q, k, v = inputs((19,))
    got = neighborhood_attention(q, k, v, shape=(19,), window=19, causal=causal)
    torch.testing.assert_close(got, attention(q, k, v, mask="causal" if causal else None))


def test_a_stride_of_the_window_is_attention_in_blocks():
    q, k, v = inputs((24,))
    got = neighborhood_attention(q, k, v, shape=(24,), window=6, stride=6)
    blocks = [attention(*(t[:, :, i : i + 6] for t in (q, k, v))) for i in range(0, 24, 6)]
    torch.testing.assert_close(got, torch.cat(blocks, dim=2))


def test_dilation_is_one_neighbourhood_per_residue():
    q, k, v = inputs((21,))
    got = neighborhood_attention(q, k, v, shape=(21,), window=4, dilation=3)
    for residue in range(3):
        part = [t[:, :, residue::3] for t in (q, k, v)]
        torch.testing.assert_close(got[:, :, residue::3], neighborhood_attention(*part, shape=(7,), window=4))


@pytest.mark.parametrize("stride", [1, 2, (3, 5)])
def test_every_query_sees_a_full_window_corners_included(stride):
    q, k, v = inputs((8, 11))
    options = {"shape": (8, 11), "window": (3, 5), "stride": stride, "scale": 0.0}
    lse = neighborhood_attention(q, k, v, **options, return_lse=True).lse
    torch.testing.assert_close(lse.exp(), torch.full_like(lse, 15.0))


def test_queries_and_keys_of_different_lengths_are_refused():
    q, k, v = sample_qkv(1, 2, 12, keys=20)
    with pytest.raises(UnsupportedError, match="neighborhood does not support noncausal_cross"):
        neighborhood_attention(q, k, v, shape=(12,), window=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (3, 5), "window": 3}, "shape: expected a grid of N=12 tokens"),
        ({"shape": (3, 4), "window": 5}, "window"),
        ({"shape": (12,), "window": 1}, "window"),
        ({"shape": (12,), "window": 3, "stride": 4}, "stride"),
        ({"shape": (12,), "window": 5, "dilation": 3}, "dilation|window"),
    ],
)
def test_bad_grids_are_named(options, message):
    q, k, v = sample_qkv(1, 2, 12)
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(q, k, v, **options)
