"""The operator behind ``scan``: schema, shapes for tracing, gradients, autocast.

The state crosses it as one matrix ``(B, H, D, E)`` whose last column is the sum of keys when outputs are normalised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...common.errors import UnsupportedError
from ..autocast import casting
from . import blocked, check, launch, reference
from .problem import Problem, accumulate, starts_of

BACKENDS: dict[str, Any] = {"triton": launch, "blocked": blocked, "reference": reference}

_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? beta, Tensor? gate, Tensor state, Tensor? m, Tensor? lens, "
    "float scale, str normalise, int chunk, str backend"
)
_library = torch.library.Library("manyheads", "FRAGMENT")
_library.define(f"scan({_ARGS}, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(
    "scan_backward(Tensor? dout, Tensor? dstate, Tensor states, Tensor maxima, Tensor? out, bool[] wants, "
    f"{_ARGS}) -> Tensor[]"
)
_TENSORS = 7  # the first arguments: those that may take gradients


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    m: Tensor | None,
    lens: Tensor | None,
    scale: float,
    normalise: str,
    chunk: int,
) -> Problem:
    starts = None if lens is None else starts_of(lens, q.shape[0], q.shape[2], q.device)
    return Problem(q, k, v, decay, beta, gate, state, m, starts, scale, normalise, chunk)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *given, backend, save = args
    problem = _problem(*given)
    check.values(problem.decay, problem.beta)
    out, state, m, states, maxima = BACKENDS[backend].forward(problem, save)
    results = [out, state, problem.state.new_zeros(0) if m is None else m, states, maxima]
    inputs = [t for t in args if isinstance(t, Tensor)]
    # results must be fresh and have the strides that tracing promises; a call without tokens returns its state
    return tuple([r.clone() if any(r is t for t in inputs) else r.contiguous() for r in results])


def _backward(
    dout: Tensor | None,
    dstate: Tensor | None,
    states: Tensor,
    maxima: Tensor,
    out: Tensor | None,
    wants: list[bool],
    *args: Any,
) -> list[Tensor]:
    *given, backend = args
    saved = (states, maxima, out) if backend == "triton" else (states, maxima)
    grads: list[Tensor | None] = BACKENDS[backend].backward(_problem(*given), saved, dout, dstate, wants)
    return [states.new_zeros(0) if g is None else g.clone() if dstate is g else g.contiguous() for g in grads]


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    q, _, v, *_, state, m, _, _, _, chunk, backend, save = args
    (b, h, n, _), acc = q.shape, accumulate(q.dtype)
    kept: list[tuple[int, ...]] = [(0,), (0,)]
    dtype = state.dtype
    if backend == "blocked":
        saved = blocked.checkpoints(b, h, n, chunk) if save else 0
        kept = [(saved, *state.shape), (saved if m is not None else 0, b, h)]
    elif backend == "triton" and save:
        dtype, kept = launch.saved(q, v, chunk, state.shape[3] > v.shape[3], m is not None)
    return (
        v.new_empty(b, h, n, v.shape[3]),
        state.new_empty(state.shape),
        q.new_empty((0,) if m is None else (b, h), dtype=acc),
        state.new_empty(kept[0], dtype=dtype),
        state.new_empty(kept[1]),
    )


def _fake_backward(
    dout: Tensor | None,
    dstate: Tensor | None,
    states: Tensor,
    maxima: Tensor,
    out: Tensor | None,
    wants: list[bool],
    *args: Any,
) -> list[Tensor]:
    return [
        t.new_empty(t.shape) if t is not None and w else states.new_empty(0)
        for t, w in zip(args[:_TENSORS], wants, strict=True)
    ]


class _Recorded(torch.autograd.Function):
    """One node for all tensors of a call."""

    @staticmethod
    def forward(ctx: Any, m: Tensor | None, lens: Tensor | None, rest: tuple[Any, ...], *tensors: Any) -> Any:
        ctx.set_materialize_grads(False)
        with _below_autograd():
            out, state, end, states, maxima = op(*tensors, m, lens, *rest, True)
        ctx.rest = rest
        backend, normalise = rest[-1], rest[1]
        divided = out if backend == "triton" and normalise else None  # its gradient is that of a quotient
        ctx.save_for_backward(m, lens, states, maxima, divided, *tensors)
        ctx.mark_non_differentiable(end, states, maxima)
        return out, state, end, states, maxima

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        m, lens, states, maxima, out, *tensors = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[3:])
        if grads[0] is None and grads[1] is None:
            return (None,) * (3 + len(tensors))
        backward = torch.ops.manyheads.scan_backward.default
        found = backward(grads[0], grads[1], states, maxima, out, wants, *tensors, m, lens, *ctx.rest)
        return None, None, None, *[g if w else None for g, w in zip(found, wants, strict=True)]


def _record(*args: Any) -> tuple[Tensor, ...]:
    """Records the call where some input needs gradients."""
    tensors, (m, lens, *rest, _) = args[:_TENSORS], args[_TENSORS:]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Recorded.apply(m, lens, tuple(rest), *tensors)
    with _below_autograd():
        return op(*args)


_below_autograd = torch._C._AutoDispatchBelowAutograd


def _no_second(ctx: Any, *grads: Any) -> None:
    raise UnsupportedError("scan: gradients of gradients are not supported; differentiate once")


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> None:
    raise UnsupportedError("scan: torch.vmap is not supported; batch and heads are dimensions of q, k and v already")


_library.impl("scan", _forward, "CompositeExplicitAutograd")
_library.impl("scan_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("manyheads::scan", _fake_forward)
torch.library.register_fake("manyheads::scan_backward", _fake_backward)
_library.impl("scan", _record, "Autograd")
torch.library.register_autograd("manyheads::scan_backward", _no_second)
torch.library.register_vmap("manyheads::scan", _no_vmap)
op = torch.ops.manyheads.scan.default
_library.impl("scan", casting("cpu", op), "AutocastCPU")
_library.impl("scan", casting("cuda", op), "AutocastCUDA")
