"""Attention on many devices before it is run: time, idle share, memory and bytes of every scheme and deal.

Work and bytes of every rank are those of the plans that the schemes execute, exactly. Time is a model: ranks compute at
a share of their peak rate, messages wait for their sender and its link, and a step waits for its messages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from manyheads.bench.planning.machines import Machine
from manyheads.common.errors import UnsupportedError, unknown
from manyheads.mask import Mask
from manyheads.parallel.deal import DEALS, Deal, deal
from manyheads.parallel.plan import SCHEMES, Plan, Sizes, Step, plan

Array = np.ndarray
MAX_RANKS = 4096

BACKWARD_FLOPS = 2.5
"""Operations of the backward pass over those of the forward pass: two more products, and the scores again."""

EFFICIENCY = 0.5
"""Share of the peak matrix rate that attention reaches, assumed."""

INSIDE = {"A100": 300, "A100-40GB": 300, "H100": 450, "H200": 450, "B200": 900, "MI300X": 448, "MI325X": 448}
"""Published bandwidth between devices of one node, 1e9 bytes per second and direction."""


@dataclass(frozen=True)
class Links:
    """What connects devices.

    Attributes:
        inside: Bandwidth of one device to others of its node, 1e9 bytes per second and direction.
        between: Bandwidth of one device to other nodes.
        per_node: Devices of a node; neighbouring ranks share one.
        latency_us: Microseconds of a message inside a node.
        far_latency_us: Microseconds of a message between nodes.

    Raises:
        ValueError: A number that is not positive.
    """

    inside: float = 300.0
    between: float = 50.0
    per_node: int = 8
    latency_us: float = 5.0
    far_latency_us: float = 15.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("inside", "between", "per_node"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("latency_us", "far_latency_us"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more microseconds, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Outcome:
    """One scheme with one way of dealing tokens; numbers are of one layer unless they say otherwise.

    Attributes:
        scheme: Name of the scheme.
        shard: Name of the deal.
        ranks: Devices.
        reason: Why it cannot run; everything below is then empty.
        degree: Ranks that divide the heads.
        forward_ms: Until the last rank has ended the forward pass.
        backward_ms: The same of the backward pass.
        idle: Share of device time in which nothing is computed, over both passes.
        imbalance: The largest area of a rank over the mean.
        areas: int64 ``(ranks,)``: visible pairs that every rank computes, over batch entries and heads.
        sent: int64 ``(ranks,)``: bytes that every rank sends in the forward pass.
        sent_back: The same in the backward pass.
        far: Share of all bytes that go to another node.
        memory: Most bytes that a rank holds for all layers in training: inputs, outputs and statistics of every
            layer, and the buffers of one.
        seconds: How long it took to plan and simulate.
    """

    scheme: str
    shard: str
    ranks: int
    reason: str | None = None
    degree: int = 1
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    idle: float = 0.0
    imbalance: float = 1.0
    areas: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    sent: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    sent_back: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    far: float = 0.0
    memory: int = 0
    seconds: float = 0.0

    @property
    def ms(self) -> float:
        """Forward and backward pass together."""
        return self.forward_ms + self.backward_ms


def cluster(
    mask: Mask,
    length: int,
    ranks: int,
    sizes: Sizes,
    *,
    machine: Machine,
    dtype: str = "bfloat16",
    links: Links | None = None,
    layers: int = 1,
    schemes: Sequence[str] = SCHEMES,
    shards: Sequence[str] = ("contiguous", "zigzag", "balanced", "nearby"),
    efficiency: float = EFFICIENCY,
) -> Iterator[Outcome]:
    """Simulates schemes and deals.

    Args:
        mask: Over the whole sequence.
        length: Its tokens.
        ranks: Devices, at most 4096.
        sizes: Heads, widths, batch and bytes of an element.
        machine: The device, for its matrix rate.
        dtype: Of the inputs, for the rate.
        links: What connects devices.
        layers: Layers whose inputs are kept for the backward pass.
        schemes: Names.
        shards: Names of deals.
        efficiency: Share of the matrix rate that is reached.

    Yields:
        One outcome for each scheme and deal, refused ones with their reason, as soon as it is known.

    Raises:
        ValueError: Unknown names, ranks or an efficiency out of range, or a dtype without a rate.

    Example:
        >>> from manyheads.bench.planning.machines import find
        >>> from manyheads.mask import Causal
        >>> (found,) = cluster(Causal(), 65536, 8, Sizes(32, 8, 128), machine=find("H100"), schemes=["ring"],
        ...                    shards=["zigzag"])
        >>> found.imbalance, found.idle < 0.1, int(found.sent.max()) == 7 * 65536 // 8 * 8 * 256 * 2
        (1.0, True, True)
    """
    for kind, given, known in (("scheme", schemes, SCHEMES), ("shard", shards, DEALS)):
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    if not 1 <= ranks <= MAX_RANKS:
        raise ValueError(f"ranks: expected 1 to {MAX_RANKS}, got {ranks}")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency: expected a share above 0 and at most 1, got {efficiency}")
    if layers < 1:
        raise ValueError(f"layers: expected at least 1, got {layers}")
    rate = machine.limits.matrix.get(dtype)
    if rate is None:
        raise ValueError(f"dtype: {machine.name} has no matrix rate for {dtype!r}")
    per_pair = 2 * (sizes.dim + sizes.value_dim) / (rate * 1e9 * efficiency)
    net = Links(inside=INSIDE.get(machine.name, 32.0)) if links is None else links
    for shard in shards:
        begun = time.perf_counter()
        try:
            dealt = deal(shard, mask, length, ranks)
        except ValueError as error:
            yield from (Outcome(scheme, shard, ranks, reason=str(error)) for scheme in schemes)
            continue
        for scheme in schemes:
            yield _outcome(mask, dealt, (scheme, shard), sizes, net, per_pair, layers, begun)
            begun = time.perf_counter()


def _outcome(
    mask: Mask,
    dealt: Deal,
    names: tuple[str, str],
    sizes: Sizes,
    links: Links,
    per_pair: float,
    layers: int,
    begun: float,
) -> Outcome:
    scheme, shard = names
    try:
        found = plan(mask, dealt, scheme, sizes)
    except UnsupportedError as error:
        return Outcome(scheme, shard, dealt.world, reason=str(error))
    forward = run(found.forward(), links, per_pair)
    backward = run(found.backward(), links, per_pair * BACKWARD_FLOPS)
    whole, sent = forward.end + backward.end, forward.sent.sum() + backward.sent.sum()
    return Outcome(
        scheme,
        shard,
        dealt.world,
        degree=found.degree,
        forward_ms=forward.end * 1e3,
        backward_ms=backward.end * 1e3,
        idle=1 - float((forward.busy.mean() + backward.busy.mean()) / whole) if whole else 0.0,
        imbalance=float(forward.area.max() / forward.area.mean()) if forward.area.any() else 1.0,
        areas=forward.area,
        sent=forward.sent,
        sent_back=backward.sent,
        far=float((forward.far + backward.far) / sent) if sent else 0.0,
        memory=int(held(found, layers).max()),
        seconds=time.perf_counter() - begun,
    )


class Clock(NamedTuple):
    """What a pass came to.

    Attributes:
        end: Seconds until the last rank is done.
        busy: ``(ranks,)`` seconds in which each computes.
        area: int64 ``(ranks,)`` visible pairs of each.
        sent: int64 ``(ranks,)`` bytes that each sends.
        far: Bytes that go to another node.
    """

    end: float
    busy: Array
    area: Array
    sent: Array
    far: int


def run(steps: Iterator[Step], links: Links, per_pair: float) -> Clock:
    """Follows the steps of a pass on every rank's own clock.

    Messages leave when the step that posts them begins on the sender, one after the other on each of its links (inside
    the node, between nodes); a rank begins a step when it has ended the one before and what is due has arrived. An
    exchange among several begins when all of them are there, and lasts as long as the busiest link.

    Args:
        steps: Of a plan.
        links: What connects ranks.
        per_pair: Seconds of compute for a visible pair.

    Returns:
        Times and sums.

    Example:
        >>> step = Step(np.array([3, 1]))
        >>> run(iter([step, step]), Links(), 1.0)[:2]
        (6.0, array([6., 2.]))
    """
    now: Array | None = None
    due: dict[int, Array] = {}
    far_bytes = 0
    for t, step in enumerate(steps):
        if now is None:
            world = len(step.area)
            node = np.arange(world) // links.per_node
            now, busy = np.zeros(world), np.zeros(world)
            free = {True: np.zeros(world), False: np.zeros(world)}
            area, sent = np.zeros(world, dtype=np.int64), np.zeros(world, dtype=np.int64)
        now = np.maximum(now, due.pop(t, 0.0))
        for move in step.moves:
            outside = node[move.to] != node
            begin = np.maximum(now, np.where(outside, free[True], free[False]))
            end = begin + move.sent / (np.where(outside, links.between, links.inside) * 1e9)
            for kind in free:
                free[kind] = np.where(outside == kind, end, free[kind])
            there = np.zeros(len(now))
            there[move.to] = end + np.where(outside, links.far_latency_us, links.latency_us) * 1e-6
            due[t + move.due] = np.maximum(due.get(t + move.due, 0.0), there)
            far_bytes += int(move.sent[outside].sum())
        if step.among is not None:
            outside = node[:, None] != node
            there, away = _exchanged(step.among, outside, now, links)
            due[t + 1] = np.maximum(due.get(t + 1, 0.0), there)
            far_bytes += away
        work = step.area * per_pair
        now, busy, area, sent = now + work, busy + work, area + step.area, sent + step.sent
    assert now is not None
    rest = max((float(np.max(late)) for late in due.values()), default=0.0)
    return Clock(max(float(now.max()), rest), busy, area, sent, far_bytes)


def _exchanged(among: Array, outside: Array, now: Array, links: Links) -> tuple[Array, int]:
    """When each rank has what others send it, and how many bytes go to other nodes."""
    met = (among > 0) | (among.T > 0)
    begin = np.maximum(now, np.max(np.where(met, now, 0.0), axis=1))
    away = among * outside
    seconds = np.zeros(len(now))
    for bytes_, bandwidth in ((away, links.between), (among - away, links.inside)):
        seconds = np.maximum(seconds, np.maximum(bytes_.sum(0), bytes_.sum(1)) / (bandwidth * 1e9))
    last = np.max(np.where(met, seconds, 0.0), axis=1, initial=0.0)  # the busiest of those that it meets
    latency = np.where((met & outside).any(1), links.far_latency_us, links.latency_us) * 1e-6 * met.any(1)
    return begin + np.maximum(seconds, last) + latency, int(away.sum())


def held(found: Plan, layers: int = 1) -> Array:
    """Bytes that every rank holds in training, workspace of kernels left out.

    For each layer q, k, v, the output and its log-normaliser; for one layer, at the height of its backward pass, the
    gradients in float32, and the keys and values of others with their gradients: two blocks in a ring, all in a
    gather, the needed rows in a group-cast.

    Args:
        found: A plan.
        layers: Layers that are kept.

    Returns:
        int64 ``(ranks,)``.
    """
    s, rows = found.sizes, found.rows
    groups = len(rows) // found.degree
    tokens = np.repeat(rows.reshape(groups, found.degree).sum(1), found.degree)  # what a rank computes on
    own_kv = found.kv_heads[np.arange(len(rows)) % found.degree] * s.kv
    q = s.batch * s.heads // found.degree * (s.dim + s.value_dim)
    kept = tokens * ((q + own_kv) * s.itemsize + s.batch * s.heads // found.degree * s.wide)
    grads = tokens * (q + own_kv) * s.wide
    if found.scheme == "gather":
        visiting = np.full_like(rows, rows.sum())
    elif found.scheme == "groupcast":
        visiting = found.fetched
    else:
        visiting = np.full_like(rows, 2 * tokens.max() if groups > 1 else 0)
    return layers * kept + grads + visiting * own_kv * (s.itemsize + s.wide)
