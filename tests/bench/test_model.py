"""The cost model counts what the tiles hold, and its identities hold whatever the numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.bench.limits import Limits
from manyheads.bench.planning.model import Efficiency, Work, count, predict, unit_times
from manyheads.bench.store import read
from manyheads.bench.workload import PHASES, Problem
from manyheads.mask import Causal, Document, Full, PerHead, Sink, Window, parse

RESULTS = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "results").glob("*.jsonl"))
RATES = Limits(matrix={"float32": 100.0, "bfloat16": 400.0}, copy=10.0, exp_rate=5.0)
HALF = Efficiency(0.5, 0.4, 0.8, 0, "assumed")


def by_hand(mask, nq, nk, tile):
    """Keys that each row of tiles visits, from the matrix of booleans."""
    dense = mask.dense(nq, nk)[0, 0]
    rows = [dense[i : i + tile[0]].any(0) for i in range(0, nq, tile[0])]
    blocks = range(0, nk, tile[1])
    kept = [[j for j in blocks if row[j : j + tile[1]].any()] for row in rows]
    return [[k for j in row for k in range(j, min(j + tile[1], nk))] for row in kept]


MASKS = ["causal", "window(7)", "causal & (window(5) | sink(2))", "causal & document([13, 4, 20])", "window(1)"]


@pytest.mark.parametrize("tile", [(8, 8), (16, 4), (37, 3), (1, 5)])
@pytest.mark.parametrize("text", MASKS)
def test_computed_pairs_are_those_inside_visited_tiles(text, tile):
    visited = by_hand(parse(text), 37, 37, tile)
    heights = [min(tile[0], 37 - i) for i in range(0, 37, tile[0])]
    work = count(Problem(parse(text), 37, heads=3, batch=2, width=8), tile=tile)
    assert work.computed == 6 * sum(h * len(keys) for h, keys in zip(heights, visited, strict=True))
    assert work.pairs == 6 * int(parse(text).dense(37).sum())
    assert work.flops == 4 * 8 * work.pairs and work.computed_flops == 4 * 8 * work.computed


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 90), tile=st.integers(1, 40), heads=st.integers(1, 3), width=st.integers(1, 40))
def test_a_window_as_long_as_the_sequence_costs_what_causal_costs(n, tile, heads, width):
    plain = Problem(Causal(), n, heads=heads, width=width, phase="forward+backward")
    windowed = replace(plain, mask=Causal() & Window(n))
    one, other = (count(p, tile=(tile, tile)) for p in (plain, windowed))
    assert one == other


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 70), heads=st.integers(1, 4), phase=st.sampled_from(PHASES))
def test_twice_the_heads_are_twice_the_work(n, heads, phase):
    one = count(Problem(Causal() & Window(9), n, heads=heads, width=8, phase=phase), tile=(16, 8))
    two = count(Problem(Causal() & Window(9), n, heads=2 * heads, width=8, phase=phase), tile=(16, 8))
    for field in ("pairs", "computed", "flops", "computed_flops", "exponentials"):
        assert getattr(two, field) == 2 * getattr(one, field)
    assert all(two.traffic[what] == 2 * n for what, n in one.traffic.items() if what != "layout")


def test_smaller_tiles_compute_fewer_pairs_and_tiles_of_one_pair_none_too_many():
    problem = Problem(Causal() & (Window(11) | Sink(3)), 61, heads=1, width=8)
    computed = [count(problem, tile=(size, size)).computed for size in (64, 32, 16, 8, 4, 2, 1)]
    assert computed == sorted(computed, reverse=True)
    assert computed[-1] == count(problem).pairs


def test_a_backward_pass_takes_two_and_a_half_forward_passes_and_as_many_exponentials_again():
    problem = Problem(Causal(), 100, width=16)
    forward, backward, both = (
        count(replace(problem, phase=phase)) for phase in ("forward", "backward", "forward+backward")
    )
    assert backward.flops == 2.5 * forward.flops and both.flops == 3.5 * forward.flops
    assert forward.exponentials == backward.exponentials == both.exponentials / 2
    assert both.bytes - both.traffic["layout"] == sum(
        w.bytes - w.traffic["layout"] for w in (forward, backward)
    )


def test_a_mask_tensor_computes_every_pair_and_is_held_twice():
    problem = Problem(Causal() & Window(5), 50, heads=4, width=8)
    work = count(problem, dense=True)
    assert work.computed == 4 * 50 * 50 and work.pairs == count(problem).pairs
    assert work.memory["mask tensor"] == 50 * 50 * (1 + 4)
    per_head = replace(problem, mask=PerHead([Causal(), Window(5), Full(), Causal()]))
    assert count(per_head, dense=True).memory["mask tensor"] == 4 * 50 * 50 * (1 + 4)
    assert "mask tensor" not in count(replace(problem, mask=Full()), dense=True).memory


@pytest.mark.parametrize("text", MASKS)
def test_keys_are_read_once_when_they_fit_and_once_a_row_when_nothing_does(text):
    tile, row_bytes = (8, 4), 2 * 16 * 4
    problem = Problem(parse(text), 37, heads=4, kv_heads=2, width=16)
    visited = by_hand(parse(text), 37, 37, tile)
    ample, none = (count(problem, tile=tile, cache=cache) for cache in (1 << 30, 0))
    assert ample.traffic["k and v"] == 2 * row_bytes * len({k for row in visited for k in row})
    assert none.traffic["k and v"] == 4 * row_bytes * sum(map(len, visited))


def test_a_sliding_window_rereads_little_when_one_row_fits():
    problem = Problem(Causal() & Window(16), 256, heads=1, width=16)
    row_bytes, tile = 2 * 16 * 4, (16, 16)
    work = count(problem, tile=tile, cache=40 * row_bytes)  # two tiles fit, the sequence does not
    assert work.traffic["k and v"] == 256 * row_bytes
    assert count(problem, tile=tile, cache=8 * row_bytes).traffic["k and v"] == (16 + 15 * 32) * row_bytes


def test_one_decoding_step_reads_the_cache_once_for_each_key_head():
    step = Problem(Causal(), 1, 5000, batch=3, heads=8, kv_heads=2, width=64, dtype="bfloat16")
    work = count(step, tile=(1, 128))
    assert work.pairs == work.computed == 3 * 8 * 5000
    assert work.traffic["k and v"] == 3 * 2 * 5000 * 2 * 64 * 2
    gpu = Limits(matrix={"bfloat16": 989e3}, copy=3350.0, exp_rate=3900.0)
    assert predict(work, gpu, "bfloat16", HALF).bound == "memory"


def test_documents_cost_what_they_cost_apart():
    lengths = [32, 16, 48]
    packed = count(Problem(Causal() & Document(lengths), 96, heads=1, width=8), tile=(16, 16))
    apart = [count(Problem(Causal(), n, heads=1, width=8), tile=(16, 16)) for n in lengths]
    for field in ("pairs", "computed", "flops", "exponentials"):
        assert getattr(packed, field) == sum(getattr(work, field) for work in apart)
    assert packed.traffic["k and v"] == sum(work.traffic["k and v"] for work in apart)


def test_the_slowest_unit_over_the_efficiency_is_the_time():
    work = Work(0, 0, 0, 4 * 10**8, 10**7, {"q": 10**7}, {})
    assert unit_times(work, RATES, "float32") == {"products": 4.0, "exponentials": 2.0, "memory": 1.0}
    found = predict(work, RATES, "float32", HALF)
    assert (found.low_ms, found.ms, found.high_ms, found.bound) == (5.0, 8.0, 10.0, "products")
    assert predict(work, RATES, "bfloat16", HALF).bound == "exponentials"
    late = predict(work, RATES, "float32", HALF, launch_ms=100.0)
    assert (late.ms, late.bound) == (108.0, "launch")


def test_rates_that_are_not_known_bound_nothing():
    work = Work(0, 0, 0, 4 * 10**8, 10**12, {"q": 10**12}, {})
    assert unit_times(work, Limits(matrix={"float32": 100.0}), "float32") == {"products": 4.0}
    with pytest.raises(ValueError, match="no matrix rate for 'float16'; known: float32, bfloat16"):
        unit_times(work, RATES, "float16")


def test_gradients_of_half_precision_are_summed_in_float32():
    problem = Problem(Causal(), 64, heads=2, width=8, phase="forward+backward")
    assert "gradient sums" not in count(problem).memory
    half = count(replace(problem, dtype="bfloat16")).memory
    assert half["gradient sums"] == 4 * 2 * 64 * (8 + 8 + 8) and half["gradients"] == 2 * 2 * 64 * (8 + 8 + 8 + 8)


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_the_mask_tensors_that_were_measured_are_those_that_are_counted(path):
    rows = [r for r in read(path).rows if r.provider == "sdpa" and r.peak_mib and "window" in (r.mask or "")]
    if not rows or "cpu" not in path.name:
        pytest.skip("no peak of a mask tensor on a CPU in this file")
    for row in rows:
        n = row.length
        problem = Problem(parse(row.mask), n, heads=8, width=64, phase=row.phase)
        counted = count(problem, dense=True).memory["mask tensor"] / 2**20
        assert counted == n * n * 5 / 2**20
        assert 0.75 * row.peak_mib <= counted <= 1.05 * row.peak_mib
