"""The operators behind ``probe`` and ``local_linear``: schema, shapes for tracing, gradients, autocast.

Both take four tensors that may need gradients: queries, keys, values, and one more, the probes or the ridge. Both
return the output, the log-normaliser and three tensors that only the backward reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UnsupportedError
from ..autocast import casting
from ..tiled.op import layout_for, mask_value
from ..tiled.problem import Problem
from ..tiled.weight import WEIGHTS
from . import blocked, local, reference
from .normal import Solver

BACKENDS = ("blocked", "reference")

_ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor more, str mask, Tensor[] mask_data, Tensor? q_pos, Tensor? k_pos, "
    "Tensor? key_padding, float scale, str solver, int[] tile, str backend"
)
_SAVED = "Tensor out, Tensor lse, Tensor first, Tensor second, Tensor third"
_library = torch.library.Library("manyheads", "FRAGMENT")
for _name in ("probe", "local_linear"):
    _library.define(f"{_name}({_ARGS}, int keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
    _library.define(f"{_name}_backward(Tensor dout, Tensor? dlse, {_SAVED}, {_ARGS}) -> Tensor[]")


def _problem(args: tuple[Any, ...], backward: bool) -> Problem:
    q, k, v, _, mask, data, q_pos, k_pos, padding, scale, _, tile, _ = args
    positions = None if q_pos is None or k_pos is None else (q_pos, k_pos)
    size = (tile[0], tile[1]) if tile[0] else None
    layout = layout_for(mask_value(mask, data), q, k, positions, padding, size, backward)
    unread = torch.empty(0, 0, dtype=torch.int64)
    return Problem(q, k, v, layout, unread, unread, WEIGHTS["softmax"], scale)


def _nothing(p: Problem) -> Tensor:
    """A result that nobody asked for; each its own, because results may not alias."""
    return p.q.new_empty(0, dtype=p.accumulate)


# --- what each operator does --------------------------------------------------------------------------------------


def _probe(*args: Any) -> tuple[Tensor, ...]:
    *given, keep = args
    p, r = _problem(tuple(given), False), args[3].to(args[0].dtype)
    if args[-2] == "reference":
        out, lse = reference.probe(p, r)
        return out, lse if keep else _nothing(p), *(_nothing(p) for _ in range(3))
    return *blocked.forward(p, r, keep), _nothing(p)


def _probe_backward(dout: Tensor, dlse: Tensor | None, *args: Any) -> list[Tensor]:
    out, lse, mean, level, _, *given = args
    p, r = _problem(tuple(given), True), given[3].to(given[0].dtype)
    if given[-1] == "reference":
        return reference.gradients(
            lambda q, k, v, r: reference.probe(replace(p, q=q, k=k, v=v), r), [p.q, p.k, p.v, r], dout, dlse
        )
    dq, dr, dk, dv = blocked.backward(p, r, blocked.Stats(out, lse, mean, level), dout.to(out.dtype), dlse)
    return [dq, dk, dv, dr]


def _local(*args: Any) -> tuple[Tensor, ...]:
    *given, keep = args
    p, ridge = _problem(tuple(given), False), args[3]
    ridge = ridge.to(p.accumulate)
    unsaved = [_nothing(p) for _ in range(3)]
    if args[-2] == "reference":
        return *reference.local_linear(p, ridge), *unsaved
    out, lse, *saved = local.forward(p, ridge, Solver.read(args[10]), keep)
    return out.to(p.v.dtype), lse, *(saved if keep > 1 else unsaved)


def _local_backward(dout: Tensor, dlse: Tensor | None, *args: Any) -> list[Tensor]:
    *saved, given = *args[:5], args[5:]
    p = _problem(given, True)
    ridge = given[3].to(p.accumulate)
    if given[-1] == "reference":
        return reference.gradients(
            lambda q, k, v, ridge: reference.local_linear(replace(p, q=q, k=k, v=v), ridge),
            [p.q, p.k, p.v, ridge],
            dout,
            dlse,
        )
    return list(local.backward(p, ridge, Solver.read(given[10]), tuple(saved), dout, dlse))


# --- shapes for tracing -------------------------------------------------------------------------------------------


def _fake_probe(*args: Any) -> tuple[Tensor, ...]:
    return _fake(args, lambda q, v: [(*q.shape[:3], v.shape[3]), tuple(q.shape[:3]), (0,)], 1)


def _fake_local(*args: Any) -> tuple[Tensor, ...]:
    return _fake(args, lambda q, v: [tuple(q.shape), tuple(q.shape), (*q.shape[:3], v.shape[3])], 0)


def _fake(args: tuple[Any, ...], saved: Callable[[Tensor, Tensor], list[Any]], lse_from: int) -> tuple[Tensor, ...]:
    q, v, backend, keep = args[0], args[2], args[-2], args[-1]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    shapes = saved(q, v) if keep > 1 and backend != "reference" else [(0,)] * 3
    lse = q.shape[:3] if keep >= lse_from else (0,)
    return v.new_empty(*q.shape[:3], v.shape[3]), *(q.new_empty(s, dtype=acc) for s in (lse, *shapes))


def _fake_backward(dout: Tensor, dlse: Tensor | None, *args: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in args[5:9]]


# --- registration -------------------------------------------------------------------------------------------------

_below_autograd = torch._C._AutoDispatchBelowAutograd


class _Recorded(torch.autograd.Function):
    """One node for all tensors of a call."""

    @staticmethod
    def forward(
        ctx: Any, name: str, rest: tuple[Any, ...], places: tuple[Tensor | None, ...], *tensors: Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        with _below_autograd():
            results = ops[name](*tensors, *_woven(rest, places), 2)
        ctx.name, ctx.rest = name, rest
        ctx.save_for_backward(*places, *results, *tensors)
        ctx.mark_non_differentiable(*results[2:])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        places, results, tensors = saved[:3], saved[3:8], saved[8:]
        if grads[0] is None and grads[1] is None:
            return (None,) * 7
        dout = torch.zeros_like(results[0]) if grads[0] is None else grads[0]
        backward = getattr(torch.ops.manyheads, f"{ctx.name}_backward").default
        found = backward(dout, grads[1], *results, *tensors, *_woven(ctx.rest, places))
        wants = ctx.needs_input_grad[3:]
        return None, None, None, *[g if w else None for g, w in zip(found, wants, strict=True)]


def _woven(rest: tuple[Any, ...], places: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """The arguments behind the first four: mask and data, positions and padding, and the numbers."""
    return *rest[:2], *places, *rest[2:]


def _recording(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def record(*args: Any) -> tuple[Tensor, ...]:
        tensors = args[:4]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return _Recorded.apply(name, (*args[4:6], *args[9:-1]), args[6:9], *tensors)
        with _below_autograd():
            return ops[name](*args)

    return record


def _fresh(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Results with the strides that tracing promises."""

    def run(*args: Any) -> Any:
        found = fn(*args)
        return type(found)(t.contiguous() for t in found)

    return run


