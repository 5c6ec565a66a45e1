"""The engine in parts: some queries and some keys at a time, with the statistics of the whole."""

from __future__ import annotations

import pytest
import torch

import manyheads as mh
from manyheads.engine.tiled import Bias, launch
from manyheads.parallel.collectives import Link
from manyheads.parallel.ring import around, windows
from manyheads.parallel.steps import Call, Partial
from manyheads.testing import assert_within_budget, sample_qkv

B, H, HKV, N, D = 2, 4, 2, 43, 16


def call_of(mask, backend, **options):
    """A call over the whole sequence."""
    given = {"scale": D**-0.5, "softcap": 0.0, "dropout_p": 0.0, "seed": None, "terms": (), "sink": None}
    return Call(mask, **given | {"padding": None} | options, backend=backend, heads=range(H), kv=range(HKV))


def in_parts(call, tensors, grads, pieces):
    """A call on pieces of the sequence: results and gradients as one device would give them."""
    q, k, v = tensors
    totals = [Partial() for _ in pieces]
    for total, rows in zip(totals, pieces, strict=True):
        for columns in pieces:
            total.add(*call.forward(q[:, :, rows], k[:, :, columns], v[:, :, columns], rows, columns))
    results = [call.closed(*total.whole()) for total in totals]
    shared = call.shared()
    acc = results[0][0].dtype
    sums = [torch.zeros_like(t, dtype=acc) for t in tensors]
    for rows, (out, lse) in zip(pieces, results, strict=True):
        out = out if call.terms or call.sink is not None else out.to(v.dtype)
        own = grads[0][:, :, rows], grads[1][:, :, rows].masked_fill(lse == -torch.inf, 0.0)
        call.sink_grad((out, lse), own, shared)
        for columns in pieces:
            parts = q[:, :, rows], k[:, :, columns], v[:, :, columns]
            found = call.backward(parts, (rows, columns), (out, lse), own, shared)
            for total, at, part in zip(sums, (rows, columns, columns), found or (), strict=found is not None):
                total[:, :, at] += part
    order = torch.cat(pieces).argsort()
    out, lse = (torch.cat([r[i] for r in results], 2)[:, :, order] for i in range(2))
    more = [*shared.terms, *([] if shared.sink is None else [shared.sink])]
    return [out.to(v.dtype), lse, *(s.to(t.dtype) for s, t in zip(sums, tensors, strict=True)), *more]


def terms_of(tensors):
    """One term of each kind, or none."""
    if not tensors:
        return ()
    slopes, table, pair, key, block = tensors
    return mh.ALiBi(slopes), mh.Relative(table), mh.Pair(pair), mh.PerKey(key), mh.PerBlock(block, (9, 12))


