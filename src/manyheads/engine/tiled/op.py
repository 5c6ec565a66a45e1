"""The operator behind ``tiled``: schema, shapes for tracing, gradients, autocast.

Masks and layouts cross it as text and tensors, so a compiler never meets them and a new length compiles nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UnsupportedError
from ...mask.base import Mask
from ...mask.build import build
from ...mask.deferred import layout_of
from ...mask.layout import TileLayout
from ...mask.text import parse
from ..autocast import casting
from . import bias as biases
from . import blocked, boxing, launch, reference
from .plan import cheapest
from .problem import AUTO, HOW, Grads, Problem
from .weight import weight_named

BACKENDS: dict[str, Any] = {"triton": launch, "blocked": blocked, "reference": reference}

_ARGS = (
    "Tensor q, Tensor k, Tensor v, str mask, Tensor[] mask_data, Tensor? q_pos, Tensor? k_pos, Tensor? key_padding, "
    "str bias, Tensor[] bias_data, Tensor? sink, float scale, float softcap, float dropout_p, Tensor? seed, "
    "float skip_threshold, str weight, str how, int[] tile, int[] origin, bool wide, str backend"
)
_library = torch.library.Library("manyheads", "FRAGMENT")
_library.define(f"tiled({_ARGS}) -> (Tensor, Tensor)")
_library.define(
    f"tiled_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool bias_grads, {_ARGS}) -> Tensor[]"
)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str,
    mask_data: Sequence[Tensor],
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    key_padding: Tensor | None,
    bias: str,
    bias_data: Sequence[Tensor],
    sink: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    skip_threshold: float,
    weight: str,
    how: str,
    tile: Sequence[int],
    origin: Sequence[int],
    wide: bool,
    backend: str,
    backward: bool = False,
    bias_grads: bool = True,
) -> Problem:
    if backend == "triton" and not tile[0]:
        terms_text = (part.split(":")[0] for part in bias.split(";") if part)
        kind = launch.kind_of(terms_text, softcap, dropout_p, skip_threshold, weight)
        tile = launch.tile_of(q, v, kind, backward, skip_threshold > 0)
    small = (
        None
        if mask_data or q_pos is not None or key_padding is not None
        else (mask, q.shape, k.shape, *tile, q.dtype, backward)
    )
    found = None
    plain = small is not None and how == AUTO and weight == "softmax" and sink is None and not tile[0]
    if plain and backend == "blocked" and not (bias or softcap or dropout_p or skip_threshold):
        found = boxing.plan_for(mask, q, k, v)
    layout = _small.get(small) if found is None else _UNREAD
    if layout is None:
        positions = None if q_pos is None or k_pos is None else (q_pos, k_pos)
        size = (tile[0], tile[1]) if tile[0] else None
        if mask.startswith("ids("):
            layout = layout_for(_chosen(mask, mask_data, q, k), q, k, None, key_padding)
        else:
            layout = layout_for(mask_value(mask, mask_data), q, k, positions, key_padding, size, backward)
        if small is not None and q.shape[2] * k.shape[2] <= _SMALL_PAIRS:
            if len(_small) > 256:
                _small.clear()
            _small[small] = layout
    terms = biases.unflatten(bias, bias_data)
    qp, kp = _positions(layout, q.device) if terms or dropout_p else (_NONE, _NONE)
    return Problem(
        q,
        k,
        v,
        layout,
        qp,
        kp,
        weight_named(weight),
        scale,
        softcap,
        terms,
        sink,
        dropout_p,
        0 if seed is None else int(seed),
        skip_threshold,
        bias_grads,
        skip_threshold > 0 or mask.startswith(("layout(", "ids(")),
        (origin[0], origin[1]),
        wide,
        *HOW[how],
        found,
    )


_NONE = torch.empty(0, 0, dtype=torch.int64)
_UNREAD = TileLayout(0, 0, (1, 1), torch.zeros(1, 1, dtype=torch.int32))  # boxes need no tiles
_SMALL_PAIRS = 1 << 16
_small: dict[object, TileLayout] = {}  # layouts so small that looking them up properly would cost more than their use


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    out, lse = BACKENDS[args[-1]].forward(_problem(*args))
    if out.is_contiguous() and lse.is_contiguous():
        return out, lse
    return out.contiguous(), lse.contiguous()  # the strides that tracing promises


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, bias_grads: bool, *args: Any
) -> list[Tensor]:
    problem = _problem(*args, True, bias_grads)  # type: ignore[call-arg]
    grads: Grads = BACKENDS[args[-1]].backward(problem, out, lse, dout, dlse)
    sink = [] if grads.sink is None else [grads.sink]
    return [g.contiguous() for g in (grads.q, grads.k, grads.v, *sink, *grads.terms)]


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    b, h, n, _ = q.shape
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(b, h, n, v.shape[3], dtype=acc if args[-2] else v.dtype), q.new_empty(b, h, n, dtype=acc)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, bias_grads: bool, *args: Any
) -> list[Tensor]:
    q, k, v, bias_data, sink = args[0], args[1], args[2], args[9], args[10]
    wide = args[-2]
    inputs = [(t, lse.dtype if wide else t.dtype) for t in (q, k, v)]
    inputs += [] if sink is None else [(sink, sink.dtype)]
    inputs += [(t.tensor, t.total(lse.dtype) if wide else t.tensor.dtype) for t in biases.unflatten(args[8], bias_data)]
    return [torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t, dtype in inputs]


class _Recorded(torch.autograd.Function):
    """One node for all tensors of a call; written out because generic recording costs more than a small call."""

    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        with _below_autograd():
            out, lse = op(*_joined(rest, tensors))
        ctx.rest = rest
        ctx.save_for_backward(out, lse, *tensors)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        out, lse, *tensors = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (1 + len(tensors))
        dout = torch.zeros_like(out) if dout is None else dout
        backward = torch.ops.manyheads.tiled_backward.default
        bias_grads = any(ctx.needs_input_grad[9:])
        dq, dk, dv, *more = backward(dout, dlse, out, lse, bias_grads, *_joined(ctx.rest, tensors))
        dsink = more.pop(0) if tensors[6] is not None else None
        return (None, dq, dk, dv, None, None, None, dsink, None, *more)


def _joined(rest: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Any, ...]:
    """The operator's arguments from those that are not tensors and those that are."""
    mask, mask_data, bias, scale, softcap, dropout_p, *tail = rest
    q, k, v, q_pos, k_pos, padding, sink, seed, *bias_data = tensors
    positions = (q_pos, k_pos, padding)
    return q, k, v, mask, mask_data, *positions, bias, bias_data, sink, scale, softcap, dropout_p, seed, *tail


