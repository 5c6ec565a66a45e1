"""The bars of sparse attention for ``targets``, each at the shape it names and at a drawn one."""

from __future__ import annotations

import functools
import math

from torch import Tensor

from manyheads.bench.row import Row
from manyheads.bench.structure import KINDS, Shape
from manyheads.bench.suite import Options
from manyheads.bench.suites import bars, sparse, sparse_parts
from manyheads.bench.suites.bars import Bar
from manyheads.bench.suites.sparse import DENSE, SDPA, Way
from manyheads.bench.workload import Problem
from manyheads.mask import Neighborhood
from manyheads.mechanism.sparse.sale import calibrate

KEPT = 0.1
"""Share of all key blocks that a row keeps."""
LENGTH = 16_384
SELECTORS = {
    # by name in the rows: what it is in words, times faster than dense, most of the time that choosing may take
    "pooled-topk": ("pooled blocks, shared in a group of heads", 4.5, 0.05),
    "pooled-topk-heads": ("pooled blocks, chosen by each query head", 3.0, 0.05),
    "fsa-selected": ("NSA's selected branch, shared in a group of heads", 4.5, 0.25),
}
INDEXERS = {"hisa": 2.0, "misa": 2.5}
"""Times faster than the flat indexer, tuned by chunk."""
NEAR = {"forward": 13.0, "forward+backward": 11.0}
"""Times faster than SDPA with the dense mask."""
OVER_FLEX = 4.5
PREDICTED = 1.25
"""Predicted over measured speed-up, or the other way round, at most."""
ERROR = 1.0
"""By how much SALE's calibration lets the output of a token differ, summed over channels: the card's."""
SALE_TILES = 1 / 3.36
"""Share of the tiles that its speed-up on the card leaves."""
DSA_KEPT = 2048 / 32_768
FEWER = 0.999
"""Tiles of PBS over those that it needs without its permutation, at most: fewer."""
NO_SKIPS = 1.05
"""Time of BLASST that skips nothing over that of dense attention, at most."""


