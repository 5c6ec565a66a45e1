"""What the indexers share: the operator, the ways of a GPU, and the structured input of the benchmark."""

from __future__ import annotations

import pytest
import torch

from manyheads.mechanism.sparse import HISA, MISA
from manyheads.mechanism.sparse.indexer import (
    TUNINGS,
    Index,
    clustered_index,
    flat_scan_of,
    index_of_heads,
    index_scores,
    index_tokens,
    op,
    recall,
    scoring,
    tile,
    topk,
)
from tests.mechanism.sparse.indexed import drawn

METHODS = {
    "flat": None,
    "hisa": HISA(8, 4, flat_below=30),
    "misa": MISA(2, 8, flat_below=30),
    "rerank": MISA(2, 8, 40, flat_below=0),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("queries", [3, 203])
def test_a_gpu_would_choose_alike(monkeypatch, method, queries):
    index = drawn(203, queries)
    want = index_tokens(index, keep=13, method=method)
    monkeypatch.setattr(topk, "on_host", lambda x: False)
    monkeypatch.setattr(tile, "GATHERED", 100)
    assert torch.equal(index_tokens(index, keep=13, method=method), want)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_operator_keeps_to_its_schema(method):
    index, lens = drawn(60, dtype=torch.float32), torch.tensor([20, 0, 40])
    how, options = ("flat", [-1]) if method is None else method.call(7)
    tests = ("test_schema", "test_faketensor")
    for given in (None, lens):
        torch.library.opcheck(op.op, (*index, None, given, 7, how, options), test_utils=tests)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_documents_of_each_batch_entry_are_chosen_from_alone(method):
    index, lens = drawn(60), torch.tensor([[20, 0, 40], [7, 50, 3]])
    got = index_tokens(index, keep=7, method=method, lens=lens)
    for b in range(2):
        start = 0
        for n in lens[b].tolist():
            rows = slice(start, start + n)
            one = Index(index.q[b : b + 1, :, rows], index.k[b : b + 1, rows], index.w[b : b + 1, :, rows])
            alone = index_tokens(one, keep=7, method=method)[0]
            assert torch.equal(got[b, rows], alone.where(alone < 0, alone + start))
            start += n


def test_every_tuning_of_the_flat_scan_chooses_alike_and_is_undone():
    index, before = drawn(203, dtype=torch.float64), (op.TILE["flat"], scoring.PIECE)
    want = index_tokens(index, keep=13)
    for tuning in TUNINGS:
        with flat_scan_of(*tuning):
            assert torch.equal(index_tokens(index, keep=13), want)
    assert (op.TILE["flat"], scoring.PIECE) == before


@pytest.mark.parametrize("spread", [0.25, 2.0])
def test_clustered_keys_have_the_stated_spread(spread):
    keys = clustered_index(4000, 2, width=32, topics=6, run=100, spread=spread).k[0]
    # neighbours share a centre but at the borders of runs, so that their difference is noise
    near = (keys[1:] - keys[:-1]).square().mean(-1).median().div(2).sqrt()
    assert abs(float(near) / spread - 1) < 0.1


def test_recall_counts_tokens_found_among_those_wanted():
    wanted = torch.tensor([[[1, 4, 6, -1], [0, -1, -1, -1]]])
    assert recall(wanted, torch.tensor([[[4, 6], [0, 3]]])) == 0.75
    assert recall(wanted, wanted) == 1.0
    assert recall(wanted, torch.full((1, 2, 1), -1)) == 0.0


def test_heads_as_an_indexer_score_rectified_attention():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 9, 4, generator=generator), torch.randn(2, 3, 12, 4, generator=generator)
    got = index_scores(*index_of_heads(q, k))
    torch.testing.assert_close(got, (q @ k.mT / 2).relu().mean(1))
