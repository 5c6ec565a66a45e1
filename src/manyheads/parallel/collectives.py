"""What ranks exchange: messages that compute can overlap, counted bytes, clear errors when a rank is gone.

Everything runs over one process group with point-to-point messages and all-to-all exchanges of any sizes, which gloo
and NCCL both have under the same names in every version of torch that is supported.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.errors import UnsupportedError

Shape = tuple[int, ...]


class RankError(RuntimeError):
    """An exchange failed: another rank is gone, is stuck, or did not follow."""


# --- what is counted, and how slow links are made ----------------------------------------------------------------


@dataclass
class _Meter:
    phase: str = "control"
    sent: dict[str, int] | None = None
    seconds_per_byte: float = 0.0
    latency: float = 0.0
    free_at: float = 0.0


_meter = _Meter()


@contextlib.contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Counts what this rank sends to other ranks inside the block.

    Yields:
        Bytes sent under ``"forward"``, ``"backward"`` and ``"control"`` (checks, seeds, padding), growing.

    Example:
        >>> with counted() as sent:
        ...     pass
        >>> sent
        {'forward': 0, 'backward': 0, 'control': 0}
    """
    before = _meter.sent
    _meter.sent = {"forward": 0, "backward": 0, "control": 0}
    try:
        yield _meter.sent
    finally:
        _meter.sent = before