def made(options: Options) -> list[Bar]:
    """Every bar of this suite for a CPU.

    Args:
        options: For the seed of drawn shapes.

    Returns:
        The bars, those with the drawn shapes after the others.
    """
    rng = bars.draw(options, "sparse")
    heads, kv_heads = ((8, 4), (8, 1), (4, 2), (12, 2))[int(rng.integers(4))]
    drawn = Shape(int(rng.integers(7000, 9500)), heads, kv_heads, 64, "bfloat16", options.seed)
    found = [_blocks(shape, options) for shape in (Shape(LENGTH, dtype="bfloat16", seed=options.seed), drawn)]
    found += [_indexers(n, keep, options) for n, keep in ((32_768, 2048), (int(rng.integers(32_768, 44_000)), 1536))]
    grid = (int(rng.integers(56, 84)), int(rng.integers(56, 84)))
    for shape, window, count, width in (((96, 96), 13, 4, 32), (grid, int(rng.choice([7, 9, 11, 15])), 3, 40)):
        found += [_near(shape, window, count, width, phase, options) for phase in NEAR]
        found.append(_predicted(shape, window, count, width))
    found += [_skipping(shape, options) for shape in (
        Shape(8192, dtype="bfloat16", seed=options.seed), Shape(drawn.tokens // 2 + 1, 4, 4, dtype="float32", seed=1),
    )]  # fmt: skip
    small = [Shape(4096, dtype="bfloat16", seed=options.seed), Shape(drawn.tokens // 3, 4, 2, dtype="bfloat16", seed=1)]
    found += [_estimates(shape, options) for shape in small]
    pairs = [*((kind, small[0]) for kind in KINDS), (str(rng.choice([*KINDS])), small[1])]
    return found + [_permuted(kind, shape) for kind, shape in pairs]


def few(shape: Shape) -> list[Way]:
    """What the bar on block selectors measures."""
    return [sparse.pooled(shape, KEPT), sparse.pooled(shape, KEPT, "head"), sparse.nsa(shape, KEPT)]


def _promise(name: str, words: str, shape: Shape | None = None) -> Row:
    base = bars.promise(name, words)
    return base if shape is None else base.replace(dtype=shape.dtype, length=shape.tokens, shape=str(shape))


def _blocks(shape: Shape, options: Options) -> Bar:
    name = f"sparse-blocks-{shape.tokens}"
    words = f"{KEPT:.0%} of the key blocks, causal, N = {shape.tokens}, {shape.heads}:{shape.kv_heads} heads"
    base = _promise(name, words, shape)
    case = sparse.plane("targets", name, "document", shape, options, few)

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group in measured for row in group]
        out = []
        for who, (what, faster, choosing) in SELECTORS.items():
            row, reason = believed(rows, who)
            note = reason if row is None else f"error {row.error_norm:.2f}, {row.area:.1%} of the causal pairs"
            one = bars.cautioned(bars.worded(base, what).replace(note=note), row, *_dense(rows))
            speed, share = (None, None) if row is None else (row.speed, row.selection)
            out.append(bars.at_least(bars.worded(one, "over the faster dense attention"), speed, faster))
            out.append(bars.at_most(bars.worded(one, "choosing, of the whole"), share, choosing, ""))
        return out

    return Bar(f"bar-{name}", (case,), judge)


def believed(rows: list[Row], who: str) -> tuple[Row | None, str | None]:
    """The row of a mechanism that gave what it chose, or the reason why its time counts for nothing.

    Args:
        rows: Rows of one case.
        who: Its name.
    """
    row = next((r for r in rows if r.provider == who), None)
    if row is None or row.status != "measured":
        return None, f"{who}: {row.reason if row is not None else 'took no part'}"
    if row.gate == "red":
        return None, f"{who}: {row.note}"
    return row, None


def _dense(rows: list[Row]) -> list[Row | None]:
    return [bars.one(rows, name) for name in (DENSE, SDPA)]


def _indexers(position: int, keep: int, options: Options) -> Bar:
    name = f"sparse-indexers-{position}"
    words = f"over the flat indexer tuned by chunk, position {position}, 64 index heads, {keep} tokens"
    base = _promise(name, words).replace(length=position)

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows, captured = measured or [[], []]
        flat = bars.one(rows, sparse_parts.FLAT)
        out = []
        for who, target in INDEXERS.items():
            row = bars.one(rows, who)
            ratio = flat.median_ms / row.median_ms if flat and row and flat.median_ms and row.median_ms else None
            found = [one for one in (row, bars.one(captured, who)) if one is not None and one.recall is not None]
            note = "; ".join(f"recall of the flat choice {one.recall:.1%} ({one.input})" for one in found) or None
            one = bars.cautioned(bars.worded(base, who).replace(note=note), row, flat)
            out.append(bars.at_least(one, ratio, target))
        return out

    cases = (sparse_parts.indexers(position, keep, options), sparse_parts.captured_indexers(options))
    return Bar(f"bar-{name}", cases, judge)


def estimating(shape: Shape) -> list[Way]:
    """Selectors that estimate every pair: SALE, calibrated on the inputs to the error of its card, and flat DSA."""

    def thresholds(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return {"threshold": calibrate(q, k, v, error=ERROR)}

    keep = max(1, round(shape.tokens * DSA_KEPT))
    name = f"error {ERROR:g}"
    return [sparse.mechanism("sale", name, given=thresholds), sparse.indexed("dsa", shape, keep / shape.tokens)]


def _estimates(shape: Shape, options: Options) -> Bar:
    name = f"sparse-estimates-{shape.tokens}"
    base = _promise(name, f"estimates of every pair, N = {shape.tokens}, {shape.heads}:{shape.kv_heads} heads", shape)
    case = sparse.plane("targets", name, "uneven", shape, options, estimating)
    # the first rows see fewer keys than are kept
    keep, n = max(1, round(shape.tokens * DSA_KEPT)), shape.tokens
    whole = (keep * (keep + 1) // 2 + (n - keep) * keep) / (n * (n + 1) // 2)

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group in measured for row in group]
        (sale, why), (dsa, reason) = (believed(rows, who) for who in ("sale", "dsa"))
        told = [why if sale is None else _told(sale), reason if dsa is None else _told(dsa)]
        sale_words = f"SALE calibrated to error {ERROR:g}, visited tiles of the causal ones"
        return [
            bars.at_most(
                bars.worded(base, sale_words).replace(note=told[0]),
                None if sale is None else sale.density, SALE_TILES, "",
            ),
            bars.at_most(
                bars.worded(base, "flat DSA, attended pairs over those that its card has").replace(note=told[1]),
                dsa.area / whole if dsa is not None and dsa.area else None, 1.0, "",
            ),
        ]  # fmt: skip

    return Bar(f"bar-{name}", (case,), judge)


def _told(row: Row) -> str:
    speed = "" if row.speed is None else f", {row.speed:.2f}x dense"
    return f"error {row.error_norm:.3f}, {row.median_ms:.0f} ms{speed}, choosing {row.selection:.0%}"


def _permuted(kind: str, shape: Shape) -> Bar:
    name = f"pbs-{kind}-{shape.tokens}"
    base = _promise(name, f"PBS, tiles over those without permutation at equal kept weight, {kind}, N = {shape.tokens}")

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group in measured for row in group]
        with_it = bars.one(rows, "pbs")
        without = [row for row in rows if row.provider == "pbs-unpermuted"]
        if with_it is None or with_it.mass is None or not with_it.density:
            return [bars.at_most(base, None, FEWER)]
        tiles = sparse_parts.tiles_at(with_it.mass, without)
        note = f"{with_it.density:.1%} of the tiles for {with_it.mass:.1%} of the weight"
        note += "; without never as much" if tiles is None else f"; without {tiles:.1%}"
        found = with_it.density / (1.0 if tiles is None else tiles)
        return [bars.at_most(base.replace(note=note), found, FEWER)]

    return Bar(f"bar-{name}", (sparse_parts.permuted(kind, shape),), judge)


def _near(grid: tuple[int, int], window: int, heads: int, width: int, phase: str, options: Options) -> Bar:
    name = f"neighborhood-{grid[0]}x{grid[1]}-window{window}-{phase}"
    words = f"neighbourhood {grid[0]} x {grid[1]}, window {window}, {heads} heads, D {width}, {phase}"
    base = _promise(name, words).replace(length=math.prod(grid), dtype="float32")
    n = math.prod(grid)
    problem = functools.partial(
        Problem, heads=heads, width=width, dtype="float32", phase=phase, seed=options.seed
    )
    who = (bars.OURS, "sdpa", "flex") if phase == "forward" else (bars.OURS, "sdpa")
    seconds = 4.0 + 6e-8 * n**2 * heads / 4 * (3 if phase != "forward" else 1)
    case = bars.attention(name, seconds, lambda: problem(Neighborhood(grid, window), n), who=who)

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group in measured for row in group]
        out = []
        for over, target in (("sdpa", NEAR[phase]), ("flex", OVER_FLEX))[: len(who) - 1]:
            ratio, reason = bars.speedup(rows, over)
            told = "SDPA with the dense mask" if over == "sdpa" else "compiled FlexAttention"
            one = bars.cautioned(bars.worded(base, f"over {told}").replace(note=reason), bars.one(rows, bars.OURS))
            out.append(bars.at_least(one, ratio, target))
        return out

    return Bar(f"bar-{name}", (case,), judge)


def _predicted(grid: tuple[int, int], window: int, heads: int, width: int) -> Bar:
    name = f"neighborhood-predicted-{grid[0]}x{grid[1]}"
    words = f"predicted against measured speed-up, neighbourhood {grid[0]} x {grid[1]}, window {window}"
    base = _promise(name, words).replace(length=math.prod(grid), dtype="float32")

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group in measured for row in group]
        ours, plain, foreseen = (bars.one(rows, who) for who in (bars.OURS, SDPA, "predicted"))
        if not (ours and plain and foreseen and ours.median_ms and plain.median_ms and foreseen.measured):
            return [bars.at_most(base, None, PREDICTED)]
        found = plain.median_ms / ours.median_ms
        off = max(found / foreseen.measured, foreseen.measured / found)
        noted = base.replace(note=f"predicted {foreseen.measured:.1f}x, measured {found:.1f}x")
        return [bars.at_most(bars.cautioned(noted, ours, plain), off, PREDICTED)]

    return Bar(f"bar-{name}", (sparse_parts.predicted(grid, window, heads, width),), judge)


