"""HISA: where its candidates hold the flat choice it is the flat choice, and never looks ahead."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from manyheads import Causal, Document
from manyheads.mechanism.sparse.hisa import HISA, hisa, reference, selection
from manyheads.mechanism.sparse.indexer import Index, PooledKeys, hierarchical, index_tokens
from manyheads.mechanism.sparse.indexer.crossing import crossing
from manyheads.mechanism.sparse.indexer.scoring import index_scores
from manyheads.testing import sample_qkv
from tests.mechanism.sparse.indexed import chosen, drawn, recall
from tests.mechanism.sparse.test_dsa import named

SMALL = HISA(block=8, blocks=4, flat_below=0)


def test_a_short_prefix_is_taken_whole():
    index = drawn(203)
    seen = chosen(index, 25, SMALL)
    assert torch.equal(seen[:, :25], torch.ones(25, 203).tril().bool().expand(2, -1, -1))
    assert (seen[:, 25:].sum(-1) == 25).all()


def test_where_the_candidates_hold_the_prefix_the_choice_is_flat():
    index = drawn(203)
    held = SMALL.block * SMALL.blocks
    got, flat = chosen(index, 13, SMALL), chosen(index, 13)
    assert torch.equal(got[:, :held], flat[:, :held])
    assert not torch.equal(got[:, held:], flat[:, held:])


@pytest.mark.parametrize("queries", [1, 3, 40, 203])
def test_all_blocks_give_the_flat_choice(queries):
    index = drawn(203, queries)
    assert torch.equal(chosen(index, 13, HISA(8, 26, flat_below=0)), chosen(index, 13))


def test_first_and_own_block_are_candidates_and_nothing_lies_ahead(monkeypatch):
    index, found = drawn(203, batch=1), []

    def noted(tile, *args):
        blocks = candidates(tile, *args)
        found.extend(zip((tile.seen - 1).tolist(), blocks.tolist(), strict=True))
        return blocks

    candidates = hierarchical.candidates
    monkeypatch.setattr(hierarchical, "candidates", noted)
    assert not chosen(index, 13, SMALL).triu(1).any()
    assert len(found) > 150
    for t, blocks in found:
        listed = [b for b in blocks if b >= 0]
        assert listed[0] == 0 and listed[-1] == t // 8
        assert listed == sorted(set(listed)) and len(listed) == min(4, t // 8 + 1)


def test_blocks_of_one_token_give_the_flat_choice_up_to_the_forced_tokens():
    index = drawn(120)
    got = chosen(index, 12, HISA(block=1, blocks=12, flat_below=0))
    scores = index_scores(*index).masked_fill(torch.ones(120, 120).triu(1).bool(), -torch.inf)
    scores[..., 0] = torch.inf
    scores.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    want = (rank < 12) & (scores > -torch.inf)
    assert torch.equal(got, want)
    flat = chosen(index, 12)
    both = flat[..., 0] & flat.diagonal(dim1=1, dim2=2)  # here the forced tokens were chosen anyway
    assert both.sum() > 12 and torch.equal(got[both], flat[both])


@pytest.mark.parametrize("keep", [32, 40])
def test_keeping_every_candidate_is_attention_to_whole_blocks(keep):
    q, k, v = sample_qkv(2, 2, 203, dtype=torch.float64, seed=4)
    config = HISA(8, keep // 8, flat_below=0)
    options = named(drawn(203)) | {"keep": keep, "config": config}
    got, want = (fn(q, k, v, **options) for fn in (hisa, reference))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    seen = chosen(drawn(203), keep, config)[:, 202, :200].unflatten(-1, (25, 8))
    assert torch.equal(seen.all(-1), seen.any(-1)) and (seen.any(-1).sum(-1) == keep // 8 - 1).all()


@pytest.mark.parametrize("config", [SMALL, HISA(8, 1, flat_below=0), HISA(5, 6, flat_below=90), HISA(8, 4)])
@pytest.mark.parametrize("lens", [None, [50, 1, 0, 152]])
def test_the_choice_is_that_of_the_definition(config, lens):
    q, k, v = sample_qkv(2, 2, 203, dtype=torch.float64, seed=4)
    mask = None if lens is None else Document(lens) & Causal()
    options = named(drawn(203)) | {"keep": 7, "config": config, "mask": mask}
    got, want = (fn(q, k, v, **options) for fn in (hisa, reference))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("wasted", [0, 5, 1000])
@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("strip", [1, 100])
def test_how_blocks_are_scored_together_changes_nothing(monkeypatch, wasted, few, strip):
    index = drawn(203, 90)
    want = chosen(index, 13, SMALL)
    for name, value in (("STEP", wasted), ("FEW", few), ("STRIP", strip)):
        monkeypatch.setattr(hierarchical, name, value)
    assert torch.equal(chosen(index, 13, SMALL), want)


@pytest.mark.parametrize("queries", [5, 20, 70])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_every_wanted_block_is_scored_once_for_each_query(queries, share):
    wanted = np.random.default_rng(0).random((queries, 31)) < share
    scored = np.zeros(wanted.shape, dtype=int)
    order, steps = hierarchical.plan(wanted)
    for start, stop, rows in steps:
        scored[np.ix_(np.arange(queries) if rows is None else rows, order[start:stop])] += 1
    assert (scored[wanted] == 1).all() and scored.max() == 1
    assert scored.sum() <= wanted.sum() + hierarchical.STEP * 31 or queries <= hierarchical.FEW


def test_before_the_crossing_the_scan_is_flat():
    index = drawn(203)
    config = HISA(8, 4, flat_below=100)
    got, flat, cheap = chosen(index, 13, config), chosen(index, 13), chosen(index, 13, SMALL)
    assert torch.equal(got[:, :100], flat[:, :100]) and torch.equal(got[:, 100:], cheap[:, 100:])
    assert not torch.equal(flat[:, 60:100], cheap[:, 60:100])
    assert crossing("hisa", 2048, HISA().call(2048)[1]) >= HISA().block * HISA().blocks


def test_decoding_with_kept_means_equals_one_call():
    index, pooled = drawn(130, batch=2), PooledKeys(8)
    whole, at = chosen(index, 13, SMALL), 0
    for size in (100, 1, 1, 7, 1, 20):
        pooled.append(index.k[:, at : at + size])
        at += size
        last = Index(index.q[:, :, at - 1 : at], pooled.keys, index.w[:, :, at - 1 : at])
        assert torch.equal(chosen(last, 13, SMALL, pooled=pooled)[:, 0], whole[:, at - 1, :at])


def test_kept_means_are_those_of_the_tokens_so_far():
    keys, pooled = drawn(77).k, PooledKeys(8)
    for part in keys.split([0, 3, 5, 1, 30, 38], dim=1):
        pooled.append(part)
        so_far = keys[:, : len(pooled)]
        assert torch.equal(pooled.keys, so_far)
        if len(pooled):
            want = torch.stack([block.mean(1) for block in so_far.split(8, dim=1)], 1)
            torch.testing.assert_close(pooled.means, want)


def test_the_flat_choice_is_found_among_clustered_keys():
    generator = torch.Generator().manual_seed(0)
    topics = torch.randn(12, 16, generator=generator)
    topic = torch.randint(12, (40,), generator=generator).repeat_interleave(16)
    keys = topics[topic] + 0.3 * torch.randn(640, 16, generator=generator)
    query = topics[torch.randint(12, (1, 4, 1), generator=generator)].expand(1, 4, 50, 16)
    query = query + 0.3 * torch.randn(1, 4, 50, 16, generator=generator)
    index = Index(query, keys[None], torch.rand(1, 4, 50, generator=generator))
    found = recall(index, 64, HISA(16, 16, flat_below=0))
    assert found > 0.95
    assert found > recall(index, 64, HISA(16, 6, flat_below=0))


WRONG = {
    "block": ({"block": 0}, "block: expected an integer of at least 1"),
    "blocks": ({"blocks": 0}, "blocks"),
    "flat_below": ({"flat_below": -3}, "flat_below"),
    "fraction": ({"block": 8.0}, "block"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_wrong_sizes_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **change)


def test_more_tokens_than_the_candidates_hold_are_refused():
    with pytest.raises(ValueError, match="keep: expected at most the tokens of the candidate blocks, got 33"):
        index_tokens(drawn(50), keep=33, method=SMALL)
    q, k, v = sample_qkv(1, 1, 50)
    with pytest.raises(ValueError, match="keep"):
        selection(q, k, v, **named(drawn(50, batch=1)), keep=33, config=SMALL)


def test_wrong_keys_in_a_cache_are_refused():
    index, pooled = drawn(50), PooledKeys(8)
    pooled.append(index.k[:, :40])
    with pytest.raises(ValueError, match="pooled: expected 50 keys in blocks of 8, got 40"):
        index_tokens(index, keep=5, method=SMALL, pooled=pooled)
    with pytest.raises(ValueError, match=r"keys: expected shape \(B=2, T, D=8\)"):
        pooled.append(index.k[:1])
    with pytest.raises(ValueError, match="block"):
        PooledKeys(0)
