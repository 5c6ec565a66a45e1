"""Sharded tensors: how the operators run where DTensors hold the batch or the heads in parts.

Every rank runs the operator on its part of the batch and of the heads, with its part of the mask, and nothing is
communicated but what joins the gradients of what several ranks hold. ``torch.distributed.tensor`` takes half a
second to import, so the rules are registered when the first DTensor comes.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...common.errors import UnsupportedError
from ...mask.base import Mask
from ...mask.layout import TileLayout
from . import op as operator
from .reference import recording

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

BATCH, HEADS = 0, 1
_NAMES = {BATCH: "batch entries", HEADS: "heads"}
_BIAS_DIMS = {"alibi": (None, 0), "relative": (None, 0), "pair": (0, 1), "per_key": (0, 1), "per_block": (0, 1)}


def seen(*tensors: object) -> bool:
    """Whether a tensor is a DTensor; the first one has the operators' rules registered.

    Args:
        *tensors: Anything.

    Returns:
        True for at least one DTensor.

    Example:
        >>> seen(torch.ones(2), None)
        False
    """
    if torch.compiler.is_compiling():
        return False
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not any(isinstance(t, module.DTensor) for t in tensors):
        return False
    _register()
    return True


@functools.cache
def _register() -> None:
    from torch.distributed.tensor import DTensor

    for name, rule in (("tiled", _forward), ("tiled_backward", _backward)):
        torch.library.register_torch_dispatch(f"manyheads::{name}", DTensor, rule)


def replicated(t: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that every rank holds whole as a DTensor on a mesh; a DTensor as it is."""
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(t, DTensor):
        return t
    return DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)


@dataclass(frozen=True)
class Plan:
    """Which part of a call this rank computes.

    Attributes:
        mesh: The devices.
        axes: For each dimension of the mesh what it divides: 0 the batch, 1 the heads, None nothing.
        batch: Batch entries of this rank.
        heads: Query heads of this rank.
        kv: The key heads that these read.
        sizes: Batch entries, query heads and key heads of the whole call.
    """

    mesh: DeviceMesh
    axes: tuple[int | None, ...]
    batch: range
    heads: range
    kv: range
    sizes: tuple[int, int, int]

    @property
    def divided(self) -> bool:
        """Whether some rank computes less than the whole call."""
        return any(axis is not None and self.mesh.size(i) > 1 for i, axis in enumerate(self.axes))

    def __str__(self) -> str:
        batch, heads = (f"{part.start} to {part.stop - 1}" for part in (self.batch, self.heads))
        return (
            f"DTensors: this rank computes batch entries {batch} of {self.sizes[0]} and heads {heads} of "
            f"{self.sizes[1]}"
        )

    def part(self, size: int, axis: int, among: Sequence[bool] | None = None) -> range:
        """This rank's part of a dimension of ``size``, cut by all mesh dimensions of an axis or by those ``among``."""
        whole = range(size)
        for i, n, at in self._cuts(axis):
            if among is None or among[i]:
                whole = _chunk(whole, n, at)
        return whole

    def _cuts(self, axis: int) -> list[tuple[int, int, int]]:
        coordinate = self.mesh.get_coordinate()
        assert coordinate is not None
        return [(i, self.mesh.size(i), coordinate[i]) for i, a in enumerate(self.axes) if a == axis]


