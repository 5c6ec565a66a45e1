"""How tokens are dealt to ranks: nothing lost, counts nearly equal, areas exact, balance as promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.mask import Causal, Document, Full, PerHead, Window
from manyheads.mask.sampling import document_lengths
from manyheads.parallel.areas import key_uses, query_areas
from manyheads.parallel.deal import DEALS, Deal, balanced, contiguous, deal, nearby, per_document, striped, zigzag

CORPORA = ("pile", "prolong64k", "prolong512k")


def packed(n, seed=0):
    """A causal mask over documents of short random lengths that sum to ``n``."""
    return Causal() & Document(document_lengths(n, {(1, max(2, n // 3)): 1.0}, seed=seed))


@given(
    name=st.sampled_from(list(DEALS)),
    n=st.integers(1, 300),
    world=st.integers(1, 17),
    chunk=st.none() | st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_every_token_is_dealt_once_and_counts_differ_by_at_most_a_chunk(name, n, world, chunk, seed):
    found = DEALS[name](packed(n, seed), n, world, chunk)
    assert sum(found.counts) == n and found.world == world
    assert max(found.counts) - min(found.counts) <= found.chunk
    x = torch.randn(2, n, 3)
    parts = [found.shard(x, rank) for rank in range(world)]
    assert [part.shape[1] for part in parts] == list(found.counts)
    assert torch.equal(found.unshard(parts), x)
    assert all(torch.equal(found.owner[found.index(r)], torch.full((c,), r)) for r, c in enumerate(found.counts))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_zigzag_is_undone_exactly(world):
    n = 2 * world * 7
    found = zigzag(n, world)
    q = torch.randn(2, 3, n, 5)
    parts = [found.shard(q, rank) for rank in range(world)]
    assert torch.equal(found.unshard(parts), q)
    blocks = q.chunk(2 * world, dim=-2)
    for rank, part in enumerate(parts):
        assert torch.equal(part, torch.cat([blocks[rank], blocks[2 * world - 1 - rank]], dim=-2))


@pytest.mark.parametrize("world", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("times", [1, 5, 31])
def test_zigzag_gives_every_rank_the_same_causal_area(world, times):
    n = 2 * world * times
    assert set(zigzag(n, world).areas(Causal())) == {n * (n + 1) // 2 // world}


def test_a_stripe_is_every_worldth_token():
    found = striped(11, 3)
    assert [found.index(rank).tolist() for rank in range(3)] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8]]


def test_documents_are_dealt_by_mirrored_pairs():
    found = per_document(Document([12, 4, 8]), 24, 2, chunk=2)
    assert found.chunks == ((0, 2, 3, 5, 8, 11), (1, 4, 6, 7, 9, 10))
    assert per_document([16], 16, 2, chunk=4).chunks == zigzag(16, 2).chunks


@given(
    n=st.integers(2, 90),
    world=st.integers(1, 6),
    name=st.sampled_from(list(DEALS)),
    seed=st.integers(0, 99),
    window=st.integers(1, 30),
)
def test_areas_are_those_of_the_dense_mask(n, world, name, seed, window):
    mask = packed(n, seed) & Window(window)
    found = DEALS[name](mask, n, world, None)
    rows = mask.dense(n)[0, 0].sum(-1)
    assert found.areas(mask) == tuple(int(rows[found.index(rank)].sum()) for rank in range(world))


def test_areas_count_every_head_and_batch_entry():
    mask = PerHead([Causal(), Full(), Window(3)])
    found = contiguous(50, 4)
    seen = mask.dense(50)
    assert sum(found.areas(mask)) == int(seen.sum())
    layout = mask.tiles(50, 50, tile=(16, 16), heads=3)
    assert query_areas(layout).tolist() == seen.sum((0, 1, 3)).tolist()
    assert key_uses(layout).tolist() == seen.sum((0, 1, 2)).tolist()


@pytest.mark.parametrize("world", [8, 64])
def test_balanced_is_within_five_percent_on_thirty_mixes_of_documents(world):
    n = world * 8192
    worst = dict.fromkeys(("balanced", "nearby", "zigzag", "contiguous"), 1.0)
    for seed in range(30):
        mask = Causal() & Document(document_lengths(n, CORPORA[seed % 3], seed=seed))
        for name in worst:
            worst[name] = max(worst[name], DEALS[name](mask, n, world, None).imbalance(mask))
    assert worst["balanced"] <= 1.05 and worst["nearby"] <= 1.05
    assert worst["zigzag"] > 1.5 and worst["contiguous"] > 2


def test_balanced_splits_a_few_rows_that_see_everything():
    n, world = 64 * 1024, 64
    mask = Window(5) | Causal() & ~Document([n - 2048, 2048])  # 2048 rows see all that was before them
    found = balanced(mask, n, world)
    assert found.imbalance(mask) <= 1.05 < balanced(mask, n, world, chunk=64).imbalance(mask)


def test_a_given_chunk_is_kept():
    mask = packed(1000)
    assert balanced(mask, 1000, 4, chunk=125).chunk == 125 and nearby(mask, 1000, 4, chunk=50).chunk == 50


def test_a_million_tokens_are_dealt_from_the_layout_alone():
    n, world = 1 << 20, 64
    mask = Causal() & Document(document_lengths(n, seed=5))
    found = balanced(mask, n, world)
    layout = mask.tiles(n, n)
    assert sum(found.areas(layout)) == layout.pairs
    assert found.imbalance(layout) <= 1.02
    assert layout.nbytes < 1 << 26


def test_equal_deals_are_equal_values():
    a, b = Deal(12, 2, ((0, 2, 4), [5, 3, 1])), Deal(12, 2, (range(0, 6, 2), (1, 3, 5)))
    assert a == b and hash(a) == hash(b) and a != striped(12, 2)
    assert striped(6, 2).chunks == (range(0, 6, 2), range(1, 6, 2))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: deal("balansed", Causal(), 8, 2), "did you mean 'balanced'"),
        (lambda: deal("balanced", None, 8, 2), "mask"),
        (lambda: deal(zigzag(8, 2), None, 9, 2), "expected 9 tokens on 2 ranks"),
        (lambda: zigzag(0, 2), "n: expected a positive"),
        (lambda: zigzag(4, 2, chunk=0), "chunk: expected a positive"),
        (lambda: per_document(Causal(), 8, 2), "documents"),
        (lambda: per_document([3, 4], 8, 2), "8 tokens"),
        (lambda: Deal(8, 2, ((0, 1), (2,))), "each of 0 to 3"),
        (lambda: Deal(8, 2, ((0, 1, 2), (3,))), "difference of at most 2"),
        (lambda: zigzag(8, 2).index(2), "rank: expected 0 to 1"),
        (lambda: zigzag(8, 2).shard(torch.ones(7), 0, dim=0), "8 tokens along dim 0"),
        (lambda: zigzag(8, 2).unshard([torch.ones(4), torch.ones(3)], dim=0), r"\(4, 4\) tokens"),
        (lambda: zigzag(8, 2).areas(Causal().tiles(9)), "layout of 8 x 8"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("make", [contiguous, zigzag, striped])
def test_a_deal_by_name_is_that_of_the_function(make):
    assert deal(make.__name__, None, 90, 4) == make(90, 4)
    assert deal(make.__name__, None, 90, 4, chunk=3) == make(90, 4, chunk=3)
