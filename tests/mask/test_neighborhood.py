"""Neighbourhoods: the numbered facts of the two papers, and the order of tokens that suits them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads.mask import Causal, Full, Neighborhood, from_natten, grid_permutation
from tests.mask import cases


def dense(mask):
    return mask.dense(int(np.prod(mask.grid)))[0, 0].numpy()


@given(cases.neighborhoods())
def test_every_row_without_causal_axes_has_the_whole_window(case):
    mask, _ = case
    mask = Neighborhood(mask.grid, mask.window, mask.stride, mask.dilation)
    assert (dense(mask).sum(1) == np.prod(mask.window)).all()


@pytest.mark.parametrize("grid", [(7,), (3, 5), (2, 4, 3)])
def test_a_window_as_large_as_the_grid_is_full(grid):
    assert (dense(Neighborhood(grid, grid)) == Full().dense(int(np.prod(grid)))[0, 0].numpy()).all()


def test_a_causal_window_as_large_as_the_axis_is_causal():
    assert (dense(Neighborhood(9, 9, causal=True)) == Causal().dense(9)[0, 0].numpy()).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "d"), [(12, 3), (12, 4), (11, 3)])
def test_dilation_is_neighborhood_attention_in_each_residue_class(length, d, causal):
    whole = dense(Neighborhood(length, 3, 2, d, causal))
    seen = np.zeros_like(whole)
    for g in range(d):
        members = np.arange(g, length, d)
        seen[np.ix_(members, members)] = dense(Neighborhood(len(members), 3, 2, 1, causal))
    assert (whole == seen).all()


@given(st.lists(st.tuples(st.integers(2, 4), st.integers(1, 3)), min_size=1, max_size=3))
def test_stride_as_large_as_the_window_is_attention_within_blocks(axes):
    window = tuple(w for w, _ in axes)
    grid = tuple(w * n for w, n in axes)
    block = np.ravel_multi_index(
        tuple(at // w for at, w in zip(np.indices(grid).reshape(len(grid), -1), window, strict=True)), grid
    )
    assert (dense(Neighborhood(grid, window, window)) == np.equal.outer(block, block)).all()


@given(cases.neighborhoods())
def test_queries_of_a_stride_group_share_their_keys(case):
    mask, _ = case
    rows = dense(Neighborhood(mask.grid, mask.window, mask.stride, mask.dilation))
    groups = {}
    for at, row in zip(np.indices(mask.grid).reshape(len(mask.grid), -1).T.tolist(), rows, strict=True):
        key = tuple((i % d, i // d // s) for i, d, s in zip(at, mask.dilation, mask.stride, strict=True))
        assert (groups.setdefault(key, row) == row).all()


@given(st.integers(2, 20), st.data())
def test_a_causal_row_never_sees_a_later_key(length, data):
    w = data.draw(st.integers(2, length))
    mask = Neighborhood(length, w, data.draw(st.integers(1, w)), data.draw(st.integers(1, length // w)), True)
    rows = dense(mask)
    assert not np.triu(rows, 1).any() and rows.diagonal().all()


def test_an_even_window_has_one_more_key_on_the_left():
    assert np.flatnonzero(dense(Neighborhood(9, 4))[4]).tolist() == [2, 3, 4, 5]


def test_the_kernel_size_counts_all_keys():
    assert (dense(from_natten((6, 7), (3, 5), stride=(1, 2))).sum(1) == 15).all()
    assert from_natten(9, 3, is_causal=True) == Neighborhood(9, 3, causal=True)


@given(cases.neighborhoods(), st.data())
def test_the_order_makes_whole_boxes_contiguous(case, data):
    mask, _ = case
    grid, step = mask.grid, mask.dilation
    tile = tuple(data.draw(st.integers(1, length)) for length in grid)
    order, inverse = grid_permutation(grid, tile, step)
    total, area = int(np.prod(grid)), int(np.prod(tile))
    assert (order[inverse] == np.arange(total)).all() and sorted(order.tolist()) == list(range(total))
    whole = 1
    for length, size, d in zip(grid, tile, step, strict=True):
        whole *= sum(len(range(g, length, d)) // size for g in range(d))
    at = np.stack(np.unravel_index(order, grid))
    for n in range(whole):
        box = at[:, n * area : (n + 1) * area]
        for axis, size, d in zip(box, tile, step, strict=True):
            assert sorted(set(axis.tolist())) == list(range(axis.min(), axis.min() + size * d, d))


def test_permuted_positions_give_the_permuted_mask():
    mask = Neighborhood((6, 8), (3, 5), (1, 2), causal=(True, False))
    order, _ = grid_permutation((6, 8), (2, 4))
    got = mask.dense(48, positions=(order, order))[0, 0].numpy()
    assert (got == dense(mask)[order][:, order]).all()


def test_tiles_of_the_published_perfect_case_are_never_partial():
    """Window 18x24x24, stride 16x8x8 on 30x48x80 at tiles (4,8,8) and (2,8,8): no tile needs a mask."""
    grid = (30, 48, 80)
    mask = Neighborhood(grid, (18, 24, 24), (16, 8, 8))

    def bounds(side, tile):
        """Coordinates of the boxes of a grid of tiles, edges cut short."""
        at = np.indices(grid).reshape(3, -1)
        count = [-(-length // t) for length, t in zip(grid, tile, strict=True)]
        box = np.ravel_multi_index([a // t for a, t in zip(at, tile, strict=True)], count)
        order = np.argsort(box, kind="stable")
        cut = np.searchsorted(box[order], np.arange(np.prod(count)))
        found = mask.coords(order, side, len(order))
        return {x: (np.minimum.reduceat(a, cut), np.maximum.reduceat(a, cut)) for x, a in found.items()}

    q = {x: (lo[:, None], hi[:, None]) for x, (lo, hi) in bounds("q", (4, 8, 8)).items()}
    may, must = mask.classify(q, bounds("k", (2, 8, 8)))
    assert (may == must).all()
    assert round(may.size / may.sum(), 2) == 11.11
