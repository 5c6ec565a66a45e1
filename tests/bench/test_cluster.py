"""Simulated clusters: work and bytes are those of executed plans, clocks are those of a hand calculation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from manyheads.bench.planning.cluster import INSIDE, Links, cluster, held, run
from manyheads.bench.planning.machines import find
from manyheads.bench.suites import ranks
from manyheads.bench.suites.parallel import USUAL, hidden
from manyheads.bench.workload import Problem
from manyheads.cli import main
from manyheads.mask import Causal, Document, PerHead, Window
from manyheads.parallel.deal import contiguous, deal, zigzag
from manyheads.parallel.plan import SCHEMES, Move, Sizes, Step, plan

H100 = find("H100")
PACKED = Causal() & Document([61, 5, 190, 1, 43])
CALL = Sizes(heads=8, kv_heads=2, dim=16, itemsize=4)


def executed(world):
    """Every scheme really run in processes: what each rank computed and sent, beside what was simulated."""
    n, pairs = 300, tuple((scheme, USUAL.get(scheme, "balanced")) for scheme in SCHEMES)
    problem = Problem(PACKED, n, heads=8, kv_heads=2, width=16, phase="forward+backward")
    found = ranks.run(ranks.Job(problem, world, pairs, seconds=0.0), timeout=240)
    for (scheme, shard), each in found.items():
        (said,) = cluster(PACKED, n, world, CALL, machine=H100, dtype="float32", schemes=[scheme], shards=[shard])
        yield scheme, said, each


@pytest.mark.parametrize(
    "world", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_work_and_bytes_of_every_rank_are_those_of_executed_plans(world):
    for scheme, said, each in executed(world):
        assert each.reason is None and each.verdict["gate"] == "green", scheme
        assert each.areas == tuple(said.areas.tolist()), scheme
        assert each.sent == tuple(zip(said.sent.tolist(), said.sent_back.tolist(), strict=True)), scheme


@pytest.mark.parametrize("ranks_", [1, 6, 16])
def test_areas_are_complete_for_every_scheme_and_deal(ranks_):
    n = 700
    mask = Causal() & Window(90)
    for found in cluster(mask, n, ranks_, Sizes(16, 4, 32), machine=H100, shards=["zigzag", "balanced", "nearby"]):
        if found.reason is None:
            assert found.areas.sum() == mask.tiles(n).pairs * 16
            assert 0 <= found.idle < 1 and found.memory > 0 and found.ms > 0


def test_a_scheme_that_cannot_divide_the_heads_says_so():
    found = {o.scheme: o for o in cluster(Causal(), 640, 32, Sizes(16, 4, 32), machine=H100, shards=["zigzag"])}
    assert "16 query heads" in found["ulysses"].reason
    assert [name for name, o in found.items() if o.reason is None] == [s for s in SCHEMES if s != "ulysses"]
    (found,) = cluster(Causal(), 640, 4, Sizes(4), machine=H100, schemes=["ring"], shards=["per_document"])
    assert "documents" in found.reason


def test_messages_hide_behind_compute_or_compute_behind_messages():
    links = Links(inside=1.0, between=1.0, per_node=8, latency_us=0.0)
    around, none = np.array([1, 0]), np.zeros(2, dtype=np.int64)

    def end(work, nbytes):
        moves = (Move(around, np.array([nbytes, nbytes])),)
        return run(iter([Step(np.array([work, work]), moves), Step(np.array([work, work]))]), links, 1e-9).end

    assert end(1000, 400) == pytest.approx(2000e-9)
    assert end(400, 1000) == pytest.approx(1400e-9)
    last = run(iter([Step(none, (Move(around, np.array([5, 700])),))]), links, 1e-9)
    assert last.end == pytest.approx(700e-9) and last.sent.tolist() == [5, 700]


def test_messages_between_nodes_are_slower_and_counted():
    links = Links(inside=100.0, between=10.0, per_node=2, latency_us=1.0, far_latency_us=2.0)
    step = Step(np.zeros(4, dtype=np.int64), (Move(np.array([1, 2, 3, 0]), np.full(4, 10**6)),))
    found = run(iter([step]), links, 1.0)
    assert found.far == 2 * 10**6 and found.end == pytest.approx(1e-4 + 2e-6)
    many = Step(np.zeros(4, dtype=np.int64), (), 10**6 * (1 - np.eye(4, dtype=np.int64)))
    found = run(iter([many]), links, 1.0)
    assert found.far == 8 * 10**6 and found.end == pytest.approx(2e-4 + 2e-6)


def test_an_outer_transfer_of_a_double_ring_has_a_whole_window_of_steps():
    links = Links(inside=1.0, between=1.0, per_node=1, latency_us=0.0, far_latency_us=0.0)
    around, work = np.array([1, 0]), np.array([100, 100])

    def end(due):
        return run(iter([Step(work, (Move(around, np.full(2, 250), due),)), Step(work), Step(work)]), links, 1e-9).end

    assert end(2) == pytest.approx(350e-9) and end(1) == pytest.approx(450e-9)


def test_balance_is_time():
    made = {
        shard: next(cluster(Causal(), 65536, 8, Sizes(32, 8, 128), machine=H100, schemes=["ring"], shards=[shard]))
        for shard in ("contiguous", "zigzag")
    }
    assert made["contiguous"].imbalance > 1.8 and made["contiguous"].ms > 1.6 * made["zigzag"].ms
    assert made["zigzag"].idle < 0.1 < made["contiguous"].idle


def test_memory_follows_what_a_scheme_keeps_of_others():
    n, world = 4096, 8
    dealt = contiguous(n, world)
    window = Causal() & Window(64)
    of = {s: int(held(plan(window, dealt, s, Sizes(8, 8, 64)), layers=3).max()) for s in SCHEMES}
    assert of["groupcast"] < of["ring"] < of["gather"]
    one, two = (held(plan(Causal(), zigzag(n, world), "ring", Sizes(8, 8, 64)), layers=k).max() for k in (1, 2))
    rows = n // world
    assert two - one == rows * 8 * (4 * 64 * 2 + 4)


def test_per_head_masks_are_counted_head_by_head():
    mask = PerHead([Window(1 + 3 * i) for i in range(8)])
    for found in cluster(mask, 200, 4, CALL, machine=H100, dtype="float32", shards=["zigzag"]):
        assert found.areas.sum() == mask.tiles(200, heads=8).pairs
        if found.scheme == "ulysses":
            assert found.imbalance > 1.3  # wide windows are all on one rank


@pytest.mark.slow
def test_four_thousand_ranks_take_seconds():
    n, world = 4096 * 2048, 4096
    mask = Causal() & Document([n // 512] * 512)
    found = list(
        cluster(mask, n, world, Sizes(64, 8, 128), machine=H100, schemes=["hybrid", "groupcast"], shards=["balanced"])
    )
    assert all(o.areas.sum() == mask.tiles(n).pairs * 64 for o in found)
    assert sum(o.seconds for o in found) < 120


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ranks": 4097}, "ranks: expected 1 to 4096"),
        ({"efficiency": 0.0}, "efficiency"),
        ({"layers": 0}, "layers"),
        ({"schemes": ["rings"]}, "did you mean 'ring'"),
        ({"shards": ["zagzig"]}, "unknown shard"),
        ({"dtype": "float64"}, "no matrix rate"),
    ],
)
def test_bad_input_is_named(change, says):
    given = {"ranks": 2} | change
    with pytest.raises(ValueError, match=says):
        list(cluster(Causal(), 64, given.pop("ranks"), CALL, machine=H100, **given))


@pytest.mark.parametrize("change", [{"inside": 0}, {"per_node": 0}, {"latency_us": -1}])
def test_links_are_positive(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Links(**change)


def test_the_command_prints_a_table_and_json(capsys):
    asked = ["simulate", "cluster", "causal & window(300)", "--ranks", "4", "--per-rank", "512", "--model", "8:2x64x2"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "2048 tokens on 4 x H100" in said and "groupcast" in said and "max/mean" in said
    assert main([*asked, "--json", "--scheme", "ring", "--shard", "zigzag", "--links", "100:20x2"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    want = plan(Causal() & Window(300), deal("zigzag", None, 2048, 4), "ring", Sizes(8, 2, 64))
    assert found["sent_all"] == int(want.forward_bytes.sum()) and 0 < found["far"] < 1


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--links", "fast"], "links: expected GB/s"),
        (["--model", "big"], "model: expected heads"),
        (["--device", "H10"], "did you mean 'H100'"),
        (["--per-rank", "0"], "per-rank"),
        (["--dtype", "float8"], "dtype: expected one of"),
    ],
)
def test_the_command_says_what_it_needs(extra, says, capsys):
    assert main(["simulate", "cluster", "causal", "--ranks", "2", *extra]) == 2
    assert says in capsys.readouterr().err


def test_what_is_hidden():
    assert hidden(10.0, 10.0, 10.0) == 1.0 and hidden(10.0, 10.0, 20.0) == 0.0 and hidden(4.0, 8.0, 9.0) == 0.75
    assert INSIDE["H100"] > Links().between
