"""The masks of the long-context benchmark: slices agree with predicates, draws are reproducible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.mask import BlockMap, Causal, Full
from manyheads.mask.longca import LONG, STATIC, block_sparse, flops, longca, variable_block_sparse
from manyheads.mask.sampling import document_lengths, histogram, long_document_lengths
from tests.mask.cases import owner, table


def plain(case):
    """The predicate of the card, pair by pair."""
    lens, p, w, block = case.factors
    at = owner(lens or (case.total,))
    starts = np.cumsum([0, *(lens or ())]).tolist()
    last = max(at)
    rules = {
        "full": lambda i, j: True,
        "causal": lambda i, j: j <= i,
        "full_document": lambda i, j: at[i] == at[j],
        "causal_document": lambda i, j: at[i] == at[j] and j <= i,
        "sliding_window": lambda i, j: abs(i - j) <= w,
        "sliding_window_causal": lambda i, j: 0 <= i - j <= w,
        "share_question": lambda i, j: (at[i] == at[j] and j <= i) or (at[j] == 0 and at[i] != 0),
        "causal_blockwise": lambda i, j: j <= i and (at[i] == at[j] or at[i] == last),
        "prefix_lm_causal": lambda i, j: j < p or j <= i,
        "prefix_lm_document": lambda i, j: at[i] == at[j] and (j - starts[at[i]] < p or j <= i),
        "global_sliding_window": lambda i, j: abs(i - j) <= w or i < 2 * w or j < 2 * w,
        "block_causal_document": lambda i, j: at[i] == at[j] and j // block <= i // block,
        "full_document_long": lambda i, j: at[i] == at[j],
        "causal_document_long": lambda i, j: at[i] == at[j] and j <= i,
    }
    return table(rules[case.name], case.total)


short = {(1, 9): 3.0, (10, 30): 1.0}


@pytest.mark.parametrize("name", STATIC + LONG)
@given(total=st.integers(6, 41), seed=st.integers(0, 10**6), w=st.none() | st.integers(0, 45))
def test_slices_and_composition_equal_the_predicate(name, total, seed, w):
    if name.startswith("sliding"):
        w = w or 0
    case = longca(name, total, seed=seed, distribution=short, window=w, block=4)
    truth = plain(case)
    assert (case.mask.dense(total)[0, 0].numpy() == truth).all()
    assert (case.slices.dense(total)[0, 0].numpy() == truth).all()
    assert case.area == truth.sum()


@pytest.mark.parametrize("name", STATIC)
def test_the_same_at_an_odd_length_with_the_default_draws(name):
    total = 1237
    case = longca(name, total, window=100 if "sliding" in name else None, block=64, seed=7)
    truth = case.mask.dense(total)
    assert torch.equal(truth, case.slices.dense(total)) and case.area == int(truth.sum())
    assert case == longca(name, total, window=100 if "sliding" in name else None, block=64, seed=7)


def test_one_document_is_the_whole_sequence():
    for total in (1, 33):
        assert torch.equal(longca("causal_document", total, lengths=[total]).mask.dense(total), Causal().dense(total))
        assert torch.equal(longca("full_document", total, lengths=[total]).mask.dense(total), Full().dense(total))


@pytest.mark.parametrize("w", [33, 34, 1000])
def test_a_window_as_long_as_the_sequence_hides_nothing(w):
    assert torch.equal(longca("sliding_window_causal", 33, window=w).slices.dense(33), Causal().dense(33))
    assert torch.equal(longca("sliding_window", 33, window=w).slices.dense(33), Full().dense(33))


def test_the_window_leaves_out_self():
    case = longca("sliding_window_causal", 40, window=5)
    assert case.mask.dense(40).sum(-1).max() == 6


@given(st.integers(1, 2**20), st.integers(0, 10**6), st.sampled_from(["pile", "prolong64k", "prolong512k", None]))
def test_lengths_sum_exactly_and_repeat(total, seed, name):
    lens = document_lengths(total, name, seed=seed)
    assert sum(lens) == total and min(lens) >= 1
    assert lens == document_lengths(total, name, seed=seed)


def test_lengths_follow_the_histogram():
    lens = np.array(document_lengths(3_000_000, "pile", seed=3)[:-1])
    shares = histogram("pile")
    total = sum(shares.values())
    for (first, last), share in shares.items():
        seen = ((lens >= first) & (lens <= last)).mean() if first else (lens <= last).mean()
        assert abs(seen - share / total) < 0.03
    assert 150 < np.median(lens) < 400


def test_long_lengths_hold_two_parts():
    lens = long_document_lengths(1_000_000, seed=5)
    assert sum(lens) == 1_000_000 and lens == long_document_lengths(1_000_000, seed=5)
    assert 0.5 < sum(n for n in lens if n >= 8192) / 1_000_000 < 0.95


def test_operations_are_counted_from_the_area():
    case = longca("causal", 100)
    count = case.flops(8, 64)
    assert count.forward == 4 * 5050 * 8 * 64 and count.backward == 2.5 * count.forward
    assert count.total == 3.5 * count.forward and count == flops(5050, 8, 64)


@pytest.mark.parametrize("total", [128, 131])
def test_uniform_blocks_are_kept_by_row(total):
    mask = block_sparse(total, ratio=0.3, heads=3, block=8, seed=1)
    bits = mask.bits()
    assert mask.shape == (1, 3) and (bits.sum(-1) == int(0.3 * bits.shape[-1])).all()
    assert mask == block_sparse(total, ratio=0.3, heads=3, block=8, seed=1)
    assert mask != block_sparse(total, ratio=0.3, heads=3, block=8, seed=2)
    assert mask.dense(total).shape == (1, 3, total, total)


def test_blocks_kept_over_the_head_may_leave_a_row_empty():
    bits = block_sparse(256, ratio=0.05, heads=2, block=8, over="head").bits()
    assert (bits.sum((-1, -2)) == int(0.05 * 32 * 32)).all() and (bits.sum(-1) == 0).any()


def test_all_blocks_kept_is_full():
    assert block_sparse(70, ratio=1.0, block=16).dense(70).all()
    assert variable_block_sparse(70, ratio=1.0, average=16, minimum=3).dense(70).all()


def test_variable_blocks_have_a_least_size_and_an_average():
    mask = variable_block_sparse(1000, ratio=0.5, heads=2, average=50, minimum=20, seed=4)
    for part in mask.parts:
        assert isinstance(part, BlockMap)
        for sizes in part._sizes:
            assert sizes.array.sum() == 1000 and sizes.array.min() >= 20 and len(sizes.array) == 20
    assert mask.parts[0] != mask.parts[1]


REFUSED = [
    (lambda: longca("casual", 9), "unknown mask 'casual': did you mean 'causal'"),
    (lambda: longca("causal_document", 9, lengths=[4, 4]), "expected a sum of 9, got 8"),
    (lambda: longca("global_sliding_window", 5), "up to total/3 - 1"),
    (lambda: document_lengths(0), "total: expected an int >= 1"),
    (lambda: document_lengths(9, "pil"), "did you mean 'pile'"),
    (lambda: document_lengths(9, {}), "not all 0"),
    (lambda: block_sparse(9, ratio=0.0), "ratio"),
    (lambda: block_sparse(9, ratio=0.5, over="rows"), "over: expected"),
    (lambda: variable_block_sparse(9, ratio=0.5, average=2, minimum=3), "minimum: expected at most"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=lambda x: None)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
