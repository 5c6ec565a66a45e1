"""The simulator of neighbourhoods: published figures, brute force, the search for a stride, the command."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads.bench.planning import neighborhood as planning
from manyheads.bench.planning.neighborhood import flat, search, simulate
from manyheads.cli import main
from manyheads.mask import Neighborhood
from manyheads.testing import seed_of_the_day

VIDEO = ((30, 48, 80), (18, 24, 24))
TILES = ((4, 8, 8), (2, 8, 8))


@pytest.mark.parametrize(
    ("stride", "dynamic", "speedup", "perfect"),
    [
        ((16, 8, 8), False, 11.11, True),
        ((16, 8, 8), True, 11.11, True),
        (1, False, 5.24, False),
        (1, True, 6.62, False),
    ],
)
def test_a_published_video_layout(stride, dynamic, speedup, perfect):
    found = simulate(Neighborhood(*VIDEO, stride), *TILES, dynamic=dynamic)
    assert round(found.tile_speedup, 2) == speedup and found.perfect is perfect
    assert round(found.flop_speedup, 2) == 11.11


@pytest.mark.parametrize(
    ("strides", "dynamic", "speedup"),
    [
        ((1, 2, 4, 8, 16, 32, 64, 128), False, 14.32),
        ((64,), True, 14.32),
        ((128,), True, 15.11),
        ((256,), False, 16.0),
        ((256,), True, 16.0),
    ],
)
def test_a_published_line(strides, dynamic, speedup):
    for stride in strides:
        found = simulate(Neighborhood(32768, 2048, stride), 256, 128, dynamic=dynamic)
        assert round(found.tile_speedup, 2) == speedup
        assert found.perfect is (stride == 256)


def test_the_published_strides_are_found():
    line = search(32768, 2048, 256, 128)
    assert line.mask.stride == (256,) and line.tile_speedup == 16.0
    video = search(*VIDEO, *TILES)
    assert video.mask.stride == (16, 8, 8) and video.tile_speedup == video.flop_speedup


def layouts(count, seed):
    """Layouts with what they are tiled by, drawn."""
    draw = random.Random(seed)
    for _ in range(count):
        axes = draw.randint(1, 3)
        grid = tuple(draw.randint(4, (40, 14, 8)[axes - 1]) for _ in range(axes))
        window = tuple(draw.randint(2, n) for n in grid)
        dilation = tuple(draw.randint(1, n // w) for n, w in zip(grid, window, strict=True))
        stride = tuple(draw.randint(1, w) for w in window)
        causal = tuple(draw.random() < 0.3 for _ in grid)
        tiles = [tuple(draw.randint(1, 5) for _ in grid) for _ in range(2)]
        yield Neighborhood(grid, window, stride, dilation, causal), *tiles


def tile_of(mask, tile):
    """For each token, its residue classes and the tile of its places, as one tuple."""
    at = np.indices(mask.grid).reshape(len(mask.grid), -1).T
    step, size = np.array(mask.dilation), np.array(tile)
    return [(*(cell % step), *(cell // step // size)) for cell in at]


def brute(mask, q_tile, kv_tile, dynamic):
    """Visited pairs of tiles, the most of a query tile, and whether nothing in them is hidden, from the matrix."""
    tokens = math.prod(mask.grid)
    dense = mask.dense(tokens)[0, 0].numpy()
    q_tiles, kv_tiles = (np.array(list(map(hash, tile_of(mask, tile)))) for tile in (q_tile, kv_tile))
    places = np.indices(mask.grid).reshape(len(mask.grid), -1) // np.array(mask.dilation)[:, None]
    visited, most, whole = 0, 0, True
    for tile in np.unique(q_tiles):
        rows = dense[q_tiles == tile]
        seen = rows.any(0)
        if dynamic:
            spans = [np.ptp(at[seen]) + 1 for at in places]
            tiles = math.prod(-(-int(span) // size) for span, size in zip(spans, kv_tile, strict=True))
            whole &= all(span % size == 0 for span, size in zip(spans, kv_tile, strict=True)) and rows[:, seen].all()
        else:
            touched = np.unique(kv_tiles[seen])
            tiles = len(touched)
            whole &= bool(rows[:, np.isin(kv_tiles, touched)].all())
        visited, most = visited + tiles, max(most, tiles)
    return visited, most, bool(whole)


@pytest.mark.parametrize("dynamic", [False, True])
def test_ten_drawn_layouts_agree_with_brute_force(dynamic):
    for mask, q_tile, kv_tile in layouts(10, seed_of_the_day()):
        found = simulate(mask, q_tile, kv_tile, dynamic=dynamic)
        wanted = brute(mask, q_tile, kv_tile, dynamic)
        assert (found.visited, found.most, found.perfect) == wanted, (mask, q_tile, kv_tile)
        tokens = math.prod(mask.grid)
        assert found.flop_speedup == pytest.approx(tokens**2 / int(mask.dense(tokens).sum()))


@given(st.lists(st.tuples(st.integers(2, 30), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3))
def test_a_window_of_the_whole_grid_saves_nothing(axes):
    grid, q_tile, kv_tile = map(tuple, zip(*axes, strict=True))
    found = simulate(Neighborhood(grid, grid), q_tile, kv_tile)
    assert found.tile_speedup == found.flop_speedup == 1.0 and found.perfect


@given(st.data())
def test_tiles_never_save_more_than_operations(data):
    axes = data.draw(st.integers(1, 3))
    tiles = [tuple(data.draw(st.integers(1, 4)) for _ in range(axes)) for _ in range(2)]
    grid = tuple(math.lcm(q, k) * data.draw(st.integers(2, 5)) for q, k in zip(*tiles, strict=True))
    window = tuple(data.draw(st.integers(2, n)) for n in grid)
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    for dynamic in (False, True):
        found = simulate(Neighborhood(grid, window, stride), *tiles, dynamic=dynamic)
        assert found.tile_speedup <= found.flop_speedup + 1e-9
        if found.perfect:
            assert found.tile_speedup == pytest.approx(found.flop_speedup)


@pytest.mark.parametrize("goal", [None, 0.6, 0.9])
def test_the_search_finds_the_smallest_stride(goal):
    grid, window, tiles = (24, 16), (9, 8), ((2, 4), (3, 2))
    good = []
    for stride in itertools.product(*(range(1, w + 1) for w in window)):
        found = simulate(Neighborhood(grid, window, stride), *tiles)
        if found.perfect if goal is None else found.tile_speedup >= goal * found.flop_speedup:
            good.append((math.prod(stride), stride))
    found = search(grid, window, *tiles, goal=goal)
    assert (found is None) == (not good)
    assert found is None or (math.prod(found.mask.stride), found.mask.stride) == min(good)


def test_no_stride_suits_a_window_that_is_no_multiple_of_the_tile():
    assert search(64, 10, 8, 8) is None
    assert search(64, 10, 8, 8, causal=True) is None


def test_flattened_tiles_are_counted_from_the_matrix():
    mask = Neighborhood((12, 10), (5, 4))
    dense = mask.dense(120)[0, 0].numpy().reshape(15, 8, 30, 4).transpose(0, 2, 1, 3)
    found = flat(mask, 8, 4)
    assert found.visited == dense.any((2, 3)).sum() and found.most == dense.any((2, 3)).sum(1).max()
    assert found.all == 450 and not found.perfect


def test_a_prediction_is_made_from_other_sizes(monkeypatch):
    ran = []

    def fake(calls, rounds):
        ran.extend(calls)
        small = {mask.text: mask for mask in planning._SMALL}
        ms = {name: planning.cheapest_box(small[name], 4)[0] * 2e-6 if name in small else 4.0 for name in calls}
        return {name: type("Timing", (), {"median_ms": ms[name]}) for name in calls}

    monkeypatch.setattr(planning, "interleave", fake)
    mask = Neighborhood((96, 96), 13)
    found = planning.predict(mask)
    assert mask.text not in ran
    assert found.near_ms == pytest.approx(2e-6 * planning.cheapest_box(mask, 4)[0])
    assert found.dense_ms == pytest.approx(4.0 * (9216 / 2304) ** 2)
    assert found.speedup == pytest.approx(found.dense_ms / found.near_ms)


def test_a_prediction_runs_here():
    found = planning.predict(Neighborhood((64, 64), 9), heads=1, width=8, rounds=1)
    assert found.speedup > 0 and len(found.box) == 2


def test_the_command_prints_the_table_and_json(capsys):
    args = ["simulate", "neighborhood", "30x48x80", "--window", "18x24x24", "--stride", "1", "--stride", "16x8x8"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "11.11x fewer operations" in text and "5.24" in text and "nothing" in text and "searched" in text
    assert main([*args, "--flat", "128x64", "--goal", "0.5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["tiles"] for row in rows} == {"flattened", "fixed", "dynamic", "searched"}
    assert rows[-1]["tile_speedup"] >= 0.5 * rows[-1]["flop_speedup"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--window", "1"], "window: expected at least 2"),
        (["--window", "3x3x3"], "window: expected one number or 2 of them"),
        (["--window", "3", "--q-tile", "0"], "q_tile: expected 1 to 3 numbers from 1"),
        (["--window", "3", "--goal", "2"], "goal: expected a share"),
        (["--window", "3", "--stride", "4"], "stride: expected at most the window"),
    ],
)
def test_the_command_names_what_is_wrong(more, message, capsys):
    assert main(["simulate", "neighborhood", "16x16", *more]) != 0
    assert message in capsys.readouterr().err