@contextlib.contextmanager
def slow_links(*, seconds_per_byte: float = 0.0, latency: float = 0.0) -> Iterator[None]:
    """Makes what this rank receives inside the block arrive later, to measure what compute hides.

    A message of ``n`` bytes that is posted at time ``t`` may be read at ``t + latency + n * seconds_per_byte``;
    messages share one link, one after the other.

    Args:
        seconds_per_byte: Of received bytes.
        latency: Of every message, in seconds.
    """
    before = _meter.seconds_per_byte, _meter.latency
    _meter.seconds_per_byte, _meter.latency = seconds_per_byte, latency
    try:
        yield
    finally:
        _meter.seconds_per_byte, _meter.latency = before


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Counts what is sent inside the block under a name."""
    before, _meter.phase = _meter.phase, name
    try:
        yield
    finally:
        _meter.phase = before


def _count(nbytes: int) -> None:
    if _meter.sent is not None:
        _meter.sent[_meter.phase] += nbytes


def _arrival(nbytes: int) -> float:
    """When a message that is posted now may be read."""
    if not (_meter.seconds_per_byte or _meter.latency) or not nbytes:
        return 0.0
    _meter.free_at = max(time.monotonic(), _meter.free_at) + nbytes * _meter.seconds_per_byte
    return _meter.free_at + _meter.latency


# --- a group of ranks ----------------------------------------------------------------------------------------------


class Pending:
    """Messages on their way; ``wait`` gives what they bring."""

    def __init__(self, link: Link, works: Sequence[Any], result: Callable[[], Any], arrival: float, what: str) -> None:
        self._link, self._works, self._result, self._arrival, self._what = link, works, result, arrival, what

    def wait(self) -> Any:
        """What was received.

        Raises:
            RankError: A rank is gone or did not answer in time.
        """
        with self._link.guarded(self._what):
            for work in self._works:
                self._link.finish(work)
        rest = self._arrival - time.monotonic()
        if rest > 0:
            time.sleep(rest)
        return self._result()


class Link:
    """The exchanges of one process group, or of some of its ranks.

    Args:
        group: A process group that this rank belongs to.
        timeout: Longest wait for one exchange on a CPU; the group's own by default. On GPUs the group's timeout
            holds, which torch watches.
        members: Ranks of the group, in an order; all by default. Every rank of the group is in one set of members,
            and all sets are of one size and exchange at the same time, so that no smaller groups are needed.

    Attributes:
        rank: Place of this rank among the members.
        world: Number of members.
    """

    def __init__(
        self, group: Any, timeout: datetime.timedelta | None = None, members: Sequence[int] | None = None
    ) -> None:
        self.group = group
        self._own: int = dist.get_rank(group)
        self._all: int = dist.get_world_size(group)
        self.members = tuple(range(self._all) if members is None else members)
        self.rank: int = self.members.index(self._own)
        self.world: int = len(self.members)
        self.timeout = timeout
        self.backend = str(dist.get_backend(group))

    def among(self, members: Sequence[int]) -> Link:
        """The exchanges of some of the ranks only."""
        return Link(self.group, self.timeout, members)

    def finish(self, work: Any) -> None:
        """Waits for one message."""
        if self.timeout is not None and "gloo" in self.backend:
            work.wait(self.timeout)
        else:
            work.wait()

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turns an error of the transport into one that says what was exchanged."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RankError(
                f"parallel: rank {self._own} of {self._all} could not finish {what}: another rank has died, is stuck, "
                f"or raised an error of its own ({reason})"
            ) from error

    def move(self, sent: Tensor, to: int, shape: Shape, frm: int, what: str) -> Pending:
        """Sends a tensor to one rank while another one's comes in: one step of a ring.

        Args:
            sent: Contiguous.
            to: Rank in the group that gets it.
            shape: Of what comes, in the dtype of ``sent``.
            frm: Rank in the group that it comes from.
            what: Names the exchange in errors.

        Returns:
            The pending exchange; its result is the received tensor. ``sent`` must not be written before it is done.
        """
        if to == frm == self.rank:
            return Pending(self, (), lambda: sent, 0.0, what)
        got = sent.new_empty(shape)
        ops = []
        if got.numel():
            ops.append(dist.P2POp(dist.irecv, got, self._global(frm), self.group))
        if sent.numel():
            ops.append(dist.P2POp(dist.isend, sent, self._global(to), self.group))
        _count(sent.nbytes)
        with self.guarded(what):
            works = dist.batch_isend_irecv(ops) if ops else []
        return Pending(self, works, lambda: (got, sent)[0], _arrival(got.nbytes), what)  # holds what is being sent

    def exchange(self, parts: Sequence[Tensor], shapes: Sequence[Shape], what: str) -> Pending:
        """Sends one tensor to every rank and gets one from each.

        Args:
            parts: For each rank of the group, in one dtype, any shapes; empty ones cost nothing.
            shapes: For each rank the shape of what it sends here.
            what: Names the exchange in errors.

        Returns:
            The pending exchange; its result is a list of tensors in the order of ranks.
        """
        own = parts[self.rank]
        sizes, splits = [0] * self._all, [0] * self._all
        for r, member in enumerate(self.members):
            if r != self.rank:
                sizes[member], splits[member] = math.prod(shapes[r]), parts[r].numel()
        got = own.new_empty(sum(sizes))

        def result() -> list[Tensor]:
            pieces = got.split(sizes)
            return [own if r == self.rank else pieces[m].view(shapes[r]) for r, m in enumerate(self.members)]

        if self.world == 1:
            return Pending(self, (), result, 0.0, what)
        order = sorted((m, r) for r, m in enumerate(self.members) if r != self.rank)
        flat = torch.cat([parts[r].reshape(-1) for _, r in order])
        _count(flat.nbytes)
        with self.guarded(what):
            work = dist.all_to_all_single(got, flat, sizes, splits, group=self.group, async_op=True)
        return Pending(self, (work,), lambda: (result(), flat)[0], _arrival(got.nbytes), what)

    def everyone(self, own: Tensor, shapes: Sequence[Shape], what: str) -> Pending:
        """Gives a tensor to every rank and gets every rank's: an all-gather of any sizes.

        Args:
            own: What this rank gives.
            shapes: What each rank gives.
            what: Names the exchange in errors.

        Returns:
            The pending exchange; its result is a list of tensors in the order of ranks.
        """
        if self.world < self._all or self.world == 1 or any(shape != shapes[0] for shape in shapes):
            return self.exchange([own] * self.world, shapes, what)
        got = own.new_empty(self.world * own.numel())
        _count(own.nbytes * (self.world - 1))
        with self.guarded(what):
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            work = gather(got, own.reshape(-1), group=self.group, async_op=True)
        arrival = _arrival(own.nbytes * (self.world - 1))
        return Pending(self, (work,), lambda: [x.view(shapes[0]) for x in got.chunk(self.world)], arrival, what)

    def summed(self, parts: Sequence[Tensor], what: str) -> Pending:
        """Gives every rank the sum of what all have for it: a reduce-scatter of any sizes.

        Args:
            parts: For each rank what this one adds to its sum.
            what: Names the exchange in errors.

        Returns:
            The pending exchange; its result is this rank's sum, in the shape of its own part.
        """
        own = parts[self.rank]
        if self.world == self._all > 1 and all(p.shape == own.shape for p in parts):
            flat, got = torch.cat([p.reshape(-1) for p in parts]), own.new_empty(own.numel())
            _count(own.nbytes * (self.world - 1))
            with self.guarded(what):
                scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
                work = scatter(got, flat, group=self.group, async_op=True)
            arrival = _arrival(own.nbytes * (self.world - 1))
            return Pending(self, (work,), lambda: got.view(own.shape), arrival, what)
        pending = self.exchange(parts, [tuple(own.shape)] * self.world, what)
        return Pending(self, (), lambda: torch.stack(pending.wait()).sum(0), 0.0, what)

    def from_first(self, t: Tensor, device: torch.device) -> Tensor:
        """The tensor of the group's first rank, on the CPU."""
        moved = t.to(device, copy=True)
        with self.guarded("the agreement on a seed"):
            dist.broadcast(moved, self._global(0), group=self.group)
        return moved.cpu()

    def total(self, t: Tensor) -> Tensor:
        """The sum of a tensor over the ranks."""
        t = t.clone()
        with self.guarded("a sum over ranks"):
            dist.all_reduce(t, group=self.group)
        return t

    def agree(self, facts: dict[str, str], problem: str, device: torch.device) -> None:
        """Makes sure that every rank is about to do the same, before anything else is exchanged.

        Args:
            facts: What must be the same on every rank, by name.
            problem: What is wrong with this rank's call on its own; empty when nothing is.
            device: Where messages of this group lie.

        Raises:
            ValueError: On every rank, when facts differ or some rank has a problem; names both.
        """
        text = repr((sorted(facts.items()), problem))
        digest = torch.frombuffer(bytearray(hashlib.blake2b(text.encode(), digest_size=32).digest()), dtype=torch.uint8)
        with phase("control"):
            digests = self.everyone(digest.to(device), [(32,)] * self.world, "the check that all ranks agree").wait()
        flagged = torch.stack(digests).cpu()
        if not problem and bool((flagged == flagged[0]).all()):
            return
        every: list[Any] = [None] * self.world
        with self.guarded("the exchange of what differs"):
            dist.all_gather_object(every, (facts, problem), group=self.group)
        own = [f"rank {r}: {p}" for r, (_, p) in enumerate(every) if p]
        for name in {n: None for facts_, _ in every for n in facts_}:
            values: dict[str | None, list[int]] = {}
            for r, (facts_, p) in enumerate(every):
                if not p:
                    values.setdefault(facts_.get(name), []).append(r)
            if len(values) > 1:
                each = "; ".join(f"{_ranks(ranks)}: {value}" for value, ranks in values.items())
                own.append(f"{name} differs ({each})")
        if own:
            problems = [p for _, p in every if p]
            kind = UnsupportedError if problems and all(p.startswith(_UNSUPPORTED) for p in problems) else ValueError
            raise kind("parallel: the ranks do not agree on this call; " + "; ".join(own).replace(_UNSUPPORTED, ""))

    def _global(self, rank: int) -> int:
        return dist.get_global_rank(self.group, self.members[rank])


_UNSUPPORTED = "unsupported: "


def unsupported(reasons: Sequence[str]) -> str:
    """Reasons to refuse as a problem for :meth:`Link.agree`, which then raises ``UnsupportedError``."""
    return _UNSUPPORTED + "; ".join(reasons) if reasons else ""


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
