"""What every rank computes and sends under a scheme, step by step, without running it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..common.errors import UnsupportedError
from ..mask import Mask
from . import execution
from .areas import Array
from .deal import Deal
from .execution import SCHEMES
from .pairs import needed_rows, pair_areas, pairs

__all__ = ["SCHEMES", "Move", "Plan", "Sizes", "Step", "needed_rows", "pair_areas", "plan"]


@dataclass(frozen=True)
class Sizes:
    """The shape of a call of attention over the whole sequence.

    Attributes:
        heads: Query heads.
        kv_heads: Key heads; as many as query heads by default.
        dim: Width of queries and keys.
        value_dim: Width of values; ``dim`` by default.
        batch: Batch entries.
        itemsize: Bytes of an element of q, k and v. Gradients and log-normalisers travel in float32, or in float64
            for float64.
    """

    heads: int
    kv_heads: int = 0
    dim: int = 64
    value_dim: int = 0
    batch: int = 1
    itemsize: int = 2

    def __post_init__(self) -> None:
        """Fills in what follows from the rest."""
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "value_dim", self.value_dim or self.dim)
        if self.heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads: {self.heads} query heads must be a multiple of {self.kv_heads} key heads")

    @property
    def wide(self) -> int:
        """Bytes of an element of a gradient."""
        return max(self.itemsize, 4)

    @property
    def kv(self) -> int:
        """Elements of the keys and values of one token and key head, over the batch."""
        return self.batch * (self.dim + self.value_dim)


class Move(NamedTuple):
    """Messages of a step that go from every rank to one other.

    Attributes:
        to: int64 ``(world,)``: where each rank sends.
        sent: int64 ``(world,)``: how many bytes.
        due: How many steps later they must be there: 1, or more for the outer transfers of a double ring.
    """

    to: Array
    sent: Array
    due: int = 1


class Step(NamedTuple):
    """What happens at once: compute, and messages that travel meanwhile.

    Attributes:
        area: int64 ``(world,)``: visible pairs that every rank computes, over batch entries and heads.
        moves: Messages to one rank each.
        among: int64 ``(world, world)``: bytes from each rank to each, where every rank sends to several.
    """

    area: Array
    moves: tuple[Move, ...] = ()
    among: Array | None = None

    @property
    def sent(self) -> Array:
        """int64 ``(world,)``: bytes that every rank sends."""
        many = np.zeros_like(self.area) if self.among is None else self.among.sum(1)
        return sum((move.sent for move in self.moves), many)


@dataclass(frozen=True, eq=False)
class Plan:
    """A scheme applied to one call; see `plan`.

    Attributes:
        mask: Over the whole sequence.
        deal: How its tokens are dealt.
        scheme: A name in `SCHEMES`.
        sizes: The shape of the call.
        degree: Ranks that divide the heads; they are neighbours.
        window: Ranks of an inner ring among the equal places of all groups; all of them but for a double ring.
    """

    mask: Mask
    deal: Deal
    scheme: str
    sizes: Sizes
    degree: int = 1
    window: int = 1

    def forward(self) -> Iterator[Step]:
        """Steps of the forward pass; a step begins when compute and messages of the one before are done."""
        return _STEPS.get(self.scheme, _visits)(self, False)

    def backward(self) -> Iterator[Step]:
        """Steps of the backward pass. Areas are those of the forward pass: operations per pair are more."""
        return _STEPS.get(self.scheme, _visits)(self, True)

    @cached_property
    def areas(self) -> Array:
        """int64 ``(world,)``: visible pairs that every rank computes, over batch entries and heads."""
        return sum((step.area for step in self.forward()), self._zeros)

    @cached_property
    def forward_bytes(self) -> Array:
        """int64 ``(world,)``: bytes that every rank sends in the forward pass."""
        return sum((step.sent for step in self.forward()), self._zeros)

    @cached_property
    def backward_bytes(self) -> Array:
        """int64 ``(world,)``: bytes that every rank sends in the backward pass."""
        return sum((step.sent for step in self.backward()), self._zeros)

    @property
    def imbalance(self) -> float:
        """The largest area of a rank over the mean; 1.0 is perfect."""
        return float(self.areas.max() / self.areas.mean()) if self.areas.any() else 1.0

    @property
    def _zeros(self) -> Array:
        return np.zeros(self.deal.world, dtype=np.int64)

    @cached_property
    def rows(self) -> Array:
        """int64 ``(world,)``: tokens of every rank."""
        return np.asarray(self.deal.counts, dtype=np.int64)

    @cached_property
    def _pairs(self) -> tuple[Array, Array]:
        """Areas by rank of query and key for all heads, and needed key rows."""
        area, rows = pairs(self.mask, self.deal)
        return area * self._repeats(self.sizes.heads), rows

    @property
    def fetched(self) -> Array:
        """int64 ``(world,)``: keys of other ranks that every rank needs, as `groupcast` fetches them."""
        rows = self._pairs[1]
        return rows.sum(1) - np.diagonal(rows)

    def _repeats(self, heads: int) -> int:
        """Batch entries and heads that share an entry of the mask."""
        batch, own = self.mask.shape
        return self.sizes.batch // batch * (heads if own == 1 else 1)

    @cached_property
    def _by_slice(self) -> list[Array]:
        """``(groups, groups)`` areas between groups of neighbours, for the heads of each rank in a group."""
        share, groups = self.sizes.heads // self.degree, self.deal.world // self.degree
        masks = [self.mask.heads(u * share, (u + 1) * share) for u in range(self.degree)]
        known: dict[Mask, Array] = {}
        for mask in masks:
            if mask not in known:
                area = pairs(mask, self.deal)[0] * self._repeats(share)
                known[mask] = area.reshape(groups, self.degree, groups, self.degree).sum((1, 3))
        return [known[mask] for mask in masks]

    @cached_property
    def kv_heads(self) -> Array:
        """int64 ``(degree,)``: key heads that each rank of a group reads for its share of the query heads."""
        share, group = self.sizes.heads // self.degree, self.sizes.heads // self.sizes.kv_heads
        first = np.arange(self.degree) * share
        return (first + share - 1) // group - first // group + 1


def plan(
    mask: Mask, deal: Deal, scheme: str, sizes: Sizes, *, degree: int | None = None, window: int | None = None
) -> Plan:
    """Plans one call of attention on many ranks.

    Args:
        mask: Over the whole sequence.
        deal: How its tokens are dealt.
        scheme: A name in `SCHEMES`.
        sizes: The shape of the call.
        degree: Ranks that divide the heads, as for ``context``.
        window: Ranks of a window of a double ring, as for ``context``.

    Returns:
        The plan.

    Raises:
        ValueError: An unknown scheme, or a degree or window that does not divide the ranks.
        UnsupportedError: Heads that cannot be divided.

    Example:
        >>> from manyheads.mask import Causal
        >>> from manyheads.parallel.deal import zigzag
        >>> found = plan(Causal(), zigzag(4096, 4), "ring", Sizes(heads=8, kv_heads=2, dim=64))
        >>> found.imbalance, found.forward_bytes.tolist()
        (1.0, [1572864, 1572864, 1572864, 1572864])
    """
    known = execution.degree_of(scheme, deal.world, degree)
    degree = execution.widest(deal.world, sizes.heads, sizes.kv_heads) if known is None else known
    ring = deal.world // degree
    window = execution.window_of(ring, window) if scheme == "double_ring" else ring
    if reasons := execution.refuse(scheme, degree, sizes.heads, sizes.kv_heads):
        raise UnsupportedError("; ".join(reasons))
    for axis, size, own in (("batch", sizes.batch, mask.shape[0]), ("heads", sizes.heads, mask.shape[1])):
        if own not in (1, size):
            raise ValueError(f"mask: expected 1 or {size} {axis}, got {own}")
    return Plan(mask, deal, scheme, sizes, degree, window)


def _visits(p: Plan, backward: bool) -> Iterator[Step]:
    """Blocks of keys and values visit all groups of ranks, in the backward pass followed by their gradients."""
    s, degree, window = p.sizes, p.degree, p.window
    rank, groups = np.arange(p.deal.world), p.deal.world // degree
    group, place = np.divmod(rank, degree)
    outer, inner = np.divmod(group, window)
    windows = groups // window

    def at(outer: Array, inner: Array) -> Array:
        return outer % windows * window + inner % window

    if degree > 1:
        yield _divided(p, backward)
    kv = p.kv_heads[place] * s.kv
    tokens = p.rows.reshape(groups, degree).sum(1)
    areas = np.stack(p._by_slice)
    held = [at(outer - t // window, inner - t % window) for t in range(groups)]
    behind: tuple[Move, ...] = ()
    for t in range(groups):
        moves = []
        block = tokens[held[t]] * kv
        if t % window == 0 and t < groups - window:
            moves.append(Move(at(outer + 1, inner) * degree + place, block * s.itemsize, window))
        if t % window < window - 1:
            moves.append(Move(at(outer, inner + 1) * degree + place, block * s.itemsize))
        yield Step(areas[place, group, held[t]], (*moves, *behind))
        if backward and groups > 1:  # gradients leave when they are computed, while the next block is
            owner, after = np.divmod(held[t], window), np.divmod(t + 1, window) if t + 1 < groups else (0, 0)
            onward = at(owner[0] + after[0], owner[1] + after[1])  # to who has the block next, at last to its owner
            behind = (Move(onward * degree + place, block * s.wide),)
    if behind:
        yield Step(p._zeros, behind)
    if degree > 1:
        yield _united(p, backward)


def _divided(p: Plan, backward: bool) -> Step:
    """Tokens for heads: q, k and v, or the gradient of the output."""
    s, share = p.sizes, p.sizes.batch * p.sizes.heads // p.degree
    place = np.arange(p.deal.world) % p.degree
    near = _near(p)
    if backward:
        return Step(p._zeros, (), p.rows[:, None] * near * share * s.value_dim * s.itemsize)
    return Step(p._zeros, (), p.rows[:, None] * near * (share * s.dim + p.kv_heads[place] * s.kv) * s.itemsize)


def _united(p: Plan, backward: bool) -> Step:
    """Heads for tokens: output and log-normaliser, or the gradients of q, k and v."""
    s, share = p.sizes, p.sizes.batch * p.sizes.heads // p.degree
    place = np.arange(p.deal.world) % p.degree
    near = _near(p)
    if backward:
        each = (share * s.dim + p.kv_heads[place] * s.kv)[:, None] * s.wide
        return Step(p._zeros, (), p.rows[None, :] * near * each)
    return Step(p._zeros, (), p.rows[None, :] * near * share * (s.value_dim * s.itemsize + s.wide))


def _near(p: Plan) -> Array:
    group = np.arange(p.deal.world) // p.degree
    return (group[:, None] == group) & ~np.eye(p.deal.world, dtype=bool)


def _gather(p: Plan, backward: bool) -> Iterator[Step]:
    s = p.sizes
    own = p.rows * s.kv_heads * s.kv
    others = 1 - np.eye(p.deal.world, dtype=np.int64)
    yield Step(p._zeros, (), own[:, None] * others * s.itemsize)
    yield Step(p._pairs[0].sum(1))
    if backward:
        yield Step(p._zeros, (), own[None, :] * others * s.wide)


def _groupcast(p: Plan, backward: bool) -> Iterator[Step]:
    s, (area, rows) = p.sizes, p._pairs
    moved = rows.T * (1 - np.eye(p.deal.world, dtype=np.int64)) * s.kv_heads * s.kv  # from source to where needed
    yield Step(np.diagonal(area).copy(), (), moved * s.itemsize)
    yield Step(area.sum(1) - np.diagonal(area))
    if backward:
        yield Step(p._zeros, (), moved.T * s.wide)


_STEPS: dict[str, Callable[[Plan, bool], Iterator[Step]]] = {"gather": _gather, "groupcast": _groupcast}