def _skipping(shape: Shape, options: Options) -> Bar:
    name = f"blasst-{shape.tokens}-{shape.dtype}"
    base = _promise(name, f"BLASST, N = {shape.tokens}, {shape.heads}:{shape.kv_heads} heads, {shape.dtype}", shape)

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group in measured for row in group]
        some = [row for row in rows if row.setting is not None and row.median_ms and row.density is not None]
        dense = [row.median_ms for row in _dense(rows) if row is not None and row.median_ms]
        words = [bars.worded(base, what) for what in (
            "time over the faster dense attention when nothing is skipped",
            "time at each threshold over that at the next lower one",
            "largest error over its bound",
        )]  # fmt: skip
        if len(some) != 1 + len(sparse_parts.LAMBDAS) or len(dense) != 2:
            return [bars.at_most(one, None, most) for one, most in zip(words, (NO_SKIPS, 1.0, 1.0), strict=True)]
        times = [row.median_ms or 0.0 for row in some]
        steps = [b / a for a, b in zip(times, times[1:], strict=False)]
        told = ", ".join(f"{row.setting}: {row.density:.0%} of the tiles, {row.median_ms:.0f} ms" for row in some)
        out = [
            bars.at_most(words[0], times[0] / min(dense), NO_SKIPS),
            bars.at_most(words[1].replace(note=told), max(steps), 1.0),
            bars.at_most(words[2], max(row.measured or 0.0 for row in some), 1.0, ""),
        ]
        return [bars.cautioned(row, *some, *_dense(rows)) for row in out]

    return Bar(f"bar-{name}", (sparse_parts.skipping(shape, options),), judge)
