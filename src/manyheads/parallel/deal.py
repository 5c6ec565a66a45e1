"""How the tokens of one long sequence are dealt to ranks: whole chunks, nearly as many tokens to each."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..common.errors import unknown
from ..mask import Document, Mask, TileLayout
from .areas import layout_of, query_areas

Array = np.ndarray
CHUNKS_PER_RANK = 32
SMALLEST = 16  # tokens per chunk below which smaller chunks are not tried
GOAL = 1.02  # largest area over the mean at which `balanced` stops halving chunks
LEVEL = 1.001  # where it stops swapping
NEAR_LEVEL = 1.04  # where `nearby` stops swapping


@dataclass(frozen=True)
class Deal:
    """Which tokens lie on which rank.

    The sequence of ``n`` tokens is cut into chunks of ``chunk`` tokens (the last may be shorter), and every rank
    holds whole chunks in ascending order. Ranks differ by at most one chunk of tokens; nothing is padded. With
    fewer tokens than ranks some ranks hold none.

    Attributes:
        n: Tokens of the whole sequence.
        chunk: Tokens per chunk.
        chunks: For each rank, the ascending indices of its chunks.

    Raises:
        ValueError: Chunks that are missing, held twice or out of range, or ranks whose tokens differ by more than
            one chunk.

    Example:
        >>> deal = zigzag(16, 2)
        >>> deal.chunks, deal.index(1).tolist()
        (((0, 3), (1, 2)), [4, 5, 6, 7, 8, 9, 10, 11])
        >>> parts = [deal.shard(torch.arange(16), rank, dim=0) for rank in range(2)]
        >>> deal.unshard(parts, dim=0).equal(torch.arange(16))
        True
    """

    n: int
    chunk: int
    chunks: tuple[Sequence[int], ...]

    def __post_init__(self) -> None:
        """Puts the chunks in order and holds the promise of the class."""
        if self.n < 1 or self.chunk < 1 or not self.chunks:
            raise ValueError(f"n, chunk, chunks: expected at least 1 token, chunk and rank, got {self.n}, {self.chunk}")
        object.__setattr__(self, "chunks", tuple(_ascending(part) for part in self.chunks))
        held = np.concatenate([np.asarray(part, dtype=np.int64) for part in self.chunks])
        count = -(-self.n // self.chunk)
        if len(held) != count or not np.array_equal(np.sort(held), np.arange(count)):
            raise ValueError(f"chunks: expected each of 0 to {count - 1} on exactly one rank, got {len(held)} chunks")
        if max(self.counts) - min(self.counts) > self.chunk:
            raise ValueError(f"chunks: ranks hold {self.counts} tokens; expected a difference of at most {self.chunk}")

    @property
    def world(self) -> int:
        """Number of ranks."""
        return len(self.chunks)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tokens of every rank."""
        last, short = -(-self.n // self.chunk) - 1, -self.n % self.chunk
        return tuple(len(part) * self.chunk - short * (len(part) > 0 and part[-1] == last) for part in self.chunks)

    @cached_property
    def owner(self) -> Tensor:
        """int64 ``(n,)``: the rank that holds each token."""
        by_chunk = np.empty(-(-self.n // self.chunk), dtype=np.int64)
        for rank, part in enumerate(self.chunks):
            by_chunk[np.asarray(part, dtype=np.int64)] = rank
        return torch.from_numpy(np.repeat(by_chunk, self.chunk)[: self.n])

    def index(self, rank: int) -> Tensor:
        """The tokens of a rank in the order in which it stores them.

        Args:
            rank: From 0 to ``world - 1``.

        Returns:
            int64 ``(counts[rank],)`` indices into the whole sequence, ascending: their logical positions.

        Raises:
            ValueError: No such rank.
        """
        if not 0 <= rank < self.world:
            raise ValueError(f"rank: expected 0 to {self.world - 1}, got {rank}")
        known: dict[int, Tensor] = self.__dict__.setdefault("_index", {})
        if rank not in known:
            start = np.asarray(self.chunks[rank], dtype=np.int64) * self.chunk
            tokens = (start[:, None] + np.arange(self.chunk)).reshape(-1)
            known[rank] = torch.from_numpy(tokens[: self.counts[rank]])  # a short chunk is the last one
        return known[rank]

    def positions(self, rank: int) -> Tensor:
        """Logical positions of a rank's tokens; the same as `index`."""
        return self.index(rank)

    def shard(self, x: Tensor, rank: int, dim: int = -2) -> Tensor:
        """The part of a tensor of the whole sequence that lies on a rank.

        Args:
            x: Any tensor with ``n`` entries along ``dim``.
            rank: Which rank.
            dim: The dimension of tokens; -2 as in ``(B, H, N, D)``.

        Raises:
            ValueError: Another size along ``dim``.
        """
        if x.shape[dim] != self.n:
            raise ValueError(f"x: expected {self.n} tokens along dim {dim}, got shape {tuple(x.shape)}")
        return x.index_select(dim, self.index(rank).to(x.device))

    def unshard(self, parts: Sequence[Tensor], dim: int = -2) -> Tensor:
        """The tensor of the whole sequence from the parts of all ranks, in order of rank; inverse of `shard`.

        Raises:
            ValueError: A part is missing or has another number of tokens.
        """
        sizes = tuple(part.shape[dim] for part in parts)
        if sizes != self.counts:
            raise ValueError(f"parts: expected {self.counts} tokens along dim {dim}, got {sizes}")
        return torch.cat(list(parts), dim).index_select(dim, self.inverse.to(parts[0].device))

    @cached_property
    def inverse(self) -> Tensor:
        """int64 ``(n,)``: where each token is when the parts of all ranks lie one after the other."""
        return torch.argsort(torch.cat([self.index(rank) for rank in range(self.world)]))

    def areas(self, mask: Mask | TileLayout) -> tuple[int, ...]:
        """Visible pairs whose query lies on each rank, exactly, over batch entries and heads of the mask.

        Args:
            mask: A mask, or its layout over the ``n`` tokens.

        Example:
            >>> from manyheads.mask import Causal
            >>> contiguous(8, 2).areas(Causal()), zigzag(8, 2).areas(Causal())
            ((10, 26), (18, 18))
        """
        sums = np.zeros(self.world, dtype=np.int64)
        np.add.at(sums, self.owner.numpy(), query_areas(layout_of(mask, self.n)))
        return tuple(sums.tolist())

    def imbalance(self, mask: Mask | TileLayout) -> float:
        """The largest area of a rank over the mean area; 1.0 is perfect."""
        return _imbalance(np.asarray(self.areas(mask), dtype=np.float64))


def deal(shard: str | Deal, mask: Mask | None, n: int, world: int, *, chunk: int | None = None) -> Deal:
    """Deals tokens by the name of a way, or checks a given deal.

    Args:
        shard: A name in `DEALS`, or a deal.
        mask: What ``"balanced"`` and ``"nearby"`` balance and ``"per_document"`` finds documents in; the others do
            not look at it.
        n: Tokens.
        world: Ranks.
        chunk: Tokens per chunk; chosen by default.

    Raises:
        ValueError: An unknown name, or a deal of another size.

    Example:
        >>> from manyheads.mask import Causal
        >>> deal("balanced", Causal(), 4096, 4).imbalance(Causal()) < 1.02
        True
    """
    if isinstance(shard, Deal):
        if (shard.n, shard.world) != (n, world):
            raise ValueError(f"shard: expected {n} tokens on {world} ranks, got {shard.n} on {shard.world}")
        return shard
    if shard not in DEALS:
        raise unknown("shard", shard, DEALS)
    return DEALS[shard](mask, n, world, chunk)


def contiguous(n: int, world: int, *, chunk: int | None = None) -> Deal:
    """Deals one stretch of the sequence to each rank: least communication, worst balance under a causal mask.

    Args:
        n: Tokens.
        world: Ranks.
        chunk: Tokens per chunk; ``n / world`` by default where that is whole.
    """
    chunk = _checked(n, world, chunk, None if n % world else n // world)
    count = -(-n // chunk)
    more = [rank >= world - count % world for rank in range(world)]  # the short chunk is the last rank's
    sizes = count // world + np.asarray(more, dtype=np.int64)
    return Deal(n, chunk, _stretches(sizes))


def zigzag(n: int, world: int, *, chunk: int | None = None) -> Deal:
    """Deals stretches ``r`` and ``2 world - 1 - r`` to rank ``r``: equal areas under a causal mask.

    Args:
        n: Tokens.
        world: Ranks.
        chunk: Tokens per chunk; ``n / (2 world)`` by default where that is whole, so that areas are exactly equal.

    Example:
        >>> from manyheads.mask import Causal
        >>> set(zigzag(48, 4).areas(Causal()))
        {294}
    """
    chunk = _checked(n, world, chunk, None if n % (2 * world) else n // (2 * world))
    count = -(-n // chunk)
    extra, sizes = count % (2 * world), np.full(2 * world, count // (2 * world))
    sizes[: min(extra, world)] += 1
    if extra > world:  # the mirrored stretches of the first ranks, so that every rank gets its second one
        sizes[2 * world - (extra - world) :] += 1
    blocks = _stretches(sizes)
    return Deal(n, chunk, tuple([*blocks[r], *blocks[2 * world - 1 - r]] for r in range(world)))


def striped(n: int, world: int, *, chunk: int | None = None) -> Deal:
    """Deals chunk ``i`` to rank ``i % world``: nearly equal areas under a causal mask, also of every ring step.

    Args:
        n: Tokens.
        world: Ranks.
        chunk: Tokens per chunk, 1 by default.
    """
    chunk = _checked(n, world, chunk, 1)
    return Deal(n, chunk, tuple(range(rank, -(-n // chunk), world) for rank in range(world)))


def per_document(mask: Mask | Sequence[int], n: int, world: int, *, chunk: int | None = None) -> Deal:
    """Deals a zigzag inside each document: its first and last chunk to one rank, the next two to the next.

    Args:
        mask: A mask with a `Document` in it, or the document lengths.
        n: Tokens.
        world: Ranks.
        chunk: Tokens per chunk; a chunk belongs to the document of its first token.

    Raises:
        ValueError: No documents, documents of several kinds, or lengths that do not sum to ``n``.

    Example:
        >>> per_document([8, 8], 16, 2, chunk=2).chunks
        ((0, 3, 4, 7), (1, 2, 5, 6))
    """
    lengths = _lengths(mask) if isinstance(mask, Mask) else tuple(int(length) for length in mask)
    if sum(lengths) != n:
        raise ValueError(f"mask: expected documents of {n} tokens together, got {sum(lengths)}")
    chunk = _checked(n, world, chunk, None)
    count = -(-n // chunk)
    document = np.searchsorted(np.cumsum(lengths), np.arange(count) * chunk, side="right")
    place = np.empty(count, dtype=np.int64)
    for part in np.split(np.arange(count), np.flatnonzero(np.diff(document)) + 1):
        half = (len(part) + 1) // 2
        place[part[0] : part[0] + len(part) : 2] = part[:half]
        place[part[0] + 1 : part[0] + len(part) : 2] = part[half:][::-1]
    whole = count - count % (2 * world)
    rank = np.empty(count, dtype=np.int64)
    rank[place[:whole]] = np.arange(whole) // 2 % world
    rank[place[whole:]] = np.arange(count - whole) % world
    return _settled(n, chunk, rank, world)


def balanced(mask: Mask | TileLayout, n: int, world: int, *, chunk: int | None = None) -> Deal:
    """Deals chunks so that the largest area of a rank is as small as can be found.

    The exact area of every chunk comes from the layout. The largest chunk goes to the rank with the least area that
    still has room, and so on; then the fullest rank swaps chunks with others while that helps. When no size of
    chunks is given, chunks are halved until the largest area is within 2% of the mean or chunks are 16 tokens.

    Args:
        mask: A mask, or its layout.
        n: Tokens.
        world: Ranks.
        chunk: Tokens per chunk.

    Source:
        The constraint of equal counts and the min-heap: MagiAttention.

    Example:
        >>> from manyheads.mask import Causal, Document
        >>> mask = Causal() & Document([700, 100, 1000, 248])
        >>> contiguous(2048, 4).imbalance(mask) > 1.3, balanced(mask, 2048, 4).imbalance(mask) < 1.02
        (True, True)
    """
    return _refined(mask, n, world, (chunk, _checked(n, world, chunk, None)), _greedy, (LEVEL, GOAL))


def nearby(mask: Mask | TileLayout, n: int, world: int, *, chunk: int | None = None) -> Deal:
    """Deals stretches as `contiguous` does, then swaps chunks only until the largest area is within 4% of the mean.

    Neighbouring tokens mostly stay together, so that `groupcast` sends far fewer rows than under `balanced`.

    Args:
        mask: A mask, or its layout.
        n: Tokens.
        world: Ranks.
        chunk: Tokens per chunk; halved as in `balanced` when it is not given.

    Example:
        >>> from manyheads.mask import Causal, Document
        >>> nearby(Causal() & Document([512] * 8), 4096, 8).chunks[3]  # equal already: nothing moves
        range(96, 128)
    """
    start = (chunk, _checked(n, world, chunk, None))
    return _refined(mask, n, world, start, _in_order, (NEAR_LEVEL, NEAR_LEVEL))


def _refined(
    mask: Mask | TileLayout,
    n: int,
    world: int,
    chunk: tuple[int | None, int],
    start: Callable[[Array, int, bool], Array],
    levels: tuple[float, float],
) -> Deal:
    """Chunks placed by ``start``, then swapped; chunks are halved while the result is above the second level."""
    given, size = chunk
    per_query = query_areas(layout_of(mask, n))
    while True:
        area, short = np.add.reduceat(per_query, np.arange(0, n, size)), n % size != 0
        rank = _swapped(area, start(area, world, short), world, short, levels[0])
        load = np.bincount(rank, area, minlength=world)
        if given is not None or size <= SMALLEST or _imbalance(load) <= levels[1]:
            return _settled(n, size, rank, world)
        size //= 2


DEALS: dict[str, Callable[[Mask | None, int, int, int | None], Deal]] = {
    "contiguous": lambda mask, n, world, chunk: contiguous(n, world, chunk=chunk),
    "zigzag": lambda mask, n, world, chunk: zigzag(n, world, chunk=chunk),
    "striped": lambda mask, n, world, chunk: striped(n, world, chunk=chunk),
    "per_document": lambda mask, n, world, chunk: per_document(_given(mask), n, world, chunk=chunk),
    "balanced": lambda mask, n, world, chunk: balanced(_given(mask), n, world, chunk=chunk),
    "nearby": lambda mask, n, world, chunk: nearby(_given(mask), n, world, chunk=chunk),
}
"""Ways to deal by name: functions of ``(mask or None, n, world, chunk or None)``."""


def _given(mask: Mask | None) -> Mask:
    if mask is None:
        raise ValueError("mask: 'balanced', 'nearby' and 'per_document' need the mask; the other ways do without")
    return mask


def _checked(n: int, world: int, chunk: int | None, usual: int | None) -> int:
    """The size of chunks: the given one, the usual one, or a power of two that leaves every rank enough of them."""
    for name, value in (("n", n), ("world", world), ("chunk", chunk)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise ValueError(f"{name}: expected a positive whole number, got {value!r}")
    if chunk is not None or usual is not None:
        return int(chunk or usual or 1)
    return 1 << (max(1, n // (CHUNKS_PER_RANK * world)).bit_length() - 1)


def _ascending(part: Sequence[int]) -> Sequence[int]:
    """Chunks in order; as a range where they are one, so that equal deals are equal values."""
    if isinstance(part, range) and part.step > 0 and len(part) > 2:
        return part
    values = sorted(int(i) for i in part)
    if len(values) < 3:
        return tuple(values)
    regular = range(values[0], values[-1] + 1, max(1, values[1] - values[0]))
    return regular if len(regular) == len(values) and all(map(int.__eq__, regular, values)) else tuple(values)


def _stretches(sizes: Array) -> tuple[range, ...]:
    ends = np.cumsum(sizes).tolist()
    return tuple(range(lo, hi) for lo, hi in zip([0, *ends[:-1]], ends, strict=True))


def _lengths(mask: Mask) -> tuple[int, ...]:
    found = {leaf for leaf in mask.leaves() if isinstance(leaf, Document)}
    if len(found) != 1 or mask.shape != (1, 1):
        raise ValueError(f"mask: expected documents of one kind, the same for all heads, got {mask.text}")
    return tuple(int(length) for length in found.pop().data[0])


def _imbalance(load: Array) -> float:
    return float(load.max() / load.mean()) if load.sum() else 1.0


def _greedy(area: Array, world: int, short: bool) -> Array:
    """Largest first to the least loaded rank with room; the first ranks have room for one more."""
    base, extra = divmod(len(area), world)
    rank = np.empty(len(area), dtype=np.int64)
    room = [base + (r < extra) for r in range(world)]
    heap = [(0, r) for r in range(world) if room[r]]
    order = np.argsort(-area, kind="stable").tolist()
    if short and extra:  # a short chunk goes where there is one more, or that rank would lack too many tokens
        order.remove(len(area) - 1)
        rank[-1], room[0], heap[0] = 0, room[0] - 1, (int(area[-1]), 0)
        heap = [entry for entry in heap if room[entry[1]]]
        heapq.heapify(heap)
    for i in order:
        load, r = heapq.heappop(heap)
        rank[i] = r
        room[r] -= 1
        if room[r]:
            heapq.heappush(heap, (load + int(area[i]), r))
    return rank


def _in_order(area: Array, world: int, short: bool) -> Array:
    """Stretches in order; the last ranks have room for one more, so that the short chunk is where it must be."""
    sizes = len(area) // world + (np.arange(world) >= world - len(area) % world)
    return np.repeat(np.arange(world), sizes)


def _swapped(area: Array, rank: Array, world: int, short: bool, level: float) -> Array:
    """The fullest rank swaps a chunk with one of the emptiest ranks, the pair that levels them best, while it helps."""
    rank, load = rank.copy(), np.bincount(rank, area, minlength=world).astype(np.int64)
    held = [np.flatnonzero(rank == r) for r in range(world)]
    fixed = len(area) - 1 if short else -1
    for _ in range(16 * world):
        top = int(load.argmax())
        if load[top] <= load.mean() * level:
            break
        mine = held[top][held[top] != fixed]
        for other in np.argsort(load)[: min(world - 1, 16)].tolist():
            theirs = held[other][held[other] != fixed]
            gain = area[mine][:, None] - area[theirs]
            after = np.maximum(load[top] - gain, load[other] + gain)
            if after.size and after.min() < load[top]:
                break
        else:
            break
        a, b = np.unravel_index(int(after.argmin()), after.shape)
        moved = gain[a, b]
        load[top] -= moved
        load[other] += moved
        held[top] = np.append(held[top][held[top] != mine[a]], theirs[b])
        held[other] = np.append(held[other][held[other] != theirs[b]], mine[a])
        rank[mine[a]], rank[theirs[b]] = other, top
    return rank


def _settled(n: int, chunk: int, rank: Array, world: int) -> Deal:
    """The deal; a short chunk on a rank with fewer chunks than others changes places with a chunk of one with more."""
    held = [np.flatnonzero(rank == r).tolist() for r in range(world)]
    sizes = [len(part) for part in held]
    last = int(rank[-1])
    if n % chunk and sizes[last] < max(sizes):
        other = sizes.index(max(sizes))
        near = held[other].pop()
        held[last][-1] = near
        held[other].append(len(rank) - 1)
    return Deal(n, chunk, tuple(held))
