"""Cutting and pooling: documents in whole blocks and back, ragged ends, padding that counts for nothing."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from manyheads import Causal, Document
from manyheads.mechanism import select

LENGTHS = ([5, 0, 41, 1, 23], [1], [16, 16], [0, 3, 0], [[7, 9], [0, 16]])


@pytest.mark.parametrize("lens", LENGTHS)
@pytest.mark.parametrize("block", [1, 4, 16])
def test_a_cut_puts_each_document_into_whole_blocks_and_back(generator, lens, block):
    lens = torch.tensor(lens)
    n, batch = int(lens.sum(-1).max()), 2
    x, gate = torch.randn(batch, 3, n, 5, generator=generator), torch.randn(batch, 3, n, generator=generator)
    parts = select.cut(lens, x, gate, block=block)
    rows = lens.reshape(-1, lens.shape[-1]).expand(batch, -1)
    for b in range(batch):
        wanted = [torch.nn.functional.pad(d, (0, 0, 0, -d.shape[1] % block)) for d in x[b].split(rows[b].tolist(), 1)]
        wanted = torch.cat(wanted, 1)
        assert torch.equal(parts.tensors[0][b, :, : wanted.shape[1]], wanted)
        assert not parts.tensors[0][b, :, wanted.shape[1] :].any()
    assert torch.equal(parts.restore(parts.tensors[0]), x) and torch.equal(parts.restore(parts.tensors[1]), gate)
    assert parts.length % block == 0 and parts.lens.shape == lens.shape
    real = parts.key_padding(batch)
    assert real.sum(-1).tolist() == [n] * batch
    assert not parts.tensors[0].movedim(2, 1)[~real].any()


def test_without_documents_a_cut_is_nothing(generator):
    x = torch.randn(1, 2, 7, 3, generator=generator)
    parts = select.cut(None, x, block=4)
    assert parts.tensors[0] is x and parts.restore(x) is x
    assert parts.mask is None and parts.key_padding(3) is None and parts.length == 7


def test_a_cut_passes_gradients_through(generator):
    x = torch.randn(1, 2, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    lens = torch.tensor([2, 7])
    assert torch.autograd.gradcheck(lambda x: select.cut(lens, x, block=4).tensors[0], x)
    assert torch.autograd.gradcheck(lambda x: select.cut(lens, x, block=4).restore(torch.cat((x, x[:, :, :3]), 2)), x)


def test_the_mask_of_a_cut_is_that_of_its_documents():
    parts = select.cut([3, 0, 6], torch.ones(1, 1, 9, 1), block=4)
    assert parts.mask == Document([4, 0, 8])


@pytest.mark.parametrize(("q_block", "k_block"), [(8, 8), (2, 8), (8, 2), (1, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_blocks_that_may_meet_are_those_that_hold_a_visible_pair(q_block, k_block, causal):
    parts = select.cut([5, 0, 17, 8], torch.ones(1, 1, 30, 1), block=8)
    n = parts.length
    mask = parts.mask & Causal() if causal else parts.mask
    pairs = mask.dense(n, n)[0, 0].reshape(n // q_block, q_block, n // k_block, k_block)
    got = select.block_documents(parts, q_block, k_block, causal=causal)
    assert torch.equal(got[0, 0], pairs.any(3).any(1))


@pytest.mark.parametrize(("nq", "nk"), [(12, 12), (5, 12), (12, 5), (1, 33), (9, 9)])
@pytest.mark.parametrize(("q_block", "k_block"), [(4, 4), (1, 4), (8, 3)])
def test_causal_and_own_blocks_follow_the_tokens(nq, nk, q_block, k_block):
    at, keys = torch.arange(nq)[:, None] + nk - nq, torch.arange(nk)

    def blocked(pairs):
        rows = torch.stack([part.any(0) for part in pairs.split(q_block)])
        return torch.stack([part.any(1) for part in rows.split(k_block, 1)], 1)

    assert torch.equal(select.block_causal(nq, nk, q_block, k_block), blocked(keys <= at))
    assert torch.equal(select.own_blocks(nq, nk, q_block, k_block), blocked(keys == at))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [1, 7, 32, 45])
@pytest.mark.parametrize("how", ["mean", "max", "norm"])
def test_a_pool_takes_each_block_by_itself(generator, n, how, dtype):
    x = torch.randn(2, 3, n, 5, generator=generator, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = {
        "mean": lambda part: part.to(wide).mean(2),
        "max": lambda part: part.amax(2).to(wide),
        "norm": lambda part: part.to(wide).mean(2) * part.shape[2] ** 0.5,
    }[how]
    got = select.pool(x, 8, how)
    assert got.dtype == wide
    torch.testing.assert_close(got, torch.stack([plain(part) for part in x.split(8, 2)], 2))


@pytest.mark.parametrize("how", ["mean", "max", "norm"])
def test_padding_counts_for_nothing_whatever_it_holds(generator, how):
    lens = [5, 0, 12, 1]
    x = torch.randn(1, 2, 18, 3, generator=generator)
    parts = select.cut(lens, x, block=4)
    poisoned = parts.tensors[0].masked_fill(~parts.real[:, None, :, None], float("nan"))
    got = select.pool(poisoned, 4, how, real=parts.real)
    alone = [select.pool(document, 4, how) for document in x.split(lens, 2) if document.shape[2]]
    torch.testing.assert_close(got, torch.cat(alone, 2))


def test_a_block_without_tokens_pools_to_zero():
    real = torch.tensor([[True, True, False, False]])
    for how in ("mean", "max", "norm"):
        assert not select.pool(torch.ones(1, 1, 4, 2), 2, how, real=real)[0, 0, 1].any()


def test_heads_pooled_in_parts_are_the_same(generator, monkeypatch):
    x = torch.randn(2, 5, 21, 4, generator=generator)
    whole = select.pool(x, 8)
    monkeypatch.setattr("manyheads.mechanism.select.blocks._CACHED", 200)
    assert torch.equal(select.pool(x, 8), whole)


@pytest.mark.parametrize("how", ["mean", "max", "norm"])
def test_pools_and_scores_are_differentiable(generator, how):
    q = torch.randn(1, 4, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 9, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    for share in ("group", "head"):
        assert torch.autograd.gradcheck(
            lambda q, k, s=share: select.pooled_scores(q, k, q_block=4, k_block=2, how=how, share=s), (q, k)
        )


@pytest.mark.parametrize("scale", [None, 0.3, 0.0])
def test_scores_are_products_of_pools(generator, scale):
    q, k = torch.randn(2, 6, 21, 4, generator=generator), torch.randn(2, 2, 30, 4, generator=generator)
    got = {s: select.pooled_scores(q, k, q_block=8, k_block=4, share=s, scale=scale) for s in ("group", "head")}
    pooled = select.pool(q, 8), select.pool(k, 4).repeat_interleave(3, 1)
    torch.testing.assert_close(got["head"], pooled[0] @ pooled[1].mT * (0.5 if scale is None else scale))
    torch.testing.assert_close(got["group"], got["head"].unflatten(1, (2, 3)).mean(2))


def test_the_mean_of_a_block_of_scores_is_the_score_of_the_means(generator):
    q, k = torch.randn(1, 1, 16, 4, generator=generator), torch.randn(1, 1, 16, 4, generator=generator)
    scores = (q @ k.mT * 0.5).unflatten(3, (4, 4)).mean(4).unflatten(2, (4, 4)).mean(3)
    torch.testing.assert_close(select.pooled_scores(q, k, q_block=4, k_block=4), scores)


def test_cut_pool_and_scores_compile_to_one_graph_and_new_lengths_compile_nothing(generator):
    def run(x, lens):
        parts = select.cut(lens, x, block=4)
        scores = select.pooled_scores(*parts.tensors * 2, q_block=4, k_block=4, real=parts.real)
        ids = select.top_k(scores, 2, visible=select.block_documents(parts, 4, 4), force=select.Forced(first=1))
        return parts.restore(parts.tensors[0]), ids

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    x = torch.randn(1, 2, 30, 4, generator=generator)
    for lens in ([5, 17, 8], [30, 0, 0], [1, 28, 1]):
        (same, ids), (_, wanted) = compiled(x, torch.tensor(lens)), run(x, torch.tensor(lens))
        assert torch.equal(same, x) and torch.equal(ids[:, :, : wanted.shape[2]], wanted)
        assert (ids[:, :, wanted.shape[2] :] == -1).all()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: select.cut([5], x, block=0), ValueError, "block: expected at least 1"),
        (lambda x: select.cut([5], x, block=2.0), TypeError, "block: expected a number of tokens"),
        (lambda x: select.cut([4], x, block=2), ValueError, "lens: .* sum to the 5 tokens"),
        (lambda x: select.cut([6, -1], x, block=2), ValueError, "lens: "),
        (lambda x: select.cut([5], block=2), ValueError, "tensors: expected at least one"),
        (lambda x: select.cut([5], x, x[:, :, :4], block=2), ValueError, r"tensors\[1\]: expected 5 tokens"),
        (lambda x: select.cut([5], x, block=2).restore(x), ValueError, "x: expected 6 tokens"),
        (lambda x: select.pool(x, -3), ValueError, "block: expected at least 1"),
        (lambda x: select.pool(x, 2, "median"), ValueError, "unknown way of pooling 'median'"),
        (lambda x: select.pooled_scores(x, x, q_block=2, k_block=0), ValueError, "block: expected at least 1"),
        (lambda x: select.pooled_scores(x, x[:, :2], q_block=2, k_block=2), ValueError, "q: its 3 heads"),
        (lambda x: select.pooled_scores(x, x, q_block=2, k_block=2, share="heads"), ValueError, "did you mean 'head'"),
        (lambda x: select.block_causal(5, 5, 0, 2), ValueError, "q_block: expected at least 1"),
        (lambda x: select.block_causal(5, 5, 2, 0), ValueError, "k_block: expected at least 1"),
        (
            lambda x: select.block_documents(select.cut([5], x, block=4), 4, 3),
            ValueError,
            "k_block: expected a divisor of the block=4",
        ),
    ],
)
def test_wrong_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(1, 3, 5, 2))
