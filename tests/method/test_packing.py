"""Packing algorithms: what every packing promises, and what each algorithm adds."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.method.packing import (
    ALGORITHMS,
    Hyperparameters,
    Packing,
    adjust,
    greedy,
    histogram,
    lpfhp,
    nnlshp,
    pack,
    spfhp,
)
from manyheads.method.packing.nonnegative import solve, strategies

problems = st.integers(4, 40).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), max_size=60))
)
by_name = pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))


def depths(algorithm: str) -> tuple[int | None, ...]:
    return (1, 2, 3) if algorithm == "nnlshp" else (None, 1, 2, 5)


@by_name
@settings(max_examples=40, deadline=None)
@given(problem=problems)
def test_every_sequence_is_packed_exactly_once(algorithm, problem):
    capacity, lengths = problem
    for depth in depths(algorithm):
        packing = pack(lengths, capacity, algorithm=algorithm, depth=depth)
        assert sorted(i for row in packing.packs for i in row) == list(range(len(lengths)))


@by_name
@settings(max_examples=40, deadline=None)
@given(problem=problems)
def test_no_pack_exceeds_capacity_or_depth(algorithm, problem):
    capacity, lengths = problem
    for depth in depths(algorithm):
        packing = pack(lengths, capacity, algorithm=algorithm, depth=depth)
        assert all(0 < sum(lengths[i] for i in row) <= capacity for row in packing.packs)
        assert all(len(row) <= (depth or capacity) for row in packing.packs)


def one_by_one(lengths: list[int], capacity: int, depth: int | None, choose) -> Counter:
    """Worst-fit or best-fit decreasing, sequence by sequence."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        open_rows = [row for row in rows if sum(row) + length <= capacity and len(row) < (depth or capacity)]
        if open_rows:
            choose(open_rows, key=sum).append(length)
        else:
            rows.append([length])
    return Counter(tuple(row) for row in rows)


@pytest.mark.parametrize(("algorithm", "choose"), [(spfhp, min), (lpfhp, max)])
@settings(max_examples=80, deadline=None)
@given(problem=problems)
def test_moving_whole_groups_fills_rows_as_moving_single_sequences(algorithm, choose, problem):
    capacity, lengths = problem
    packing = algorithm(lengths, capacity)
    used = Counter(sum(row) for row in packing.strategies().elements())
    assert used == Counter(sum(row) for row in one_by_one(lengths, capacity, None, choose).elements())