def _cast_grads(fn: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Gradients in the dtypes of their tensors."""

    def run(*args: Any) -> list[Tensor]:
        return [g.to(t.dtype).contiguous() for g, t in zip(fn(*args), args[7:11], strict=True)]

    return run


def _refusing(name: str) -> None:
    def no_second(ctx: Any, *grads: Any) -> None:
        raise UnsupportedError(f"{name}: gradients of gradients are not supported; differentiate once")

    def no_vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise UnsupportedError(
            f"{name}: torch.vmap is not supported; batch and heads are dimensions of q, k and v already"
        )

    torch.library.register_autograd(f"manyheads::{name}_backward", no_second)
    torch.library.register_vmap(f"manyheads::{name}", no_vmap)


_TABLE: dict[str, tuple[Callable[..., Any], ...]] = {
    "probe": (_probe, _probe_backward, _fake_probe),
    "local_linear": (_local, _local_backward, _fake_local),
}
ops: dict[str, Any] = {}
for _name, (_run, _back, _fakes) in _TABLE.items():
    _library.impl(_name, _fresh(_run), "CompositeExplicitAutograd")
    _library.impl(f"{_name}_backward", _cast_grads(_back), "CompositeExplicitAutograd")
    torch.library.register_fake(f"manyheads::{_name}", _fakes)
    torch.library.register_fake(f"manyheads::{_name}_backward", _fake_backward)
    _library.impl(_name, _recording(_name), "Autograd")
    ops[_name] = getattr(torch.ops.manyheads, _name).default
    _refusing(_name)
    for _device in ("cpu", "cuda"):
        _library.impl(_name, casting(_device, ops[_name]), f"Autocast{_device.upper()}")
