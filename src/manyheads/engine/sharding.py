"""Sharded tensors: what a rank computes of a call whose DTensors hold the batch or the heads in parts.

Every rank runs the operator on its part of the batch and of the heads, and nothing is communicated but what joins the
gradients of what several ranks hold. ``torch.distributed.tensor`` takes half a second to import, so an engine registers
its rules when the first DTensor comes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

BATCH, HEADS = 0, 1
_NAMES = {BATCH: "batch entries", HEADS: "heads"}


def seen(*tensors: object) -> bool:
    """Whether a tensor is a DTensor.

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
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def register(rules: Mapping[str, Callable[..., Any]]) -> None:
    """Registers what operators of this package do on DTensors.

    Args:
        rules: For the name of each operator a function as ``torch.library.register_torch_dispatch`` wants it.
    """
    from torch.distributed.tensor import DTensor

    for name, rule in rules.items():
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


class Operand:
    """One tensor of a call: what a rank takes of it, and how its gradient is put together.

    A DTensor is taken as it is sharded where that is what the plan divides; where it is replicated, or a plain
    tensor that every rank holds, the rank takes its part, and gradients of the parts are added up.
    """

    def __init__(
        self,
        name: str,
        given: Tensor,
        plan: Plan,
        dims: tuple[int | None, int],
        *,
        strict: bool = True,
        broadcasts: bool = False,
    ) -> None:
        """Looks at a tensor.

        Args:
            name: What to call it in errors; ``"k"`` and ``"v"`` have key heads.
            given: The tensor.
            plan: Which part of the call this rank computes.
            dims: Its dimensions of the batch and of the heads; None where it has none.
            strict: Whether it must be placed as the plan wants it, or replicated.
            broadcasts: Whether a size of one is shared by all; else it is the size.

        Raises:
            ValueError: It is placed otherwise.
        """
        from torch.distributed.tensor import DTensor, Replicate, Shard

        self.name, self.given, self.plan = name, given, plan
        kv = name in ("k", "v")
        self.dims = {
            axis: dim
            for axis, dim in enumerate(dims)
            if dim is not None and not (broadcasts and given.shape[dim] == 1)
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


def entries(t: Tensor | None, plan: Plan) -> Tensor | None:
    """This rank's batch entries of positions or of a padding mask."""
    from torch.distributed.tensor import DTensor

    if t is None:
        return None
    t = t.full_tensor() if isinstance(t, DTensor) else t
    return t if t.dim() == 1 else t[plan.batch.start : plan.batch.stop]


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
