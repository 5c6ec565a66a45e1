"""Plans of tiles agree with the masks drawn out, and schedules with what a clock would say."""

from __future__ import annotations

import heapq
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.bench.planning.simulate import PACKED, busiest, named, tiles, visits
from manyheads.cli import main
from manyheads.mask import Causal, Full, PerHead, TileLayout, Window, parse
from manyheads.mask.longca import longca

MASKS = ["full", "causal", "window(6)", "causal & (window(4) | sink(3))", "causal & document([11, 3, 27])", "~causal"]


@pytest.mark.parametrize("keys", [None, 53, 30])
@pytest.mark.parametrize("tile", [(8, 8), (5, 16), (64, 1)])
@pytest.mark.parametrize("text", MASKS)
def test_counts_are_those_of_the_matrix(text, tile, keys):
    n, nk = 41, 41 if keys is None else keys
    if "document" in text and keys is not None:
        pytest.skip("documents have one length")
    dense = parse(text).dense(n, nk)[0, 0].numpy()
    padded = np.zeros((-(-n // tile[0]) * tile[0], -(-nk // tile[1]) * tile[1]), dtype=bool)
    padded[:n, :nk] = dense
    inside = np.zeros_like(padded)
    inside[:n, :nk] = True
    grid = (padded.shape[0] // tile[0], tile[0], padded.shape[1] // tile[1], tile[1])
    seen, real = (a.reshape(grid).transpose(0, 2, 1, 3).sum((2, 3)) for a in (padded, inside))
    (found,) = tiles(text, n, keys, tile=[tile], heads=3, units=2)
    assert found.visited == 3 * (seen > 0).sum()
    assert found.partial == 3 * ((seen > 0) & (seen < real)).sum()
    assert found.pairs == 3 * dense.sum()
    assert found.row_tiles == (seen > 0).sum(1).max()
    assert found.rows == 3 * grid[0]
    assert found.ideal_speedup == pytest.approx(n * nk / dense.sum())
    assert found.tile_speedup == pytest.approx(seen.size / (seen > 0).sum())
    assert found.imbalance == pytest.approx((seen > 0).sum(1).max() / (seen > 0).sum(1).mean())


@pytest.mark.parametrize("text", MASKS)
def test_rows_know_which_keys_the_row_before_had(text):
    dense = parse(text).dense(41)[0, 0].numpy()
    rows = [set(np.flatnonzero(np.repeat(np.add.reduceat(dense[i : i + 8].any(0), range(0, 41, 4)) > 0, 4)[:41]))
            for i in range(0, 41, 8)]  # fmt: skip
    found = visits(parse(text).tiles(41, tile=(8, 4)))
    assert found.keys[0].tolist() == [len(row) for row in rows]
    before = [set(), *rows[:-1]]
    assert found.fresh[0].tolist() == [len(row - last) for row, last in zip(rows, before, strict=True)]
    assert found.distinct[0] == len(set.union(*rows))
    assert found.height.tolist() == [8, 8, 8, 8, 8, 1]


def test_heads_with_masks_of_their_own_are_counted_each():
    mask = PerHead([Causal(), Window(3), Causal()])
    found = visits(mask.tiles(50, tile=(8, 8), batch=2))
    each = [visits(m.tiles(50, tile=(8, 8))) for m in (Causal(), Window(3))]
    assert found.uses.tolist() == [4, 2]
    assert found.tiles.tolist() == [e.tiles[0].tolist() for e in each]
    assert found.fresh.tolist() == [e.fresh[0].tolist() for e in each]
    assert found.computed == 4 * each[0].computed + 2 * each[1].computed
    assert tiles(mask, 50, tile=[(8, 8)], batch=2)[0].visited == 2 * (2 * 28 + 19)


def test_a_selection_of_tiles_is_counted_like_a_mask():
    layout = Causal().tiles(40, tile=(8, 8))
    ids = -np.ones((1, 1, 5, 5), dtype=np.int64)
    for row in range(5):
        ids[0, 0, row, : row + 1] = range(row + 1)
    chosen = TileLayout.from_ids(torch.from_numpy(ids), nq=40, nk=40, tile=8)
    assert visits(chosen).tiles.tolist() == visits(layout).tiles.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 6))
def test_a_schedule_is_that_of_units_that_take_the_next_piece_when_idle(costs, units):
    clock = [(0, unit) for unit in range(units)]
    for cost in costs:
        free, unit = heapq.heappop(clock)
        heapq.heappush(clock, (free + cost, unit))
    assert busiest(costs, units) == max(free for free, _ in clock)
    longest = max(costs, default=0)
    least, most = max(longest, sum(costs) / units), longest + (sum(costs) - longest) / units
    assert all(least <= busiest(costs, units, longest_first=first) <= most for first in (False, True))


def test_causal_rows_are_shared_better_when_the_longest_go_first():
    (found,) = tiles("causal", 4096, tile=[(64, 64)], units=13)
    assert found.longest_first < found.in_order
    assert 0 < found.balance < found.balance_longest_first <= 1
    assert found.in_order >= found.visited / 13


def test_one_unit_does_everything_and_more_units_than_rows_wait_for_the_longest():
    (alone,), (crowd,) = (tiles("causal & window(40)", 500, tile=[(16, 16)], units=u) for u in (1, 1000))
    assert alone.in_order == alone.longest_first == alone.visited and alone.balance == 1
    assert crowd.in_order == crowd.row_tiles


def test_too_many_rows_are_counted_but_not_scheduled():
    (found,) = tiles(Full(), 4096, tile=[(1, 128)], heads=257, units=4)
    assert found.visited == 257 * 4096 * 32
    assert found.in_order is found.balance is None


@pytest.mark.parametrize("name", PACKED)
def test_documents_are_drawn_from_the_distribution_that_is_asked_for(name):
    for lengths in ("pile", "prolong64k"):
        expected = longca(name, 9000, seed=3, distribution=lengths).mask
        assert named(name, 9000, seed=3, lengths=lengths) == expected
    assert named(name, 9000, seed=3) == longca(name, 9000, seed=3).mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length: expected at least one token, got 0"),
        ({"keys": 0}, "keys: expected at least one token, got 0"),
        ({"units": 0}, "units: expected at least one core"),
        ({"mask": "casual"}, "unknown mask 'casual': did you mean 'causal'?"),
        ({"mask": "causal & windw(3)"}, "did you mean 'window'?"),
        ({"mask": "document([3, 4])"}, "document is for 7 keys"),
        ({"lengths": "pille"}, "unknown length distribution 'pille': did you mean 'pile'?"),
        ({"lengths": "pile"}, "'causal' draws no documents"),
        ({"mask": "full_documents", "lengths": "pile"}, "did you mean 'full_document'?"),
        ({"tile": [(0, 8)]}, "tile"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError) as caught:
        tiles(**{"mask": "causal", "length": 64, **arguments})
    assert message in str(caught.value)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_tile(capfd):
    asked = ["simulate", "tiles", "causal & window(512)", "--length", "4096", "--tile", "128x128", "--tile", "64x64"]
    assert main([*asked, "--units", "8"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert "ideal speed-up over dense 8.53" in out[1]
    assert out[3].split()[:6] == ["128x128", "150", "14.65%", "60", "6.83", "2"]
    assert out[4].startswith("64x64")


def test_the_command_takes_the_units_of_a_machine_and_writes_json(capfd):
    asked = ["simulate", "tiles", "causal_document", "--length", "4096", "--lengths", "pile", "--device", "h100"]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert {entry["units"] for entry in found} == {132}
    assert found[0]["pairs"] == int(longca("causal_document", 4096, distribution="pile").mask.dense(4096).sum())


def test_nothing_visible_is_no_number_in_json(capfd):
    assert main(["simulate", "tiles", "~full", "--length", "64", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["ideal_speedup"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("causal", "--length", "0"), "length: expected at least one token"),
        (("causal",), "--length"),
        (("causal", "--length", "64", "--tile", "128"), "tile: expected 2 positive numbers as 128x128, got '128'"),
        (("causal", "--length", "64", "--device", "H1000"), "unknown device 'H1000': did you mean 'H100'?"),
        (("casual", "--length", "64"), "did you mean 'causal'?"),
        (("causal", "--length", "64", "--units", "0"), "units: expected at least one"),
    ],
)
def test_bad_input_of_the_command_is_one_clear_error(capfd, arguments, message):
    assert main(["simulate", "tiles", *arguments]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err
