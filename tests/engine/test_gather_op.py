"""The operator of the gather engine: registration, tracing, derivatives, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from manyheads.common.errors import UnsupportedError
from manyheads.engine.gather import gather, rows
from manyheads.engine.gather.op import op
from tests.engine.gather_calls import FULL, WIDE, draw


def leaves(call, dtype=FULL, grad=True):
    """The tensors of a call that may take gradients."""
    given = [*call[:3], *([] if call.sink is None else [call.sink])]
    return [t.to(dtype, copy=True).requires_grad_(grad) for t in given]


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("sink", [False, True])
def test_the_operator_is_registered_soundly(sink, backend):
    call = draw(9, 14, 5, sink=sink, d=8, dv=5)
    for grad, ids, cap in ((True, call.ids, 0.0), (False, call.ids.int(), 2.0)):
        q, k, v, *more = leaves(call, grad=grad)
        torch.library.opcheck(op, (q, k, v, ids, more[0] if more else None, 0.3, cap, backend))


@pytest.mark.parametrize("cost", [10.0, 1e-6], ids=["own rows", "shared rows"])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}], ids=str)
def test_derivatives_match_finite_differences(options, cost, monkeypatch):
    monkeypatch.setattr(rows, "sharing_cost", lambda p: cost)
    call = draw(18, 9, 5, sink=True, d=4, dv=3)

    def run(q, k, v, sink):
        return gather(q, k, v, call.ids, sink=sink, return_lse=True, **options)

    assert torch.autograd.gradcheck(run, leaves(call, WIDE), fast_mode=True, nondet_tol=0.0)


def test_it_compiles_whole_with_gradients():
    torch._dynamo.reset()
    call = draw(sink=True)

    def run(q, k, v, sink):
        out, lse = gather(q * 2, k, v, call.ids, sink=sink, return_lse=True)
        return out + 1, lse

    def everything(f):
        given = leaves(call)
        out, lse = f(*given)
        return [out, lse, *torch.autograd.grad(out.sum() + lse.sum(), given)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(everything(compiled), everything(run), strict=True):
        torch.testing.assert_close(got, want)


def test_a_new_length_compiles_nothing():
    torch._dynamo.reset()
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager", dynamic=True)

    def run(queries, keys, count):
        call = draw(queries, keys, count)
        given = leaves(call)
        out = compiled(*given, call.ids)
        torch.testing.assert_close(out, gather(*given, call.ids))
        out.sum().backward()

    for sizes in ((20, 30, 5), (31, 47, 9), (45, 60, 12)):
        run(*sizes)
    with torch.compiler.set_stance("fail_on_recompile"):
        run(52, 71, 15)


def test_inductor_compiles_the_engine():
    torch._dynamo.reset()
    call = draw(20, 30)

    def run(q, k):
        return gather(q * 2, k, k[..., :8], call.ids) + 1

    q, k = leaves(call, grad=False)[:2]
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(q, k), run(q, k))


def test_ids_are_checked_in_compiled_code_too():
    torch._dynamo.reset()
    call = draw(20, 30)
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"ids: expected -1 \(none\) or 0 to Nk - 1 = 29, got .* to 30"):
        compiled(*leaves(call, grad=False), call.ids + 1)


def test_autocast_reaches_the_engine_and_leaves_lse_wide():
    call = draw()
    q, k, v = leaves(call, grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = gather(q, k, v, call.ids, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == FULL
    torch.testing.assert_close(out, gather(*(t.bfloat16() for t in (q, k, v)), call.ids))


def test_checkpointing_recomputes_the_same():
    call = draw()

    def run(q, k, v):
        return gather(q, k, v, call.ids).square()

    given = leaves(call)
    plain = torch.autograd.grad(run(*given).sum(), given)
    again = torch.autograd.grad(checkpoint(run, *given, use_reentrant=False).sum(), given)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_gradients_of_the_lse_alone_and_of_one_input_alone():
    call = draw(sink=True)
    q, k, v, sink = leaves(call)
    found = gather(q, k, v, call.ids, sink=sink, return_lse=True)
    live = found.lse.masked_fill(found.lse.isinf(), 0.0)
    dq, dk, dv, ds = torch.autograd.grad(live.sum(), [q, k, v, sink])
    assert (dv == 0).all() and all(t.abs().sum() > 0 for t in (dq, dk, ds))
    only = q.detach().requires_grad_()
    out = gather(only, k.detach(), v.detach(), call.ids, sink=sink.detach(), return_lse=True)
    torch.testing.assert_close(torch.autograd.grad(out.lse.masked_fill(out.lse.isinf(), 0.0).sum(), only)[0], dq)
    assert not gather(*leaves(call, grad=False)[:3], call.ids).requires_grad


def test_what_is_not_supported_refuses():
    call = draw(4, 6, 3)
    q, k, v = leaves(call)
    with pytest.raises(UnsupportedError, match="gradients of gradients"):
        (grad,) = torch.autograd.grad(gather(q, k, v, call.ids).sum(), q, create_graph=True)
        grad.sum().backward()
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda t: gather(t, k, v, call.ids))(q.detach()[None])
