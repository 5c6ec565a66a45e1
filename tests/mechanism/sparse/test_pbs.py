"""Permuted block-sparse attention: any order is the same when all is kept, and sorting saves blocks."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document
from manyheads.mechanism import exact, select
from manyheads.mechanism.sparse import pbs as _exported
from manyheads.mechanism.sparse.pbs import PBS, key_scores, pbs, plain_choice, selection, visited_tiles

SMALL = PBS(block=4, segment=16, mass=0.6)


def sample(n, generator, *, heads=4, kv_heads=2, width=16, dtype=torch.float64):
    """Queries, keys, values."""
    shapes = [(2, h, n, width) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def needles(n, generator, *, segment, heavy, width=16):
    """Keys of which a few, scattered over every segment, are what all queries look for."""
    q, k, v = sample(n, generator, heads=2, kv_heads=2, width=width)
    want = torch.nn.functional.normalize(torch.randn(width, generator=generator, dtype=torch.float64), dim=0)
    at = torch.cat([torch.randperm(segment, generator=generator)[:heavy] + s for s in range(0, n, segment)])
    k[:, :, at[at < n]] += 9 * want
    return q + 2 * want, k, v


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 91])
def test_keeping_all_is_dense_for_any_order(n, generator, monkeypatch):
    q, k, v = sample(n, generator)
    want = exact.reference(q, k, v, mask="causal", return_lse=True)

    def check():
        got = pbs(q, k, v, config=PBS(block=4, segment=16, mass=1.0), return_lse=True)
        torch.testing.assert_close(got.out, want.out, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-11, atol=1e-11)

    check()
    shuffled = torch.rand(2, 4, n, generator=generator, dtype=torch.float64)
    monkeypatch.setitem(pbs.__globals__, "key_scores", lambda *args, **options: shuffled)
    check()


def test_later_tokens_reach_earlier_ones_through_the_choice_only(generator):
    q, k, v = sample(96, generator)
    later = slice(60, None)
    changed = [t.clone() for t in (q, k, v)]
    for t in changed:
        t[:, :, later] = torch.randn(t[:, :, later].shape, generator=generator, dtype=t.dtype) * 3
    everything = PBS(block=4, segment=16, mass=1.0)
    before, after = (pbs(*some, config=everything)[:, :, :60] for some in ((q, k, v), changed))
    torch.testing.assert_close(before, after, rtol=1e-11, atol=1e-11)
    pairs = [select.pairs(selection(*some, config=SMALL), q, k)[:, :, :60] for some in ((q, k, v), changed)]
    assert not torch.equal(*pairs)  # the choice itself saw them
    assert not any((p & ~torch.ones(60, 96).tril().bool()).any() for p in pairs)


@pytest.mark.parametrize("permute", [True, False])
def test_the_first_token_is_always_seen(permute, generator):
    q, k, v = sample(90, generator)
    k[:, :, 0] = -20 * q.mean((1, 2))[:, None]  # nobody would choose it
    kept = select.pairs(selection(q, k, v, config=PBS(block=4, segment=16, mass=0.1, permute=permute)), q, k)
    assert kept[..., 0].all()
    assert not kept[:, :, 40:, 1:16].all()


@pytest.mark.parametrize("heavy", [4, 6])
def test_heavy_keys_that_are_scattered_need_fewer_blocks_when_sorted(heavy, generator):
    q, k, v = needles(256, generator, segment=32, heavy=heavy)
    s = (q @ k.mT / 4).masked_fill(~torch.ones(256, 256).tril().bool(), -torch.inf).softmax(-1)

    def visited(permute, least):
        """Fewest tiles that keep a share of the attention, over the choice's own parameter."""
        found = []
        for mass in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0):
            config = PBS(block=4, segment=32, mass=mass, permute=permute)
            share = (s * select.pairs(selection(q, k, v, config=config), q, k)).sum(-1).mean()
            found += [visited_tiles(q, k, config=config)] if share >= least else []
        return min(found)

    for least in (0.8, 0.9):
        assert visited(True, least) < visited(False, least)


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("mass", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("n", [33, 77])
def test_the_pairs_are_those_of_the_plain_rule(n, mass, permute, generator):
    config = PBS(block=4, segment=8, mass=mass, permute=permute)
    q, k, v = sample(n, generator)
    chosen = selection(q, k, v, config=config)
    want = plain_choice(q, k.repeat_interleave(2, 1), config) & torch.ones(n, n).tril().bool()
    assert torch.equal(select.pairs(chosen, q, k), want)
    select.check_permutation(chosen.order, segment=8)
    torch.testing.assert_close(pbs(q, k, v, config=config), exact.reference(q, k, v, mask=want), rtol=1e-11, atol=1e-11)


def test_keys_are_sorted_by_the_last_block_of_queries(generator):
    q, k, _ = sample(70, generator)
    got = key_scores(q, k, SMALL)
    want = (q[:, :, -4:] @ k.repeat_interleave(2, 1)[:, :, :64].mT / 4).softmax(-1).mean(2)
    torch.testing.assert_close(got[..., :64], want, rtol=1e-11, atol=1e-11)
    assert (got[..., 64:] == 0).all()
    order = selection(q, k, k, config=SMALL).order
    ranked = got.gather(-1, order)[..., :64].unflatten(-1, (4, 16))
    assert (ranked.diff(dim=-1) <= 0).all() and torch.equal(order[..., 64:], torch.arange(64, 70).expand(2, 4, 6))


def test_documents_are_sorted_each_by_itself(generator):
    q, k, v = (t[:1] for t in sample(100, generator))
    packed = pbs(q, k, v, mask=Document([39, 0, 61]) & Causal(), config=SMALL)
    looped = [pbs(*(t[:, :, a:b] for t in (q, k, v)), config=SMALL) for a, b in ((0, 39), (39, 100))]
    torch.testing.assert_close(packed, torch.cat(looped, 2), rtol=1e-11, atol=1e-11)


def test_visited_tiles_are_those_of_the_layout_where_nothing_is_sorted(generator):
    q, k, v = sample(90, generator)
    config = PBS(block=4, segment=16, mass=0.6, permute=False)
    layout = selection(q, k, v, config=config).layout
    assert visited_tiles(q, k, config=config) == layout.visited
    document = Document([90]) & Causal()
    assert visited_tiles(q[:1], k[:1], config=config, mask=document) == visited_tiles(q[:1], k[:1], config=config)


def test_it_is_exported():
    assert _exported is pbs


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": 0}, "block: .*got 0"),
        ({"block": 16, "segment": 24}, "segment: expected a multiple of block=16, got 24"),
        ({"mass": 0.0}, "mass: .*got 0.0"),
        ({"mass": 1.5}, "mass: .*got 1.5"),
    ],
)
def test_wrong_sizes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        PBS(**options)
