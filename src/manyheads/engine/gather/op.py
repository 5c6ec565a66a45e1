"""The operator behind ``gather``: schema, shapes for tracing, gradients, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.errors import UnsupportedError
from ..autocast import casting
from . import blocked, launch, reference
from .problem import Grads, Problem, check_range

BACKENDS: dict[str, Any] = {"triton": launch, "blocked": blocked, "reference": reference}

_ARGS = "Tensor q, Tensor k, Tensor v, Tensor ids, Tensor? sink, float scale, float softcap, str backend"
_library = torch.library.Library("manyheads", "FRAGMENT")
_library.define(f"gather({_ARGS}) -> (Tensor, Tensor)")
_library.define(f"gather_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_ARGS}) -> Tensor[]")


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    *given, backend = args
    problem = Problem(*given)
    check_range(problem.ids, problem.k.shape[2])
    out, lse = BACKENDS[backend].forward(problem)
    return out.contiguous(), lse.contiguous()  # the strides that tracing promises


def _backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    *given, backend = args
    grads: Grads = BACKENDS[backend].backward(Problem(*given), out, lse, dout, dlse)
    sink = [] if grads.sink is None else [grads.sink]
    return [g.contiguous() for g in (grads.q, grads.k, grads.v, *sink)]


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=acc)


def _fake_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> list[Tensor]:
    inputs = [args[i] for i in (0, 1, 2, 4) if args[i] is not None]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]


class _Recorded(torch.autograd.Function):
    """One node for all tensors of a call."""

    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        with _below_autograd():
            out, lse = op(*tensors, *rest)
        ctx.rest = rest
        ctx.save_for_backward(out, lse, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        out, lse, *tensors = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (1 + len(tensors))
        dout = torch.zeros_like(out) if dout is None else dout
        backward = torch.ops.manyheads.gather_backward.default
        dq, dk, dv, *dsink = backward(dout, dlse, out, lse, *tensors, *ctx.rest)
        return None, dq, dk, dv, None, dsink[0] if dsink else None


def _record(*args: Any) -> tuple[Tensor, Tensor]:
    """Records the call where some input needs gradients."""
    q, k, v, ids, sink, *rest = args
    if torch.is_grad_enabled() and torch._C._any_requires_grad(q, k, v, sink):
        return _Recorded.apply(tuple(rest), q, k, v, ids, sink)
    with _below_autograd():
        return op(*args)


_below_autograd = torch._C._AutoDispatchBelowAutograd


def _no_second(ctx: Any, *grads: Any) -> None:
    raise UnsupportedError("gather: gradients of gradients are not supported; differentiate once")


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> None:
    raise UnsupportedError("gather: torch.vmap is not supported; batch and heads are dimensions of q, k and v already")


_library.impl("gather", _forward, "CompositeExplicitAutograd")
_library.impl("gather_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("manyheads::gather", _fake_forward)
torch.library.register_fake("manyheads::gather_backward", _fake_backward)
_library.impl("gather", _record, "Autograd")
torch.library.register_autograd("manyheads::gather_backward", _no_second)
torch.library.register_vmap("manyheads::gather", _no_vmap)
op = torch.ops.manyheads.gather.default
_library.impl("gather", casting("cpu", op), "AutocastCPU")
_library.impl("gather", casting("cuda", op), "AutocastCUDA")
