"""Plans: exact work of every step, the bytes that are published, and who needs which rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.common.errors import UnsupportedError
from manyheads.mask import Causal, Document, Full, PerBatch, PerHead, Window
from manyheads.mask.longca import STATIC, longca
from manyheads.mask.sampling import document_lengths
from manyheads.parallel.deal import DEALS, contiguous, nearby, striped, zigzag
from manyheads.parallel.pairs import coarse, needed_rows, pair_areas, pairs
from manyheads.parallel.plan import SCHEMES, Sizes, plan
from manyheads.parallel.ring import windows

short = {(1, 9): 3.0, (10, 60): 1.0}
CALL = Sizes(heads=8, kv_heads=2, dim=16, value_dim=24, batch=1, itemsize=2)


def dense_pairs(mask, found):
    """Areas and needed rows between ranks, pair by pair."""
    seen = mask.dense(found.n).sum((0, 1)).numpy()
    at = [found.index(rank).numpy() for rank in range(found.world)]
    blocks = [[seen[np.ix_(q, k)] for k in at] for q in at]
    return (
        np.array([[block.sum() for block in row] for row in blocks]),
        np.array([[(block > 0).any(0).sum() for block in row] for row in blocks]),
        [[np.flatnonzero((block > 0).any(0)).tolist() for block in row] for row in blocks],
    )


@pytest.mark.parametrize("name", STATIC)
@given(n=st.integers(6, 150), world=st.integers(1, 6), shard=st.sampled_from(list(DEALS)), seed=st.integers(0, 999))
def test_areas_and_rows_between_ranks_are_those_of_the_dense_mask(name, n, world, shard, seed):
    window = seed % 20 if "window" in name else None
    mask = longca(name, n, seed=seed, distribution=short, block=16, window=window).mask
    if shard == "per_document" and "document" not in mask.text:
        shard = "zigzag"
    found = DEALS[shard](mask, n, world, None)
    area, rows, index = dense_pairs(mask, found)
    for way in (pairs, coarse):
        got_area, got_rows = way(mask, found)
        assert np.array_equal(got_area, area) and np.array_equal(got_rows, rows)
    assert [[needed_rows(mask, found, r, s).tolist() for s in range(world)] for r in range(world)] == index


def test_rows_count_what_any_head_or_batch_entry_needs():
    mask = PerHead([Causal() & Window(3), Full() & Document([30, 30])])
    found = contiguous(60, 4)
    area, rows, _ = dense_pairs(mask, found)
    assert np.array_equal(pair_areas(mask, found), area) and np.array_equal(pairs(mask, found)[1], rows)
    with pytest.raises(ValueError, match="for all batch entries and heads"):
        coarse(mask, found)


@pytest.mark.parametrize("scheme", [*SCHEMES, "hybrid 2", "double_ring 2"])
@pytest.mark.parametrize("shard", ["zigzag", "balanced", "striped"])
@pytest.mark.parametrize(
    ("mask", "batch"),
    [
        (Causal(), 1),
        (Causal() & Document([100, 3, 154]), 2),
        (PerHead([Window(1 + i) for i in range(8)]), 1),
        (PerBatch([Causal(), Window(9)]), 2),
    ],
    ids=["causal", "packed", "per head", "per batch"],
)
def test_steps_together_compute_every_visible_pair_once(scheme, shard, mask, batch):
    n, world = 257, 8
    found = DEALS[shard](mask, n, world, None)
    sizes = Sizes(heads=8, kv_heads=2, dim=16, batch=batch)
    name, _, degree = scheme.partition(" ")
    p = plan(mask, found, name, sizes, degree=int(degree) if degree else None)
    every = mask.tiles(n, batch=batch, heads=8).pairs
    assert p.areas.sum() == every
    assert sum(step.area for step in p.backward()).sum() == every
    for step in (*p.forward(), *p.backward()):
        assert (step.sent >= 0).all()
        assert step.among is None or not np.diagonal(step.among).any()
        assert all(sorted(move.to) == list(range(world)) for move in step.moves)  # everyone hears from one other
        assert all((move.to != np.arange(world)).all() for move in step.moves)


def test_the_order_of_visits_is_that_of_the_executed_ring():
    n, world, window = 96, 12, 4
    found = contiguous(n, world)
    area = pair_areas(Causal(), found) * CALL.heads
    steps = list(plan(Causal(), found, "double_ring", CALL, window=window).forward())
    for rank in range(world):
        order = windows(world, rank, window)
        assert [int(step.area[rank]) for step in steps] == [area[rank, source] for source in order.visits[rank]]
        moves = [(t, int(m.to[rank]), m.due) for t, step in enumerate(steps) for m in step.moves]
        assert sorted(moves) == sorted((m.post, m.to, m.use - m.post) for m in order.moves)
        back = list(plan(Causal(), found, "double_ring", CALL, window=window).backward())
        gradients = [int(step.moves[-1].to[rank]) for step in back[1:]]
        assert gradients == [order.onward(t)[0] for t in range(world)]


@given(world=st.sampled_from([2, 4, 6, 8, 12]), shard=st.sampled_from(["zigzag", "balanced"]))
def test_in_a_double_ring_every_block_visits_every_rank_once(world, shard):
    mask = Causal()
    found = DEALS[shard](mask, world * 10, world, None)
    one, two = (plan(mask, found, scheme, CALL) for scheme in ("ring", "double_ring"))
    assert np.array_equal(one.areas, two.areas)
    assert one.forward_bytes.sum() == two.forward_bytes.sum()
    assert one.backward_bytes.sum() == two.backward_bytes.sum()


@pytest.mark.parametrize("world", [2, 4, 8, 64])
@pytest.mark.parametrize("kv_heads", [64, 128])
def test_volumes_are_the_published_ones(world, kv_heads):
    t, hq, d = world * 256, 128, 32
    found = zigzag(t, world)
    sizes = Sizes(heads=hq, kv_heads=kv_heads, dim=d, itemsize=2)
    ring = plan(Causal(), found, "ring", sizes)
    elements = (world - 1) * t * kv_heads * d * 2 // world
    assert set(ring.forward_bytes.tolist()) == {elements * 2}
    assert np.array_equal(plan(Causal(), found, "gather", sizes).forward_bytes, ring.forward_bytes)
    heads = plan(Causal(), found, "ulysses", sizes)
    elements = (world - 1) * t * (kv_heads + hq) * d * 2 // world**2
    statistics = (world - 1) * t // world * hq // world * 4  # log-normalisers, which the formula leaves out
    assert set(heads.forward_bytes.tolist()) == {elements * 2 + statistics}


def test_key_heads_fewer_than_ranks_are_replicated_on_the_wire_only():
    sizes = Sizes(heads=8, kv_heads=2, dim=16, itemsize=2)
    p = plan(Causal(), contiguous(80, 8), "ulysses", sizes)
    assert p.kv_heads.tolist() == [1] * 8
    q_and_kv = 10 * (16 + 2 * 16) * 2  # of one rank, to one other: its query head, and the key head that this reads
    back = 10 * (16 * 2 + 4)
    assert p.forward_bytes.tolist() == [7 * (q_and_kv + back)] * 8


@given(
    n=st.integers(8, 400),
    world=st.integers(2, 8),
    shard=st.sampled_from(list(DEALS)),
    seed=st.integers(0, 99),
    window=st.none() | st.integers(1, 60),
)
def test_groupcast_never_sends_more_than_a_ring(n, world, shard, seed, window):
    mask = Causal() & Document(document_lengths(n, short, seed=seed))
    mask = mask if window is None else mask & Window(window)
    found = DEALS[shard](mask, n, world, None)
    few, ring = (plan(mask, found, scheme, CALL) for scheme in ("groupcast", "ring"))
    assert few.forward_bytes.sum() <= ring.forward_bytes.sum()
    assert few.backward_bytes.sum() <= ring.backward_bytes.sum()


@pytest.mark.parametrize("world", [8, 64])
@pytest.mark.parametrize("window", [1025, 4097])
def test_groupcast_sends_a_third_of_a_ring_under_a_window(world, window):
    n = world * 8192
    mask = Causal() & Window(window)
    for found in (contiguous(n, world), zigzag(n, world), nearby(mask, n, world)):
        few, ring = (plan(mask, found, scheme, CALL) for scheme in ("groupcast", "ring"))
        assert 3 * few.forward_bytes.sum() <= ring.forward_bytes.sum()
        assert 3 * few.backward_bytes.sum() <= ring.backward_bytes.sum()


@pytest.mark.parametrize("world", [8, 64])
def test_groupcast_sends_a_third_of_a_ring_for_packed_documents(world):
    """Balanced within 5%; documents longer than a quarter of the sequence are left out: all ranks work on them."""
    n, least = world * 8192, []
    for seed in range(12):
        lengths = document_lengths(n, ("pile", "prolong64k", "prolong512k")[seed % 3], seed=seed)
        mask = Causal() & Document(lengths)
        found = nearby(mask, n, world)
        if max(lengths) > n / 4:
            continue
        few, ring = (plan(mask, found, scheme, CALL) for scheme in ("groupcast", "ring"))
        assert few.imbalance <= 1.05
        least.append(ring.forward_bytes.sum() / few.forward_bytes.sum())
    assert len(least) >= 6 and min(least) >= 3


def test_a_stripe_under_a_causal_mask_levels_every_ring_step():
    p = plan(Causal(), striped(4096, 8), "ring", CALL)
    steps = [step.area for step in p.forward()]
    assert max(float(a.max() / a.mean()) for a in steps) < 1.01
    uneven = [step.area for step in plan(Causal(), contiguous(4096, 8), "ring", CALL).forward()]
    assert max(float(a.max() / a.mean()) for a in uneven) > 1.5


def test_one_rank_sends_nothing():
    for scheme in SCHEMES:
        p = plan(Causal(), contiguous(9, 1), scheme, CALL)
        assert p.forward_bytes.tolist() == p.backward_bytes.tolist() == [0] and p.areas.tolist() == [45 * 8]


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"scheme": "rings"}, ValueError, "did you mean 'ring'"),
        ({"scheme": "hybrid", "degree": 3}, ValueError, "divisor of 4 ranks"),
        ({"scheme": "double_ring", "window": 3}, ValueError, "divisor of the ring's 4 ranks"),
        ({"scheme": "ulysses", "sizes": Sizes(heads=6, kv_heads=2)}, UnsupportedError, "6 query heads"),
        ({"mask": PerHead([Causal(), Full()])}, ValueError, "expected 1 or 8 heads, got 2"),
    ],
)
def test_bad_input_is_named(change, kind, says):
    given = {"mask": Causal(), "scheme": "ring", "sizes": CALL} | change
    with pytest.raises(kind, match=says):
        plan(given.pop("mask"), zigzag(16, 4), given.pop("scheme"), given.pop("sizes"), **given)


def test_heads_must_form_groups():
    with pytest.raises(ValueError, match="multiple of 3"):
        Sizes(heads=8, kv_heads=3)


def test_needed_rows_are_indices_into_the_source():
    mask, found = Causal() & Window(4), zigzag(32, 2)
    rows = needed_rows(mask, found, 0, 1)
    assert rows.dtype == torch.int64
    assert found.index(1)[rows].tolist() == [21, 22, 23]