INTERPRETED = [  # the interpreter takes seconds
    pytest.param("plain", "triton", torch.bfloat16),
    pytest.param("everything", "triton", torch.float32, marks=pytest.mark.slow),
    pytest.param("everything", "triton", torch.bfloat16, marks=pytest.mark.slow),
]
EVERY = [(k, "blocked", t) for k in ("plain", "sink", "everything") for t in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("kind", "backend", "dtype"), EVERY + INTERPRETED)
def test_parts_add_up_to_the_whole(kind, backend, dtype):
    if backend == "triton" and launch.refuse("cpu"):
        pytest.skip("no Triton")
    tensors = sample_qkv(B, H, N, kv_heads=HKV, width=D, dtype=dtype, seed=3)
    generator = torch.Generator().manual_seed(4)
    grads = torch.randn(B, H, N, D, generator=generator).to(dtype), torch.randn(B, H, N, generator=generator)
    extra = []
    if kind == "everything":
        shapes = ((H,), (1, 9), (1, H, 1, N), (B, 1, N), (1, 1, 5, 4), (H,))
        extra = [torch.rand(*shape, generator=generator) for shape in shapes]
    if kind == "sink":
        extra = [torch.rand(H, generator=generator)]

    def one_device(dtype64, backend):
        cast = (lambda t: t.double()) if dtype64 else (lambda t: t)
        leaves = [cast(t).requires_grad_() for t in [*(t.clone() for t in tensors), *(t.clone() for t in extra)]]
        options = {}
        if extra:
            options = {"sink": leaves[-1], "softcap": 4.0 if terms_of(leaves[3:-1]) else None}
            options["bias"] = Bias(terms_of(leaves[3:-1])) if terms_of(leaves[3:-1]) else None
        got = mh.attention(*leaves[:3], mask="causal & window(40)", return_lse=True, backend=backend, **options)
        loss = (got.out * cast(grads[0])).sum() + (got.lse * cast(grads[1])).sum()
        return [t.detach() for t in (*got, *torch.autograd.grad(loss, leaves))]

    terms = terms_of(extra[:-1])
    more = {"terms": terms, "sink": extra[-1] if extra else None, "softcap": 4.0 if terms else 0.0}
    call = call_of(mh.Causal() & mh.Window(40), backend, **more)
    pieces = torch.randperm(N, generator=generator).tensor_split(2)
    got = in_parts(call, tensors, grads, [piece.sort().values for piece in pieces])
    exact, plain, same = one_device(True, "reference"), one_device(False, "reference"), one_device(False, backend)
    for i, (g, e, p, s) in enumerate(zip(got, exact, plain, same, strict=True)):
        worse = max(p, s, key=lambda t, e=e: float((t - e).abs().max()))
        assert_within_budget(g.to(p.dtype), e, worse, what=f"result {i}")


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_dropout_of_some_heads_is_that_of_all(backend):
    from manyheads.engine.tiled.op import op

    q, k, v = sample_qkv(B, H, N, kv_heads=HKV, width=D, seed=5)
    rest = (None, None, None, "", [], None, 0.25, 0.0, 0.3, torch.tensor([77]), 0.0, "softmax", "auto exact", (0, 0))
    whole, _ = op(q, k, v, "causal", [], *rest, (0, 0), False, backend)
    part, _ = op(q[1:, 2:], k[1:, 1:], v[1:, 1:], "causal", [], *rest, (1, 2), False, backend)
    torch.testing.assert_close(part, whole[1:, 2:])
    other, _ = op(q[1:, 2:], k[1:, 1:], v[1:, 1:], "causal", [], *rest, (0, 0), False, backend)
    assert not torch.allclose(other, whole[1:, 2:])


def test_kernels_that_count_heads_from_zero_refuse_another_origin():
    from manyheads.engine.tiled.op import op

    if launch.refuse("cpu"):
        pytest.skip("no Triton")
    q, k, v = sample_qkv(1, H, 8, width=D, seed=5)
    rest = (None, None, None, "", [], None, 0.25, 0.0, 0.3, torch.tensor([77]), 0.0, "softmax", "auto exact", (0, 0))
    with pytest.raises(mh.UnsupportedError, match="begins at head 2"):
        op(q, k, v, "causal", [], *rest, (0, 2), False, "triton")
    assert call_of(mh.Causal(), "triton", dropout_p=0.1).on_heads(range(2, 4), range(1, 2)).backend == "blocked"
    assert call_of(mh.Causal(), "triton").on_heads(range(2, 4), range(1, 2)).backend == "triton"


@pytest.mark.parametrize(("world", "size"), [(1, 1), (5, 5), (6, 2), (6, 3), (12, 4), (8, 1)])
def test_every_block_visits_every_rank_once_and_comes_home(world, size):
    orders = [windows(world, rank, size) for rank in range(world)]
    visits = orders[0].visits
    assert all(sorted(line) == list(range(world)) for line in (*visits, *zip(*visits, strict=True)))
    for rank, order in enumerate(orders):
        held = {0: rank}
        for move in order.moves:
            assert visits[rank][move.post] == move.sent and visits[rank][move.use] == move.got
            back = [m for m in orders[move.to].moves if (m.post, m.use, m.frm) == (move.post, move.use, rank)]
            assert [m.got for m in back] == [move.sent]
            held[move.use] = move.got
        assert sorted(held) == list(range(world))
        at, whose = rank, visits[rank][0]
        for step in range(world):
            to, _, got = orders[at].onward(step)
            assert visits[at][step] == whose
            frm = orders[to].onward(step)[1]
            assert frm == at and orders[to].onward(step)[2] == whose
            at = to
        assert at == whose
        del got
    assert around(world, 0) == windows(world, 0, world)


def test_the_members_of_a_link_are_counted_among_themselves(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 5)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 8)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "gloo")
    link = Link("group").among((1, 3, 5, 7))
    assert (link.rank, link.world) == (2, 4)