def _record(*args: Any) -> tuple[Tensor, Tensor]:
    """Records the call where some input needs gradients."""
    q, k, v, mask, mask_data, q_pos, k_pos, padding, bias, bias_data, sink, scale, softcap, dropout_p, seed, *tail = (
        args
    )
    if not torch.is_grad_enabled() or not torch._C._any_requires_grad(q, k, v, sink, *bias_data):
        with _below_autograd():
            return op(*args)
    rest = (mask, mask_data, bias, scale, softcap, dropout_p, *tail)
    return _Recorded.apply(rest, q, k, v, q_pos, k_pos, padding, sink, seed, *bias_data)


_below_autograd = torch._C._AutoDispatchBelowAutograd


def _no_second(ctx: Any, *grads: Any) -> None:
    raise UnsupportedError("tiled: gradients of gradients are not supported; differentiate once")


def _no_vmap(info: Any, in_dims: Any, *args: Any) -> None:
    raise UnsupportedError("tiled: torch.vmap is not supported; batch and heads are dimensions of q, k and v already")


_library.impl("tiled", _forward, "CompositeExplicitAutograd")
_library.impl("tiled_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("manyheads::tiled", _fake_forward)
torch.library.register_fake("manyheads::tiled_backward", _fake_backward)
_library.impl("tiled", _record, "Autograd")
torch.library.register_autograd("manyheads::tiled_backward", _no_second)
torch.library.register_vmap("manyheads::tiled", _no_vmap)
op = torch.ops.manyheads.tiled.default
_library.impl("tiled", casting("cpu", op), "AutocastCPU")
_library.impl("tiled", casting("cuda", op), "AutocastCUDA")


def call_plain(
    q: Tensor, k: Tensor, v: Tensor, mask: str, data: list[Tensor], scale: float, backend: str, grads: bool
) -> tuple[Tensor, Tensor]:
    """The operator without options; where nothing needs gradients, past the layer that would record them."""
    rest: tuple[Any, ...] = ("", [], None, scale, 0.0, 0.0, None, 0.0, "softmax", AUTO, (0, 0), (0, 0), False, backend)
    if grads:
        return op(q, k, v, mask, data, None, None, None, *rest)
    with _below_autograd():
        return op(q, k, v, mask, data, None, None, None, *rest)


# --- from text and tensors back to values -----------------------------------------------------------------------

_by_text: dict[str, Mask | TileLayout] = {}
_by_tensors: dict[tuple[Any, ...], tuple[list[weakref.ref[Tensor]], Mask | TileLayout]] = {}


def mask_value(text: str, data: Sequence[Tensor]) -> Mask | TileLayout:
    """The mask or layout behind its text and tensors; the identity of the tensors finds it again quickly."""
    if not data:
        found = _by_text.get(text)
        if found is None:
            found = _by_text[text] = parse(text)
        return found
    key = (text, *map(id, data))
    hit = _by_tensors.get(key)
    if hit is not None and all(ref() is t for ref, t in zip(hit[0], data, strict=True)):
        return hit[1]
    value = TileLayout.unflatten(text, tuple(data)) if text.startswith("layout(") else parse(text, tuple(data))
    if len(_by_tensors) > 256:
        _by_tensors.clear()
    _by_tensors[key] = ([weakref.ref(t) for t in data], value)
    return value


def _chosen(text: str, data: Sequence[Tensor], q: Tensor, k: Tensor) -> TileLayout:
    """The layout of a choice that a compiler carried here; found again by its backward."""
    key = (text, q.shape[:3], k.shape[2], *map(id, data))
    hit = _by_tensors.get(key)
    if hit is None or not all(ref() is t for ref, t in zip(hit[0], data, strict=True)):
        hit = _by_tensors[key] = [weakref.ref(t) for t in data], layout_of(text, data, q, k)
        while len(_by_tensors) > 256:
            _by_tensors.pop(next(iter(_by_tensors)))
    assert isinstance(hit[1], TileLayout)
    return hit[1]


def layout_for(
    mask: Mask | TileLayout,
    q: Tensor,
    k: Tensor,
    positions: tuple[Tensor, Tensor] | None = None,
    key_padding: Tensor | None = None,
    tile: tuple[int, int] | None = None,
    backward: bool = False,
) -> TileLayout:
    """The layout that a call visits; with no tile given, the cheapest of some sizes.

    Args:
        mask: A mask, or a layout, of which only padded keys are hidden.
        q, k: The call's queries and keys; only their shapes and dtype are read.
        positions: Logical positions, or None for the mask's default.
        key_padding: bool ``(B, Nk)``, True for real keys.
        tile: Queries and keys per tile, or None for the engine's choice.
        backward: Whether the choice is for the gradients.

    Returns:
        The layout, from a cache when it was built before.
    """
    if isinstance(mask, TileLayout):
        return mask if key_padding is None else mask.without(key_padding)
    (batch, heads, nq, _), nk = q.shape, k.shape[2]

    def made(size: tuple[int, int]) -> TileLayout:
        return build(mask, nq, nk, tile=size, positions=positions, key_padding=key_padding, batch=batch, heads=heads)

    return made(tile) if tile is not None else cheapest(made, nq, q.dtype.itemsize == 2, backward)


def _positions(layout: TileLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logical positions with a leading batch dimension, on the device of the scores; kept with the layout."""
    known = layout.__dict__.setdefault("_placed", {})
    if device not in known:
        q_pos, k_pos = layout.positions
        known[device] = torch.atleast_2d(q_pos.to(device)), torch.atleast_2d(k_pos.to(device))
    return known[device]
