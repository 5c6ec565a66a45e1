"""MISA: with all heads, or with all tokens left over, it is the flat choice; the router is the definition's."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from manyheads import Causal, Document
from manyheads.engine.scratch import Scratch
from manyheads.mechanism.sparse.indexer import Index, PooledKeys, index_tokens, routed
from manyheads.mechanism.sparse.indexer.pooled import block_means
from manyheads.mechanism.sparse.indexer.tile import Tile
from manyheads.mechanism.sparse.misa import MISA, head_contributions, misa, reference
from manyheads.testing import sample_qkv
from tests.mechanism.sparse.indexed import chosen, drawn, recall
from tests.mechanism.sparse.test_dsa import named

SMALL = MISA(heads=2, block=8, flat_below=0)


def tile_of(index, first=None):
    """All queries of the first batch entry."""
    first = index.k.shape[1] - index.q.shape[2] if first is None else first
    rows, weights = index.q[0].transpose(0, 1).contiguous(), index.w[0].T.contiguous()
    return Tile(rows, weights, index.k[0], first, 5, Scratch())


@pytest.mark.parametrize("queries", [1, 40, 203])
@pytest.mark.parametrize("heads", [6, 64])
def test_all_heads_give_the_flat_choice(queries, heads):
    index = drawn(203, queries)
    assert torch.equal(chosen(index, 13, dataclasses.replace(SMALL, heads=heads)), chosen(index, 13))


@pytest.mark.parametrize("heads", [1, 3])
def test_leaving_over_every_visible_token_gives_the_flat_choice(heads):
    index = drawn(203)
    wide, narrow = (MISA(heads, 8, rerank, flat_below=0) for rerank in (203, 20))
    flat = chosen(index, 13)
    assert torch.equal(chosen(index, 13, wide), flat)
    assert not torch.equal(chosen(index, 13, narrow), flat)
    assert torch.equal(chosen(index, 13, narrow)[:, :20], flat[:, :20])


def test_with_blocks_of_one_token_contributions_are_exact_means():
    index = drawn(61, batch=1)
    got = routed.contributions(tile_of(index), index.k[0], 1)
    each = (index.w[0, ..., None] * (index.q[0] @ index.k[0].mT).relu()).abs()  # (H, N, N)
    for t in range(61):
        torch.testing.assert_close(got[t], each[:, t, : t + 1].mean(-1), rtol=1e-10, atol=1e-12)


def test_contributions_count_the_own_block_with_its_tokens_so_far():
    index = drawn(61, 30, batch=1)
    means = block_means(index.k[0], 8, torch.float64, Scratch())
    got = routed.contributions(tile_of(index), means, 8)
    for i in range(30):
        one = index.q[0, :, i], index.k[0, : 32 + i], index.w[0, :, i]
        torch.testing.assert_close(got[i], head_contributions(*one, 8), rtol=1e-10, atol=1e-12)


def test_a_head_without_weight_is_active_only_where_no_other_is_left():
    index = drawn(61, batch=1)
    index.w[0, 1:4] = 0.0
    index.w[0, :, 50:] = 0.0
    index.q[0, 0] = 0.0  # contributes nothing, yet has weight
    means = block_means(index.k[0], 8, torch.float64, Scratch())
    for heads in (1, 2, 3):
        active = routed.active_heads(tile_of(index), means, 8, heads)
        assert (index.w[0].T.gather(1, active)[:50] != 0).all()
    four = routed.active_heads(tile_of(index), means, 8, 4)
    assert {0, 4, 5} < set(four[7].tolist())
    assert torch.equal(chosen(index, 9, SMALL)[0, 55, :9], torch.ones(9, dtype=torch.bool))  # all scores are 0


def test_recall_grows_with_the_heads_on_average():
    found = []
    for heads in (1, 2, 4, 8, 12):
        each = [recall(drawn(300, 60, heads=12, seed=s), 30, MISA(heads, 8, flat_below=0)) for s in range(6)]
        found.append(sum(each) / len(each))
    assert found == sorted(found) and found[-1] == 1.0 and found[0] < 0.7


def test_choosing_again_with_all_heads_raises_recall():
    index = drawn(300, 60, heads=12)
    few, again = (recall(index, 30, MISA(3, 8, rerank, flat_below=0)) for rerank in (0, 90))
    assert again > few + 0.1


@pytest.mark.parametrize("config", [SMALL, MISA(3, 5, 20, flat_below=60), MISA(2, 8, 9, flat_below=0), MISA(1, 8)])
@pytest.mark.parametrize("lens", [None, [50, 1, 0, 52]])
def test_the_choice_is_that_of_the_definition(config, lens):
    q, k, v = sample_qkv(2, 2, 103, dtype=torch.float64, seed=4)
    mask = None if lens is None else Document(lens) & Causal()
    options = named(drawn(103)) | {"keep": 7, "config": config, "mask": mask}
    got, want = (fn(q, k, v, **options) for fn in (misa, reference))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_before_the_crossing_all_heads_score():
    index = drawn(203)
    got, flat, cheap = (chosen(index, 13, m) for m in (MISA(2, 8, flat_below=100), None, SMALL))
    assert torch.equal(got[:, :100], flat[:, :100]) and torch.equal(got[:, 100:], cheap[:, 100:])


def test_decoding_with_kept_means_equals_one_call():
    index, pooled = drawn(130), PooledKeys(8)
    whole, at = chosen(index, 13, SMALL), 0
    for size in (100, 1, 1, 7, 1, 20):
        pooled.append(index.k[:, at : at + size])
        at += size
        last = Index(index.q[:, :, at - 1 : at], pooled.keys, index.w[:, :, at - 1 : at])
        assert torch.equal(chosen(last, 13, SMALL, pooled=pooled)[:, 0], whole[:, at - 1, :at])


WRONG = {
    "heads": ({"heads": 0}, "heads: expected an integer of at least 1"),
    "block": ({"block": -1}, "block"),
    "rerank": ({"rerank": -1}, "rerank"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_wrong_sizes_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


def test_leaving_over_too_few_tokens_is_refused():
    with pytest.raises(ValueError, match="rerank: expected at least the keep=13 tokens"):
        index_tokens(drawn(50), keep=13, method=MISA(2, 8, 12))
