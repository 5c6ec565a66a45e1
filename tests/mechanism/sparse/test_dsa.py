"""DeepSeek Sparse Attention: the choice is the definition's whatever the pieces, and attention reads just that."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document, attention
from manyheads.mechanism.sparse import dsa
from manyheads.mechanism.sparse.dsa import reference, selection
from manyheads.mechanism.sparse.indexer import Index, index_scores, index_tokens, scoring, tile, topk
from manyheads.testing import sample_qkv
from tests.mechanism.sparse.indexed import chosen, drawn


def named(index):
    """Index tensors as keyword arguments."""
    return {"index_q": index.q, "index_k": index.k, "index_w": index.w}


def by_definition(index, keep):
    """Scores of all pairs, one query after the other, sorted."""
    scores, found = index_scores(*index), []
    for rows in scores:
        for i, row in enumerate(rows):
            seen = rows.shape[1] - rows.shape[0] + i + 1
            best = row[:seen].argsort(descending=True, stable=True)[:keep].sort().values
            found.append(torch.nn.functional.pad(best, (0, keep - len(best)), value=-1))
    return torch.stack(found).unflatten(0, scores.shape[:2]).int()


@pytest.mark.parametrize("queries", [1, 3, 61, 150])
def test_the_choice_is_that_of_the_definition(queries):
    index = drawn(150, queries)
    assert torch.equal(index_tokens(index, keep=13), by_definition(index, 13))


def test_pieces_and_spans_change_nothing(monkeypatch):
    index = drawn(203, 40)
    want = by_definition(index, 17)
    monkeypatch.setattr(scoring, "PIECE", 7)
    monkeypatch.setattr(scoring, "WIDEST", 64)
    assert torch.equal(index_tokens(index, keep=17), want)
    for span in (18, 50, 170):
        monkeypatch.setattr(tile, "SPAN", span)
        assert torch.equal(index_tokens(index, keep=17), want)


def test_of_equal_scores_the_earlier_token_wins():
    keys = torch.tensor([0, 5, 1, 5, 1, 5, 1, 1, 5.0]).view(1, 9, 1)
    index = Index(torch.ones(1, 2, 9, 1), keys, torch.ones(1, 2, 9))
    assert index_tokens(index, keep=3)[0, -1].tolist() == [1, 3, 5]
    assert index_tokens(index, keep=6)[0, -1].tolist() == [1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("n", [1, 7, 40])
def test_ids_on_a_gpu_and_on_a_cpu_are_found_alike(n):
    scores = torch.randn(11, n, generator=torch.Generator().manual_seed(n)).mul(3).round()
    scores[torch.rand(11, n, generator=torch.Generator().manual_seed(1)) < 0.3] = -torch.inf
    assert torch.equal(topk.top_tokens(scores, 6), topk._by_sorting(scores, 6))


def test_keeping_every_token_is_dense_attention_with_its_gradients():
    q, k, v = sample_qkv(2, 6, 70, kv_heads=1, value_width=5, dtype=torch.float64, seed=1)
    found = []
    for fn, options in ((dsa, named(drawn(70)) | {"keep": 70}), (attention, {"mask": "causal"})):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        result = fn(*leaves, **options, return_lse=True)
        found.append([*result, *torch.autograd.grad(result.out.sin().sum() + result.lse.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_latent_is_key_and_value_of_all_heads():
    q, latent, _ = sample_qkv(2, 6, 90, kv_heads=1, width=12, dtype=torch.float64, seed=2)
    options = named(drawn(90)) | {"keep": 11, "scale": 0.4}
    got, want = (fn(q, latent, latent[..., :8], **options) for fn in (dsa, reference))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_no_token_ahead_and_none_of_another_document_is_chosen():
    q, k, v = sample_qkv(1, 2, 150, seed=3)
    index, lens = drawn(150, batch=1), torch.tensor([40, 0, 1, 109])
    ids = selection(q, k, v, **named(index), keep=9, mask=Document(lens) & Causal())[0, 0]
    at, document = torch.arange(150), torch.repeat_interleave(torch.arange(4), lens)
    assert (ids <= at[:, None]).all()
    assert (document[ids.clamp(min=0)] == document[:, None])[ids >= 0].all()
    count = (at - torch.tensor([0, 40, 40, 41])[document] + 1).clamp(max=9)
    assert torch.equal((ids >= 0).sum(-1), count)


def test_a_token_is_chosen_alike_whichever_queries_come_with_it():
    index = drawn(150)
    whole = chosen(index, 9)
    for start in (1, 77, 149):
        part = Index(index.q[:, :, start:], index.k, index.w[:, :, start:])
        assert torch.equal(chosen(part, 9), whole[:, start:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_are_those_of_float32(dtype):
    index = drawn(300, 20, heads=16, width=32, dtype=dtype, batch=1)
    exact = index_scores(*(t.double() for t in index))[0]
    ids = index_tokens(index, keep=50)[0].long()
    worst, size = exact.gather(1, ids).amin(-1), exact.abs().amax()
    hidden = torch.ones_like(exact, dtype=torch.bool).scatter(1, ids, False) & torch.ones(20, 300).tril(280).bool()
    assert (exact.masked_fill(~hidden, -torch.inf).amax(-1) - worst <= 1e-5 * size).all()


WRONG = {
    "keep": ({"keep": 0}, ValueError, "keep: expected at least one"),
    "keep-bool": ({"keep": True}, ValueError, "keep"),
    "queries": ({"index_q": torch.ones(2, 6, 9, 8)}, ValueError, "index_w"),
    "width": ({"index_k": torch.ones(2, 70, 4)}, ValueError, "index_k: expected shape"),
    "keys": ({"index_k": torch.ones(2, 60, 8)}, ValueError, "index_k: expected B=2 and 70 tokens"),
    "rank": ({"index_k": torch.ones(2, 1, 70, 8)}, ValueError, "index_k: expected 3 dimensions"),
    "weights": ({"index_w": torch.ones(2, 6, 71)}, ValueError, "index_w"),
    "dtype": ({"index_k": torch.ones(2, 70, 8).double()}, TypeError, "index_k: expected the dtype of index_q"),
    "integers": ({"index_q": torch.ones(2, 6, 70, 8).long()}, TypeError, "index_q: expected a floating"),
}


@pytest.mark.parametrize(("change", "error", "words"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_by_name(change, error, words):
    q, k, v = sample_qkv(2, 6, 70, seed=0)
    with pytest.raises(error, match=words):
        dsa(q, k, v, **named(drawn(70, dtype=torch.float32)) | {"keep": 5} | change)