def plan_of(q: Tensor, k: Tensor, v: Tensor) -> Plan:
    """What each rank computes of a call on DTensors.

    Args:
        q: ``(B, Hq, Nq, D)``, sharded on batch or heads or replicated, over each dimension of its mesh.
        k: ``(B, Hkv, Nk, D)``: as ``q`` or replicated.
        v: ``(B, Hkv, Nk, Dv)``: as ``q`` or replicated.

    Returns:
        The plan of this rank.

    Raises:
        TypeError: For a plain tensor among them.
        ValueError: For meshes that differ, placements that contradict each other, or sizes that do not divide.
        UnsupportedError: When tokens or channels are sharded.
    """
    mesh = _common_mesh(q, k, v)
    axes: list[int | None] = []
    for i in range(mesh.ndim):
        given = {name: _axis(name, t, i) for name, t in zip("qkv", (q, k, v), strict=True)}
        found = {axis for axis in given.values() if axis is not None}
        if len(found) > 1:
            each = ", ".join(f"{name} on its {_NAMES[axis]}" for name, axis in given.items() if axis is not None)
            raise ValueError(f"q, k, v: {_where(mesh, i)} shards {each}; redistribute them alike")
        axes.append(found.pop() if found else None)
    batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    shards = {axis: math.prod(mesh.size(i) for i, a in enumerate(axes) if a == axis) for axis in (BATCH, HEADS)}
    last = range(batch)
    for i, axis in enumerate(axes):
        last = _chunk(last, mesh.size(i), mesh.size(i) - 1) if axis == BATCH else last
    if batch and not last:
        raise ValueError(f"q: a batch of {batch} leaves some of {shards[BATCH]} ranks without an entry; shard less")
    own_heads, group = heads // shards[HEADS], heads // max(1, kv_heads)
    if heads % shards[HEADS] or (heads and own_heads % group and group % own_heads):
        raise ValueError(
            f"q: {heads} heads over {kv_heads} heads of k and v cannot be sharded over {shards[HEADS]} ranks: every "
            "rank needs equally many, in whole groups or within one"
        )
    plan = Plan(mesh, tuple(axes), range(0), range(0), range(0), (batch, heads, kv_heads))
    own = plan.part(heads, HEADS)
    kv = range(own.start // group, -(-own.stop // group)) if group else range(kv_heads)
    return replace(plan, batch=plan.part(batch, BATCH), heads=own, kv=kv)


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
        self.q, self.k, self.v = (_Operand(name, given[name], plan, (0, 1)) for name in "qkv")
        self.sink = None if given["sink"] is None else _Operand("sink", given["sink"], plan, (None, 0))
        kinds = [part.split(":")[0] for part in given["bias"].split(";") if part]
        self.biases = [
            _Operand(f"bias {kind}", t, plan, _BIAS_DIMS[kind])
            for kind, t in zip(kinds, given["bias_data"], strict=True)
        ]
        results = {n: _Operand(n, given[n], plan, (0, 1), strict=False) for n in _RESULTS if given.get(n) is not None}
        local = dict(given)
        local["mask"], local["mask_data"] = _mask_part(given["mask"], given["mask_data"], plan)
        for name in ("q_pos", "k_pos", "key_padding"):
            local[name] = _entries(given[name], plan)
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


class _Operand:
    """One tensor of a call: what a rank takes of it, and how its gradient is put together.

    A DTensor is taken as it is sharded where that is what the plan divides; where it is replicated, or a plain
    tensor that every rank holds, the rank takes its part, and gradients of the parts are added up.
    """

    def __init__(
        self, name: str, given: Tensor, plan: Plan, dims: tuple[int | None, int], strict: bool = True
    ) -> None:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        self.name, self.given, self.plan = name, given, plan
        kv = name in ("k", "v")
        # a size of one in a bias is shared by all; in q, k and v it is the size
        self.dims = {
            axis: dim
            for axis, dim in enumerate(dims)
            if dim is not None and (given.shape[dim] > 1 or name in ("q", "k", "v", *_RESULTS))
        }
        self.wanted = {BATCH: plan.batch, HEADS: plan.kv if kv else plan.heads}
        self.placed = [False] * plan.mesh.ndim
        if isinstance(given, DTensor):
            parts = dict.fromkeys(self.dims, 1)
            for i, axis in enumerate(plan.axes):
                if axis in parts:
                    parts[axis] *= plan.mesh.size(i)
                    # fewer key heads than ranks: every rank of a group holds the group's head
                    self.placed[i] = axis == BATCH or given.shape[self.dims[axis]] % parts[axis] == 0
        self.target: list[Placement] = [
            Shard(self.dims[axis]) if placed and axis is not None else Replicate()
            for axis, placed in zip(plan.axes, self.placed, strict=True)
        ]
        if strict and isinstance(given, DTensor):
            self._check(given)

    def _check(self, given: DTensor) -> None:
        if given.device_mesh != self.plan.mesh:
            raise ValueError(f"{self.name}: expected the mesh of q, {self.plan.mesh}, got {given.device_mesh}")
        for i, (has, target) in enumerate(zip(given.placements, self.target, strict=True)):
            if has != target and not (has.is_replicate() or has.is_partial()):
                raise ValueError(
                    f"{self.name}: {_where(self.plan.mesh, i)} has it as {has!r}, where this call needs {target!r} "
                    "or Replicate(); redistribute it"
                )

    def local(self) -> Tensor:
        """What this rank's operator gets."""
        from torch.distributed.tensor import DTensor

        part = self.given
        if isinstance(part, DTensor):
            part = part.redistribute(placements=self.target).to_local()
        for axis, dim in self.dims.items():
            at = self._inside(axis)
            part = part.narrow(dim, at.start, len(at))
        return part

    def gradient(self, local: Tensor) -> Tensor:
        """The gradient of the whole tensor, placed as the tensor is, from that of this rank's part."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        shape = list(local.shape)
        for axis, dim in self.dims.items():
            shape[dim] = len(self._held(axis))
        if shape != list(local.shape):
            whole = local.new_zeros(shape)
            part = whole
            for axis, dim in self.dims.items():
                at = self._inside(axis)
                part = part.narrow(dim, at.start, len(at))
            part.copy_(local)
            local = whole
        summed = [
            target if placed else Replicate() if axis is None else Partial()
            for target, placed, axis in zip(self.target, self.placed, self.plan.axes, strict=True)
        ]
        if not isinstance(self.given, DTensor):
            return self._distributed(local, summed).redistribute(placements=[Replicate()] * len(summed)).to_local()
        final = [Replicate() if p.is_partial() else p for p in self.given.placements]
        return self._distributed(local, summed).redistribute(placements=final)

    def joined(self, local: Tensor) -> Tensor:
        """A result of this rank as its part of a whole, sharded as this operand is."""
        return self._distributed(local, self.target, [*self.given.shape[:2], *local.shape[2:]])

    def _distributed(self, local: Tensor, placements: Sequence[Any], shape: Sequence[int] | None = None) -> DTensor:
        from torch.distributed.tensor import DTensor

        size = torch.Size(self.given.shape if shape is None else shape)
        stride = torch.empty(size, device="meta").stride()
        return DTensor.from_local(local, self.plan.mesh, placements, run_check=False, shape=size, stride=stride)

    def _held(self, axis: int) -> range:
        """What this rank holds of an axis after redistribution."""
        return self.plan.part(self.given.shape[self.dims[axis]], axis, self.placed)

    def _inside(self, axis: int) -> range:
        """What this rank computes of an axis, within what it holds."""
        held, wanted = self._held(axis), self.wanted[axis]
        return range(wanted.start - held.start, wanted.stop - held.start)


# --- what is not differentiable ---------------------------------------------------------------------------------


def _entries(t: Tensor | None, plan: Plan) -> Tensor | None:
    """This rank's batch entries of positions or of a padding mask."""
    from torch.distributed.tensor import DTensor

    if t is None:
        return None
    t = t.full_tensor() if isinstance(t, DTensor) else t
    return t if t.dim() == 1 else t[plan.batch.start : plan.batch.stop]


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
    value = operator._value(text, data)
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
        # in this storage the index counts the rows of ids
        index = torch.arange(index.numel(), dtype=index.dtype, device=index.device).view(index.shape)
        for name in ("ids", "ids_count", "ids_mask"):
            t = getattr(layout, name)
            fields[name] = None if t is None else t[cuts[0], cuts[1]].contiguous()
    for name in ("q_pos", "k_pos"):
        t = getattr(layout, name)
        fields[name] = t if t is None or t.dim() == 1 else t[batch].contiguous()
    batch_size, heads = (
        len(part) if size > 1 else size
        for part, size in ((plan.batch, layout.batch), (plan.heads, layout.heads))
    )
    return replace(layout, index=index, batch=batch_size, heads=heads, **fields)


# --- placements -------------------------------------------------------------------------------------------------


def _common_mesh(q: Tensor, k: Tensor, v: Tensor) -> DeviceMesh:
    from torch.distributed.tensor import DTensor

    mesh: DeviceMesh | None = None
    for name, t in zip("qkv", (q, k, v), strict=True):
        if not isinstance(t, DTensor):
            raise TypeError(
                f"{name}: a plain tensor beside DTensors; make it one with torch.distributed.tensor.distribute_tensor"
            )
        mesh = t.device_mesh if mesh is None else mesh
        if t.device_mesh != mesh:
            raise ValueError(f"{name}: expected the mesh of q, {mesh}, got {t.device_mesh}")
    assert mesh is not None
    if mesh.get_coordinate() is None:
        raise ValueError(f"q: this rank is not part of its mesh {mesh}; call attention on the ranks of the mesh only")
    return mesh


def _axis(name: str, t: Any, i: int) -> int | None:
    """What a dimension of the mesh divides of one of q, k, v."""
    from torch.distributed.tensor import Shard

    placement = t.placements[i]
    if placement.is_replicate() or placement.is_partial():
        return None
    if isinstance(placement, Shard) and placement.dim in (BATCH, HEADS):
        return placement.dim
    what = {2: "its tokens", 3: "its channels"}.get(getattr(placement, "dim", -1), "it in an order of its own")
    raise UnsupportedError(
        f"{name}: {_where(t.device_mesh, i)} shards {what} ({placement!r}); attention on DTensors takes shards of the "
        "batch, Shard(0), or of the heads, Shard(1): redistribute q, k and v to one of them (from tokens to heads it "
        "is one exchange, as in Ulysses)"
    )


def _where(mesh: DeviceMesh, i: int) -> str:
    return f"mesh dimension {mesh.mesh_dim_names[i]!r}" if mesh.mesh_dim_names else f"mesh dimension {i}"


def _chunk(part: range, n: int, at: int) -> range:
    """Part ``at`` of ``n``, as torch cuts a dimension: equal parts but for the last."""
    size = -(-len(part) // n)
    start, stop = (part.start + min(x * size, len(part)) for x in (at, at + 1))
    return range(start, stop)
