"""What a call of exact attention has to do, counted from its tiles, and how long that takes at given rates.

Three things bound exact attention: products, exponentials, and bytes to and from memory. Each is counted for the tiles
that an engine visits, divided by the rate of the machine, and the slowest of the three is the time of a perfect kernel.
Real kernels reach a share of it, the *efficiency*, which is fitted from results (``fit.py`` beside this) or assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from manyheads.bench.limits import Limits
from manyheads.bench.planning.simulate import Visits, visits
from manyheads.bench.workload import Problem
from manyheads.mask import Full, TileLayout

CACHE = 2 << 20
"""Bytes of cache that keys and values of one head can use, by default."""


@dataclass(frozen=True)
class Work:
    """What one call has to do.

    Attributes:
        pairs: Visible (query, key) pairs over batch and heads.
        computed: Pairs inside visited tiles: what an engine computes to get at the visible ones.
        flops: Operations of the visible pairs, multiplications and additions.
        computed_flops: Operations of the computed pairs.
        exponentials: One for each computed pair and direction: the backward pass computes the scores again.
        traffic: Bytes to and from memory, by what they hold.
        memory: Bytes alive at the peak of the call, by what they hold; workspace of a kernel is not counted.
    """

    pairs: int
    computed: int
    flops: int
    computed_flops: int
    exponentials: int
    traffic: Mapping[str, int]
    memory: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """All bytes to and from memory."""
        return sum(self.traffic.values())

    @property
    def peak(self) -> int:
        """All bytes alive at the peak."""
        return sum(self.memory.values())


def count(
    problem: Problem, *, tile: tuple[int, int] = (128, 128), dense: bool = False, cache: int = CACHE
) -> Work:
    """Counts what a call has to do.

    Queries, outputs and statistics move once. Keys and values move once for each row of query tiles, except where they
    are still in the cache: all of them when a whole head fits, else those that the row before visited, if what that row
    visited fits. Query heads that share a key head read it once between them when it fits, or when there are few
    queries. The backward pass walks key tiles in the same way, reading queries and gradients of outputs and adding
    to the gradients of queries in float32.

    Args:
        problem: The call.
        tile: Queries and keys of the tiles that are visited.
        dense: Whether every pair is computed and the mask is a tensor, as ``scaled_dot_product_attention`` with
            ``attn_mask`` does: a bool mask and the additive one that is made of it.
        cache: Bytes of cache that one head's keys and values can use.

    Returns:
        The counts, exact for pairs and operations; bytes follow the rule above.

    Example:
        >>> from manyheads.mask import Causal
        >>> work = count(Problem(Causal(), 1024, heads=1, width=64))
        >>> work.pairs, work.computed, work.flops == 4 * 64 * work.pairs
        (524800, 589824, True)
    """
    shape = problem.queries, problem.nk
    seen = problem.mask.tiles(*shape, tile=tile, batch=problem.batch, heads=problem.heads)
    layout = seen if not dense else Full().tiles(*shape, tile=tile, batch=problem.batch, heads=problem.heads)
    found = visits(layout)
    size = _Sizes.of(problem)
    traffic = _forward_traffic(problem, found, size, cache) if problem.phase != "backward" else {}
    if problem.backward:
        traffic |= _backward_traffic(problem, layout, size, cache)
    given, additive = _mask_bytes(problem, size.item) if dense else (0, 0)
    if given:
        every = problem.batch * problem.heads * problem.queries * problem.nk * size.item
        traffic["mask tensor"] = given + additive + problem.exps(1) * (every if additive > cache else additive)
    else:
        traffic["layout"] = layout.nbytes
    return Work(
        pairs=seen.pairs,
        computed=found.computed,
        flops=problem.flops(seen.pairs),
        computed_flops=problem.flops(found.computed),
        exponentials=problem.exps(found.computed),
        traffic=traffic,
        memory=_memory(problem, size, layout.nbytes, given + additive),
    )


@dataclass(frozen=True)
class Efficiency:
    """The share of a perfect kernel's speed that a provider reaches.

    Attributes:
        value: The share, above 1 where a kernel beats a rate (an approximated exponential, for instance).
        low: A share that it falls short of in one case out of five.
        high: A share that it exceeds in one case out of five.
        rows: Rows that it was fitted from, 0 for an assumption.
        source: Where it comes from, in words.
    """

    value: float
    low: float
    high: float
    rows: int
    source: str


class Prediction(NamedTuple):
    """How long a call takes, as far as the model knows.

    Attributes:
        ms: Milliseconds.
        low_ms: At the high end of the efficiency.
        high_ms: At its low end.
        bound: What takes longest: ``"products"``, ``"exponentials"``, ``"memory"`` or, for tiny calls, ``"launch"``.
        units: Milliseconds that each of these would take alone, at the full rate.
    """

    ms: float
    low_ms: float
    high_ms: float
    bound: str
    units: dict[str, float]


def unit_times(work: Work, limits: Limits, dtype: str) -> dict[str, float]:
    """Milliseconds of each unit at the full rate.

    Args:
        work: What has to be done.
        limits: Rates of the machine.
        dtype: Dtype of the inputs.

    Returns:
        ``"products"``, and ``"exponentials"`` and ``"memory"`` where the rate is known.

    Raises:
        ValueError: The machine has no matrix rate for this dtype.

    Example:
        >>> rates = Limits(matrix={"float32": 100.0}, copy=10.0, exp_rate=1.0)
        >>> work = Work(10**6, 10**6, 0, 2 * 10**9, 10**6, {"q": 10**6}, {})
        >>> unit_times(work, rates, "float32")
        {'products': 20.0, 'exponentials': 1.0, 'memory': 0.1}
    """
    rate = limits.matrix.get(dtype)
    if rate is None:
        known = ", ".join(limits.matrix) or "none"
        raise ValueError(f"dtype: {limits.device} has no matrix rate for {dtype!r}; known: {known}")
    times = {"products": work.computed_flops / rate / 1e6}
    if limits.exp_rate:
        times["exponentials"] = work.exponentials / limits.exp_rate / 1e6
    if limits.copy:
        times["memory"] = work.bytes / limits.copy / 1e6
    return times


def predict(
    work: Work, limits: Limits, dtype: str, efficiency: Efficiency, *, launch_ms: float = 0.0
) -> Prediction:
    """Predicts the time of a call: the slowest unit's time over the efficiency, and what any call costs.

    Args:
        work: What has to be done.
        limits: Rates of the machine.
        dtype: Dtype of the inputs.
        efficiency: Share of the perfect speed.
        launch_ms: Milliseconds of a call that does nothing.

    Returns:
        The time, with the range that the efficiency's spread gives.

    Raises:
        ValueError: The machine has no matrix rate for this dtype.

    Example:
        >>> rates = Limits(matrix={"float32": 100.0})
        >>> work = Work(10**6, 10**6, 0, 2 * 10**9, 10**6, {}, {})
        >>> predict(work, rates, "float32", Efficiency(0.5, 0.4, 0.8, 0, "assumed"))[:4]
        (40.0, 25.0, 50.0, 'products')
    """
    units = unit_times(work, limits, dtype)
    bound = max(units, key=lambda unit: units[unit])
    perfect = units[bound]
    low, ms, high = (launch_ms + perfect / share for share in (efficiency.high, efficiency.value, efficiency.low))
    return Prediction(ms, low, high, "launch" if launch_ms > perfect / efficiency.value else bound, units)


# --- bytes --------------------------------------------------------------------------------------------------------


class _Sizes(NamedTuple):
    """Bytes: of an element, of a row of q and k (width), of v and out (value), of a statistic."""

    item: int
    width: int
    value: int
    lse: int

    @classmethod
    def of(cls, problem: Problem) -> _Sizes:
        item = torch.empty((), dtype=problem.torch_dtype).element_size()
        return cls(item, problem.width * item, problem.dv * item, max(item, 4))


def _forward_traffic(problem: Problem, found: Visits, size: _Sizes, cache: int) -> dict[str, int]:
    queries = problem.batch * problem.heads * problem.queries
    group = problem.heads // problem.hkv
    return {
        "q": queries * size.width,
        "k and v": _loads(found, size.width + size.value, group, cache),
        "out": queries * size.value,
        "lse": queries * size.lse,
    }


def _backward_traffic(problem: Problem, layout: TileLayout, size: _Sizes, cache: int) -> dict[str, int]:
    """A row is now a row of key tiles: its keys stay, queries and gradients of outputs stream by."""
    found = visits(layout.transpose())
    queries = problem.batch * problem.heads * problem.queries
    keys = problem.batch * problem.hkv * problem.nk
    streamed = _loads(found, size.width + size.value + 2 * size.lse, 1, cache)
    added = _loads(found, 2 * 4 * problem.width, 1, cache)
    return {
        "out and its gradient, for their products": 2 * queries * size.value + queries * size.lse,
        "k and v, backward": keys * (size.width + size.value),
        "q and the gradient of out": streamed,
        "dq": added + queries * size.width,
        "dk and dv": keys * (size.width + size.value),
    }


def _loads(found: Visits, row: int, group: int, cache: int) -> int:
    """Bytes of what rows of tiles stream by, ``row`` bytes for each token, over batch and heads.

    A group of heads that share it read it once between them when all of it fits, and when there is one row of tiles:
    kernels for few queries take the heads of a group as rows of one product.
    """
    fits = (found.distinct * row <= cache) | (len(found.height) == 1)
    before = found.keys * row
    hit = before[:, :-1] <= cache
    again = found.keys.copy()
    again[:, 1:] = found.keys[:, 1:] * ~hit + found.fresh[:, 1:] * hit
    tokens = found.distinct * fits / group + again.sum(1) * ~fits
    return int((tokens * found.uses).sum() * row)


def _mask_bytes(problem: Problem, item: int) -> tuple[int, int]:
    """Bytes of the bool mask and of the additive one that is made of it; none where everything is visible."""
    if problem.mask.text == "full":
        return 0, 0
    batch, heads = problem.mask.shape
    cells = batch * heads * problem.queries * problem.nk
    return cells, cells * item


def _memory(problem: Problem, size: _Sizes, layout: int, mask: int) -> dict[str, int]:
    queries = problem.batch * problem.heads * problem.queries
    keys = problem.batch * problem.hkv * problem.nk
    held = {
        "q": queries * size.width,
        "k and v": keys * (size.width + size.value),
        "out": queries * size.value,
        "lse": queries * size.lse,
        "mask tensor" if mask else "layout": mask or layout,
    }
    if problem.backward:
        held["gradients"] = queries * (size.width + size.value) + keys * (size.width + size.value)
        if size.item < 4:  # sums in float32 until they are whole
            held["gradient sums"] = 4 * (queries * problem.width + keys * (problem.width + problem.dv))
    return held
