"""Sharded tensors: how the operators run where DTensors hold the batch or the heads in parts.

Every rank runs the operator on its part of the batch and of the heads, with its part of the mask, and nothing is
communicated but what joins the gradients of what several ranks hold.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...common.errors import UnsupportedError
from ...mask.base import Mask
from ...mask.layout import TileLayout
from .. import sharding as shared
from ..sharding import BATCH, HEADS, Operand, Plan, entries
from ..sharding import plan_of as plan_of
from ..sharding import replicated as replicated
from . import op as operator
from .reference import recording

_BIAS_DIMS = {"alibi": (None, 0), "relative": (None, 0), "pair": (0, 1), "per_key": (0, 1), "per_block": (0, 1)}


def seen(*tensors: object) -> bool:
    """Whether a tensor is a DTensor; the first one has the operators' rules registered.

    Example:
        >>> seen(torch.ones(2), None)
        False
    """
    if not shared.seen(*tensors):
        return False
    _register()
    return True


@functools.cache
def _register() -> None:
    shared.register({"tiled": _forward, "tiled_backward": _backward})


# --- the rules of both operators --------------------------------------------------------------------------------


def _forward(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``tiled`` on DTensors: the operator on this rank's part, its results put together as q is."""
    with recording(), torch.no_grad():  # collectives are autograd functions; nothing of them is recorded
        call = _Call(func, args, kwargs)
        out, lse = func(*call.local)
        return call.q.joined(out), call.q.joined(lse)


def _backward(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """``tiled_backward`` on DTensors: every gradient is placed as its input is."""
    with recording(), torch.no_grad():  # collectives are autograd functions; nothing of them is recorded
        call = _Call(func, args, kwargs)
        found = func(*call.local)
        bias_grads = call.given["bias_grads"]
        ends = [call.q, call.k, call.v, *([] if call.sink is None else [call.sink]), *call.biases]
        unread = [] if bias_grads else call.biases  # zeros, which nobody needs to add up
        return [torch.zeros_like(e.given) if e in unread else e.gradient(g) for e, g in zip(ends, found, strict=True)]


class _Call:
    """The arguments of one call, and what this rank's call of the same operator gets instead of each."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        given = self.given = dict(zip(names, args, strict=False)) | kwargs
        plan = self.plan = plan_of(given["q"], given["k"], given["v"])
        self.q, self.k, self.v = (Operand(name, given[name], plan, (0, 1)) for name in "qkv")
        self.sink = None
        if given["sink"] is not None:
            self.sink = Operand("sink", given["sink"], plan, (None, 0), broadcasts=True)
        kinds = [part.split(":")[0] for part in given["bias"].split(";") if part]
        self.biases = [
            Operand(f"bias {kind}", t, plan, _BIAS_DIMS[kind], broadcasts=True)
            for kind, t in zip(kinds, given["bias_data"], strict=True)
        ]
        results = {n: Operand(n, given[n], plan, (0, 1), strict=False) for n in _RESULTS if given.get(n) is not None}
        local = dict(given)
        local["mask"], local["mask_data"] = _mask_part(given["mask"], given["mask_data"], plan)
        for name in ("q_pos", "k_pos", "key_padding"):
            local[name] = entries(given[name], plan)
        local["seed"] = _agreed(given["seed"], plan)
        batch, head = given["origin"]
        local["origin"] = [batch + plan.batch.start, head + plan.heads.start]
        if given["dropout_p"] and local["origin"][1] and given["backend"] == "triton":
            local["backend"] = "blocked"  # the kernels' dropout counts heads from 0
        for name, operand in {"q": self.q, "k": self.k, "v": self.v, **results}.items():
            local[name] = operand.local()
        local["sink"] = None if self.sink is None else self.sink.local()
        local["bias_data"] = [operand.local() for operand in self.biases]
        self.local = [local[name] for name in names]


_RESULTS = ("dout", "dlse", "out", "lse")


# --- what is not differentiable ---------------------------------------------------------------------------------


def _agreed(seed: Tensor | None, plan: Plan) -> Tensor | None:
    """One seed for all ranks: that of the first."""
    if seed is None or plan.mesh.size() == 1:
        return seed
    seed = seed.to(plan.mesh.device_type, copy=True)
    for i in range(plan.mesh.ndim):
        torch.distributed.broadcast(seed, group=plan.mesh.get_group(i), group_src=0)
    return seed


def _mask_part(text: str, data: Sequence[Tensor], plan: Plan) -> tuple[str, Sequence[Tensor]]:
    """The mask or layout of this rank's batch entries and heads, as text and tensors."""
    if not plan.divided:
        return text, data
    if text.startswith("ids("):
        raise UnsupportedError("a layout of ids chosen under torch.compile cannot be divided; choose outside of it")
    value = operator.mask_value(text, data)
    parts = _parts.setdefault(value, {})
    where = (plan.batch, plan.heads)
    if where not in parts:
        parts[where] = _cut_layout(value, plan) if isinstance(value, TileLayout) else _cut_mask(value, plan)
    part = parts[where]
    if part is None:
        return text, data
    return part.flatten() if isinstance(part, TileLayout) else (part.text, list(part.data))


# None stands for the whole, which must not be kept alive by itself
_parts: WeakKeyDictionary[Mask | TileLayout, dict[Any, Mask | TileLayout | None]] = WeakKeyDictionary()


def _cut_mask(mask: Mask, plan: Plan) -> Mask | None:
    part = mask.batch(plan.batch.start, plan.batch.stop).heads(plan.heads.start, plan.heads.stop)
    return None if part is mask else part


def _cut_layout(layout: TileLayout, plan: Plan) -> TileLayout:
    cuts = [slice(None), slice(None)]
    for axis, part in ((BATCH, plan.batch), (HEADS, plan.heads)):
        if layout.index.shape[axis] > 1:
            cuts[axis] = slice(part.start, part.stop)
    batch = slice(plan.batch.start, plan.batch.stop)
    index = layout.index[cuts[0], cuts[1]].contiguous()
    fields: dict[str, Any] = {}
    if layout.ids is not None:
        # in this storage the index counts the lists of ids, each of which may serve several neighbouring heads
        each = layout.index.shape[HEADS] // max(1, layout.ids.shape[HEADS])
        lists = torch.arange(layout.index.shape[HEADS], device=index.device)[cuts[1]] // max(1, each)
        own = slice(int(lists[0]), int(lists[-1]) + 1) if len(lists) else slice(0)
        entries = torch.arange(index.shape[0], device=index.device)[:, None]
        index = (entries * (own.stop - (own.start or 0)) + lists - (own.start or 0)).to(index.dtype)
        for name in ("ids", "ids_count", "ids_mask"):
            t = getattr(layout, name)
            fields[name] = None if t is None else t[cuts[0], own].contiguous()
    for name in ("q_pos", "k_pos"):
        t = getattr(layout, name)
        fields[name] = t if t is None or t.dim() == 1 else t[batch].contiguous()
    batch_size, heads = (
        len(part) if size > 1 else size
        for part, size in ((plan.batch, layout.batch), (plan.heads, layout.heads))
    )
    return replace(layout, index=index, batch=batch_size, heads=heads, **fields)