@pytest.mark.parametrize("seed", range(12))
def test_spfhp_is_at_least_as_full_as_greedy_first_fit(seed):
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(64, 513))
    shape = draw.integers(0, 4)
    size = int(draw.integers(300, 1500))
    lengths = [
        lambda: draw.integers(1, capacity + 1, size),
        lambda: draw.lognormal(np.log(capacity / 4), 0.9, size),
        lambda: draw.normal(capacity / 2, capacity / 5, size),
        lambda: np.append(draw.integers(1, 20, size), draw.integers(capacity // 2, capacity, size // 3)),
    ][shape]()
    lengths = np.clip(lengths, 1, capacity).astype(int)
    draw.shuffle(lengths)
    assert spfhp(lengths, capacity).efficiency >= greedy(lengths, capacity).efficiency


@settings(max_examples=60, deadline=None)
@given(problem=problems.filter(lambda p: p[1]), depth=st.sampled_from([1, 2, 3]))
def test_least_squares_leaves_no_sequence_without_a_slot(problem, depth):
    capacity, lengths = problem
    slots, counts = solve(np.array(lengths), capacity, depth=depth)
    offered = np.zeros(capacity + 1, dtype=int)
    np.add.at(offered, slots, counts[:, None])
    assert (offered[1:] - histogram(lengths, capacity)[1:] >= 0).all()
    assert (counts >= 0).all()
    assert (slots.sum(1) <= capacity).all()


def test_strategies_are_all_multisets_that_fill_the_row():
    found = strategies(17)
    assert (found.sum(1) == 17).all()
    assert len({tuple(row) for row in found.tolist()}) == len(found)
    wanted = {tuple(sorted((a, b, 17 - a - b), reverse=True)) for a in range(18) for b in range(18 - a)}
    assert {tuple(row) for row in found.tolist()} == wanted


def test_least_squares_packs_a_large_data_set_nearly_full():
    draw = np.random.default_rng(3)
    lengths = np.clip(draw.gamma(2.0, 0.3 * 64, 40_000), 1, 64).astype(int)
    assert nnlshp(lengths, 64).efficiency > 0.98
    assert nnlshp(lengths, 64, resolution=4).efficiency > 0.85


def test_cost_follows_distinct_lengths_and_not_their_number():
    counts = {100: 30_000, 60: 10_000, 28: 50_000, 7: 3}
    lengths = np.repeat(list(counts), list(counts.values()))
    packing = spfhp(lengths, 128)
    assert packing.efficiency > 0.95
    assert len(packing.strategies()) <= 8


def test_equal_sequences_fill_rows():
    assert spfhp([5] * 9, 20).packs == lpfhp([5] * 9, 20).packs
    assert len(spfhp([5] * 9, 20).packs) == 3


def test_nothing_to_pack():
    for algorithm in ALGORITHMS:
        packing = pack([], 8, algorithm=algorithm)
        assert packing.packs == () and packing.efficiency == 1.0 and packing.factor == 1.0


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: spfhp([0, 3], 4), ValueError, "lengths: expected 1 to capacity=4, got 0 to 3"),
        (lambda: spfhp([3, 5], 4), ValueError, "got 3 to 5"),
        (lambda: spfhp([1.5], 4), TypeError, "lengths: expected whole numbers"),
        (lambda: spfhp([[1]], 4), ValueError, "one dimension"),
        (lambda: spfhp([1], 0), ValueError, "capacity: expected at least 1"),
        (lambda: lpfhp([1], 4, depth=0), ValueError, "depth: expected at least 1"),
        (lambda: nnlshp([1], 4, depth=4), ValueError, "depth: expected 1, 2 or 3"),
        (lambda: nnlshp([1], 10, resolution=3), ValueError, "resolution: expected a divisor of capacity=10"),
        (lambda: nnlshp([1], 4096), ValueError, "raise resolution"),
        (lambda: pack([1], 4, algorithm="spfh"), ValueError, "did you mean 'spfhp'"),
        (lambda: Packing(((0,), (0,)), (1,), 4), ValueError, "packed 2 times"),
        (lambda: Packing(((0,),), (1, 1), 4), ValueError, "sequence 1 is packed 0 times"),
        (lambda: Packing(((0, 1),), (3, 2), 4), ValueError, "row 0 has 5 tokens"),
        (lambda: Packing(((0, 1),), (1, 1), 4, depth=1), ValueError, "at most depth=1"),
        (lambda: Packing(((0,), ()), (1,), 4), ValueError, "row 1 has 0 tokens"),
        (lambda: Packing(((0, 7),), (1, 1), 4), ValueError, "indices must be from 0 to 1"),
        (lambda: adjust(Hyperparameters(8, 1.0), 0.5), ValueError, "factor: expected at least 1"),
        (lambda: adjust(Hyperparameters(8, 1.0), 2, keep="row"), ValueError, "did you mean 'rows'"),
        (lambda: adjust(Hyperparameters(8, 1.0), 2, rule="line"), ValueError, "did you mean 'linear'"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words.replace("(", r"\(")):
        call()


def test_adjusting_keeps_sequences_per_step_or_carries_moments_over():
    settings = Hyperparameters(1000, 6e-3, 0.81, 0.92)
    assert adjust(settings, 2.5) == Hyperparameters(400, 6e-3, 0.81, 0.92)
    rows = adjust(settings, 2.0, keep="rows")
    assert rows.batch_size == 1000
    assert (rows.lr, rows.beta1, rows.beta2) == pytest.approx((12e-3, 0.6561, 0.8464))
    assert adjust(settings, 4.0, keep="rows", rule="sqrt").lr == pytest.approx(12e-3)
    assert adjust(settings, 4.0, keep="rows", rule="none").lr == 6e-3


def test_decayed_moments_of_one_packed_step_equal_those_of_p_steps():
    factor, gradient = 3, 0.7
    settings = Hyperparameters(8, 1e-3)
    packed = adjust(settings, factor, keep="rows")
    moment = 2.0
    for _ in range(factor):
        moment = settings.beta1 * moment + (1 - settings.beta1) * gradient
    assert packed.beta1 * 2.0 + (1 - packed.beta1) * gradient == pytest.approx(moment)
