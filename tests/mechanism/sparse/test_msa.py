"""MiniMax sparse attention: its dense limit, the exp-free choice, the gradient that teaches the index, documents."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from manyheads import Causal, Document, attention
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.select import pairs
from manyheads.mechanism.sparse import MSAConfig, msa, train_msa
from manyheads.mechanism.sparse.msa import reference, selection

F64 = torch.float64
SMALL = MSAConfig(block=16, keep=3)
PACKED = [5, 0, 41, 1, 28]


def close(got, want, size=1e-9):
    torch.testing.assert_close(got, want, rtol=size, atol=size)


def draw(generator, n=75, heads=4, groups=2, width=8, batch=2, grad=False):
    """Queries, keys, values, and the queries and keys of the index."""

    def normal(*shape):
        return torch.randn(batch, *shape, generator=generator, dtype=F64).requires_grad_(grad)

    qkv = [normal(heads, n, width), normal(groups, n, width), normal(groups, n, width + 2)]
    return qkv, {"index_q": normal(groups, n, 5), "index_k": normal(n, 5)}


def with_grads(fn, qkv):
    """Output, lse and the gradients of a fixed sum of them."""
    out, lse = fn(*qkv)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)).sum() + lse.sum()
    return out, lse, *torch.autograd.grad(loss, qkv)


@pytest.mark.parametrize("order", ["queries", "keys"])
def test_all_blocks_kept_is_causal_attention(generator, order):
    qkv, index = draw(generator, grad=True)
    config = dataclasses.replace(SMALL, keep=5)
    want = with_grads(lambda *t: attention(*t, mask="causal", return_lse=True), qkv)
    got = with_grads(lambda *t: msa(*t, **index, config=config, order=order, return_lse=True), qkv)
    for one, other in zip(got, want, strict=True):
        close(one, other)


@pytest.mark.parametrize("order", ["queries", "keys"])
def test_both_orders_are_the_plain_mechanism(generator, order):
    qkv, index = draw(generator, grad=True)
    want = with_grads(lambda *t: reference(*t, **index, config=SMALL, return_lse=True), qkv)
    got = with_grads(lambda *t: msa(*t, **index, config=SMALL, order=order, return_lse=True), qkv)
    for one, other in zip(got, want, strict=True):
        close(one, other)


def test_raw_scores_choose_what_their_softmax_would(generator):
    qkv, index = draw(generator, 130)
    ids = selection(*qkv, **index, config=SMALL).ids
    scores = index["index_q"] @ index["index_k"][:, None].mT * 5**-0.5
    weights = scores.masked_fill(~torch.ones(130, 130).tril().bool(), -torch.inf).softmax(-1)
    best = torch.stack([part.amax(-1) for part in weights.split(16, -1)], -1)
    for b, g, t in itertools.product(range(2), range(2), range(130)):
        own = t // 16
        rest = sorted(range(own), key=lambda n: -float(best[b, g, t, n]))[:2]
        assert sorted([own, *rest]) == [i for i in ids[b, g, t].tolist() if i >= 0]


def divergence(qkv, index, seen):
    """The loss by its definition, from every pair."""
    q, k, _ = qkv
    scores = (q @ k.repeat_interleave(2, 1).mT * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
    teacher = scores.softmax(-1).unflatten(1, (2, 2)).mean(2).detach()
    student = (index["index_q"] @ index["index_k"][:, None].mT * 5**-0.5).masked_fill(~seen[:, ::2], -torch.inf)
    each = torch.where(teacher > 0, teacher * (teacher.log() - student.log_softmax(-1)), 0.0)
    return each.sum(-1).mean()


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("warm", [False, True], ids=["sparse", "warm"])
def test_the_gradient_of_the_index_is_that_of_the_divergence(generator, warm, packed):
    qkv, index = draw(generator, batch=1 if packed else 2, grad=True)
    mask = Document(PACKED) & Causal() if packed else Causal()
    found = train_msa(*qkv, **index, config=SMALL, mask=mask, warm=warm)
    seen = mask.dense(75, 75)
    if not warm:
        seen = seen & pairs(selection(*qkv, **index, config=SMALL, mask=mask), *qkv[:2])
    want = divergence(qkv, index, seen.expand(qkv[0].shape[0], 4, -1, -1))
    close(found.loss, want)
    mine, exact = (torch.autograd.grad(loss, list(index.values()), retain_graph=True) for loss in (found.loss, want))
    for one, other in zip(mine, exact, strict=True):
        assert other.any()
        close(one, other)
    none = torch.autograd.grad(found.loss, qkv, allow_unused=True, retain_graph=True)
    assert none == (None, None, None)
    assert torch.autograd.grad(found.out.sum(), list(index.values()), allow_unused=True) == (None, None)


def test_a_training_step_computes_what_a_call_does_and_the_warm_up_all_pairs(generator):
    qkv, index = draw(generator)
    close(train_msa(*qkv, **index, config=SMALL).out, msa(*qkv, **index, config=SMALL), 0)
    close(train_msa(*qkv, **index, config=SMALL, warm=True).out, attention(*qkv, mask="causal"))


def test_following_the_gradient_brings_the_index_to_attention(generator):
    # with as many channels as there are keys an index can be any attention of one head
    (q, k, v), _ = draw(generator, 24, heads=2, batch=1)
    index_q = torch.zeros(1, 2, 24, 24, dtype=F64, requires_grad=True)
    index_k = torch.eye(24, dtype=F64)[None]
    first = None
    for _ in range(200):
        loss = train_msa(q, k, v, index_q=index_q, index_k=index_k, config=MSAConfig(block=4, keep=6)).loss
        first = first or float(loss.detach())
        with torch.no_grad():
            index_q -= 100 * torch.autograd.grad(loss, index_q)[0]
    assert float(loss.detach()) < 0.1 * first


def test_the_own_block_is_in_every_row_and_none_lies_ahead(generator):
    qkv, index = draw(generator, 130)
    own = torch.arange(130) // 16
    for config in (SMALL, dataclasses.replace(SMALL, keep=1), dataclasses.replace(SMALL, keep=4, first=1, local=2)):
        ids = selection(*qkv, **index, config=config).ids
        assert (ids == own[:, None]).any(-1).all() and (ids <= own[:, None]).all()
        assert not config.first or (ids == 0).any(-1).all()
        count = (ids >= 0).sum(-1)
        assert torch.equal(count, (own + 1).clamp(max=config.keep).expand_as(count))


def test_key_heads_select_different_sets_that_their_query_heads_share(generator):
    qkv, index = draw(generator, 130)
    ids = selection(*qkv, **index, config=SMALL).ids
    assert ids.shape == (2, 2, 130, 3) and not torch.equal(ids[:, 0], ids[:, 1])
    table = pairs(selection(*qkv, **index, config=SMALL), *qkv[:2])
    assert torch.equal(table[:, 0], table[:, 1]) and torch.equal(table[:, 2], table[:, 3])


def test_packed_sequences_equal_separate_calls(generator):
    qkv, index = draw(generator, batch=1)
    packed = msa(*qkv, **index, config=SMALL, mask=Document(PACKED) & Causal())
    ends = list(itertools.accumulate(PACKED, initial=0))
    alone = [
        msa(*(t[:, :, a:b] for t in qkv), index_q=index["index_q"][:, :, a:b], index_k=index["index_k"][:, a:b],
            config=SMALL)
        for a, b in itertools.pairwise(ends) if a < b
    ]  # fmt: skip
    close(packed, torch.cat(alone, 2))


def test_the_choice_is_that_of_the_plain_rule(generator):
    qkv, index = draw(generator, batch=1)
    for mask in (None, Document(PACKED) & Causal()):
        chosen = selection(*qkv, **index, config=SMALL, mask=mask)
        more = {"config": SMALL, "mask": mask}
        close(reference(*qkv, **index, chosen=chosen, **more), reference(*qkv, **index, **more), 0)


def test_the_last_queries_equal_those_of_the_whole_call(generator):
    (q, k, v), index = draw(generator, 90)
    last = msa(
        q[:, :, -7:], k, v, index_q=index["index_q"][:, :, -7:], index_k=index["index_k"], config=SMALL
    )
    close(last, msa(q, k, v, **index, config=SMALL)[:, :, -7:])


@pytest.mark.parametrize(("sizes", "name"), [({"keep": 0}, "keep"), ({"block": 0}, "block"), ({"local": 4}, "keep")])
def test_sizes_that_do_not_fit_are_refused(sizes, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        dataclasses.replace(SMALL, **sizes)


def test_wrong_calls_say_what_is_wrong(generator):
    (q, k, v), index = draw(generator, 20)
    with pytest.raises(ValueError, match="index_q: expected shape"):
        msa(q, k, v, index_q=index["index_q"][:, :1], index_k=index["index_k"])
    with pytest.raises(ValueError, match="index_k: expected the width 5"):
        msa(q, k, v, index_q=index["index_q"], index_k=index["index_k"][..., :4])
    with pytest.raises(TypeError, match="index_k: expected a floating tensor"):
        msa(q, k, v, index_q=index["index_q"], index_k=index["index_k"].long())
    with pytest.raises(UnsupportedError, match="msa does not support noncausal_self"):
        msa(q, k, v, **index, mask="full")
