"""The bars of ``targets``: what must be measured for each, and how its rows are judged."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from manyheads.bench.measure import attention_rows
from manyheads.bench.row import Row, against
from manyheads.bench.suite import Case, Context, Options
from manyheads.bench.workload import Problem

OURS = "manyheads"


@dataclass(frozen=True)
class Bar:
    """One promise.

    Attributes:
        name: Name of the case in ``targets``.
        cases: What must be measured; the rows of a case that the file has already are used again.
        judge: From the rows of these cases, in order, to rows with target, measured and verdict.
        level: The first level that includes it: ``"quick"`` or ``"default"``.
    """

    name: str
    cases: tuple[Case, ...] = field(repr=False)
    judge: Callable[[list[list[Row]]], list[Row]] = field(repr=False)
    level: str = "default"


def promise(name: str, words: str, **more: object) -> Row:
    """A row of ``targets`` before it is judged.

    Args:
        name: What the bar is about, in short.
        words: The bar in words.
        **more: Other fields of the row.
    """
    return Row("targets", name, OURS, bar=words).replace(**more)


def draw(options: Options, bar: str) -> np.random.Generator:
    """The source of a bar's drawn shape: the same for the same seed, whatever else runs.

    Args:
        options: For the seed.
        bar: Name of the bar.
    """
    return np.random.default_rng([options.seed, zlib.crc32(bar.encode())])


def attention(
    name: str,
    seconds: float,
    problem: Problem | Callable[[], Problem],
    *,
    who: Sequence[str] = (OURS, "sdpa"),
    memory: bool = False,
) -> Case:
    """A measurement that only ``targets`` needs.

    Args:
        name: Of the case.
        seconds: How long it takes, roughly.
        problem: What is computed, or what makes it when its mask takes time to draw.
        who: Providers; by default ours against SDPA.
        memory: Whether peak memory is measured too.

    Returns:
        The case.
    """

    def run(context: Context) -> list[Row]:
        chosen = context.options.chosen(who)
        row = Row("targets", name, "-")
        work = problem if isinstance(problem, Problem) else problem()
        return attention_rows(context, row, work, chosen, with_memory=chosen if memory else ())

    return Case("targets", name, run, seconds, tuple(who))


def at_least(base: Row, measured: float | None, target: float, unit: str = "x") -> Row:
    """A bar that is met from a number upwards.

    Args:
        base: A row of ``targets`` with the bar in words.
        measured: What was found, ``None`` if nothing could be.
        target: The number.
        unit: Its unit.

    Returns:
        The judged row.

    Example:
        >>> at_least(Row("targets", "dense", "manyheads", bar="dense"), 2.0, 1.9).verdict
        'met'
    """
    return _judged(base, measured, f">= {target:g}{_unit(unit)}", measured is not None and measured >= target)


def at_most(base: Row, measured: float | None, target: float, unit: str = "x") -> Row:
    """A bar that is met up to a number; arguments as for ``at_least``."""
    return _judged(base, measured, f"<= {target:.4g}{_unit(unit)}", measured is not None and measured <= target)


def one(rows: Sequence[Row], provider: str) -> Row | None:
    """The row of a provider, ``None`` if it is not there or was not measured."""
    return next((r for r in rows if r.provider == provider and r.status == "measured"), None)


def speedup(rows: Sequence[Row], over: str, ours: str = OURS) -> tuple[float | None, str | None]:
    """Ours against a named provider, if both results are right.

    Args:
        rows: Rows of one case.
        over: Name of the provider.
        ours: Which of our providers.

    Returns:
        The ratio of times, or ``None`` and the reason.
    """
    if reason := doubt(rows, ours) or doubt(rows, over):
        return None, reason
    mine, theirs = one(rows, ours), one(rows, over)
    assert mine is not None and theirs is not None
    return against(mine, theirs).ratio, None


def doubt(rows: Sequence[Row], provider: str) -> str | None:
    """Why the speed of a provider counts for nothing, ``None`` if it may be believed.

    Args:
        rows: Rows of one case.
        provider: Its name.
    """
    row = one(rows, provider)
    if row is None:
        stood = next((r for r in rows if r.provider == provider), None)
        return f"{provider}: {stood.reason if stood is not None else 'took no part'}"
    if row.gate != "green":
        return f"{provider}: error {row.error or 0:.2e} above {row.error_limit or 0:.2e}, no speed-up counts"
    return None


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that ratios have.

    Example:
        >>> geometric_mean([1.0, 4.0])
        2.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))


def dense(base: Row, target: float) -> Callable[[list[list[Row]]], list[Row]]:
    """Ours against SDPA without a mask, at every deviation of the logits; the slowest counts."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        found = [speedup(rows, "sdpa") for rows in measured]
        reasons = [reason for _, reason in found if reason]
        ratios = [ratio for ratio, _ in found if ratio is not None]
        value = min(ratios) if ratios and not reasons else None
        noted = base.replace(note="; ".join(reasons) or _errors(measured) or None)
        return [at_least(cautioned(noted, *(row for rows in measured for row in rows)), value, target)]

    return judge


def against_flex(
    base: Row, names: Sequence[str], mean: float, least: float | None, ours: str = OURS
) -> Callable[[list[list[Row]]], list[Row]]:
    """Ours against compiled FlexAttention over many masks: the geometric mean, and the worst if there is a bar."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        found = {name: speedup(rows, "flex", ours) for name, rows in zip(names, measured, strict=True)}
        reasons = [f"{name}: {reason}" for name, (_, reason) in found.items() if reason]
        ratios = {name: ratio for name, (ratio, _) in found.items() if ratio is not None}
        if reasons or not ratios:
            note = "; ".join(reasons[:3]) + (f" and {len(reasons) - 3} more" if len(reasons) > 3 else "")
            bad = base.replace(note=note or "nothing measured")
            out = [at_least(worded(bad, "geometric mean"), None, mean)]
            return out if least is None else [*out, at_least(worded(bad, "worst mask"), None, least)]
        worst = min(ratios, key=lambda name: ratios[name])
        average = at_least(worded(base, "geometric mean"), geometric_mean(list(ratios.values())), mean)
        if least is None:
            return [average.replace(note=f"worst {ratios[worst]:.2f}x: {worst}")]
        return [average, at_least(worded(base, "worst mask").replace(note=worst), ratios[worst], least)]

    return judge


def rate(base: Row, ours: str, target: float) -> Callable[[list[list[Row]]], list[Row]]:
    """Operations per second of ours, in 1e12; the slowest case counts, and every result must be right."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        reasons = [reason for rows in measured if (reason := doubt(rows, ours))]
        found = [row for rows in measured if (row := one(rows, ours)) and row.gflops]
        slowest = min((row.gflops or 0.0 for row in found), default=None)
        value = None if reasons or slowest is None else slowest / 1e3
        noted = base.replace(provider=ours, note="; ".join(reasons) or _errors(measured, ours) or None)
        return [at_least(cautioned(noted, *found), value, target, "TFLOP/s")]

    return judge


def keeps_rate(base: Row, names: Sequence[str], ours: str, share: float) -> Callable[[list[list[Row]]], list[Row]]:
    """Operations per second over visible pairs, as a share of the dense rate; the first case is the dense one."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        whole = one(measured[0], ours)
        out = []
        for name, rows in zip(names, measured[1:], strict=True):
            reason = doubt(measured[0], ours) or doubt(rows, ours)
            row = one(rows, ours)
            kept = row.gflops / whole.gflops if not reason and row and row.gflops and whole and whole.gflops else None
            noted = worded(base, name).replace(provider=ours, note=reason)
            noted = noted.replace(density=None if row is None else row.density)
            out.append(at_least(cautioned(noted, row, whole), kept, share, "of dense"))
        return out

    return judge


def cost_follows_area(
    base: Row, names: Sequence[str], slope: float, offset: float
) -> Callable[[list[list[Row]]], list[Row]]:
    """Time of each mask over dense time, against the density of visited tiles.

    Dense is the faster of ours and SDPA.

    The first case is the dense one, which is no row of its own.
    """

    def judge(measured: list[list[Row]]) -> list[Row]:
        times = [r.median_ms for p in (OURS, "sdpa") if (r := one(measured[0], p)) and r.gate == "green"]
        whole = min((t for t in times if t is not None), default=None)
        out = []
        for name, rows in zip(names, measured[1:], strict=True):
            ours = one(rows, OURS)
            right = ours is not None and ours.gate == "green"
            share = ours.median_ms / whole if right and ours and ours.median_ms and whole else None
            density = ours.density if ours is not None and ours.density is not None else 1.0
            row = worded(base, name)
            if ours is not None:
                row = row.replace(density=ours.density, area=ours.area, mask=ours.mask)
                row = row.replace(note=f"exact area {ours.area:.1%}" if right else "its error gate is red")
            out.append(at_most(row, share, slope * density + offset, "of dense"))
        return out

    return judge


def backward(base: Row, speed: float, memory: float) -> Callable[[list[list[Row]]], list[Row]]:
    """Forward and backward against SDPA with a boolean mask: time, and peak memory."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = measured[0]
        ratio, reason = speedup(rows, "sdpa")
        peaks = [r.peak_mib if (r := one(rows, p)) is not None else None for p in (OURS, "sdpa")]
        less = max(peaks[1], 0.0) / max(peaks[0], 0.1) if peaks[0] is not None and peaks[1] is not None else None
        note = None if less is None else f"{peaks[0]:.0f} against {peaks[1]:.0f} MiB"
        return [
            at_least(cautioned(worded(base, "speed").replace(note=reason), *rows), ratio, speed),
            at_least(
                worded(base, "peak memory beyond inputs and results").replace(note=note),
                less,
                memory,
                "x less",
            ),
        ]

    return judge


def layout(base: Row, ms: float, mib: float | None) -> Callable[[list[list[Row]]], list[Row]]:
    """Time, peak memory and unique tiles of compiling a mask both ways."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        row = one(measured[0], OURS)
        tiles = None if row is None or row.unique_tiles is None else float(row.unique_tiles)
        out = [
            at_most(cautioned(worded(base, "time"), row), row.median_ms if row else None, ms, "ms"),
            at_most(worded(base, "unique tiles"), tiles, 4, ""),
        ]
        if mib is not None:
            out.insert(1, at_most(worded(base, "peak memory"), row.peak_mib if row else None, mib, "MiB"))
        return out

    return judge


def linear_memory(base: Row, lengths: Sequence[int], gib: float) -> Callable[[list[list[Row]]], list[Row]]:
    """Peak memory per token from the shortest to the longest, and the whole process at the longest."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        found = [one(rows, OURS) for rows in measured]
        peaks = [None if r is None else r.peak_mib for r in found]
        growth = None
        if peaks[0] is not None and peaks[-1] is not None:
            growth = (max(peaks[-1], 0.1) / lengths[-1]) / (max(peaks[0], 0.1) / lengths[0])
        note = ", ".join(f"{n}: {p:.0f} MiB" for n, p in zip(lengths, peaks, strict=True) if p is not None)
        last = found[-1]
        whole = None if last is None or last.process_mib is None else last.process_mib / 1024
        return [
            at_most(worded(base, "growth per token").replace(note=note or None), growth, 1.25),
            at_most(worded(base, f"process peak at {lengths[-1]}"), whole, gib, "GiB"),
        ]

    return judge


def overhead(base: Row, most: dict[str, float]) -> Callable[[list[list[Row]]], list[Row]]:
    """Microseconds of each way through ``attention`` above the bare call."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        out = []
        for provider, target in most.items():
            row = one(measured[0], provider)
            over = None if row is None else row.overhead_us
            out.append(at_most(cautioned(worded(base, provider), row), over, target, "us"))
        return out

    return judge


def packing(base: Row, given: float, by_length: float, cosine: float) -> Callable[[list[list[Row]]], list[Row]]:
    """Sentences per second of the better packing against padded batches, and the agreement of embeddings."""

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = measured[0]
        packed = [r for r in rows if r.provider.startswith("packed") and r.rate and r.gate == "green"]
        why = next((r.reason for r in rows if r.status != "measured"), None)
        best = max(packed, key=lambda r: r.rate or 0.0, default=None)
        out = []
        for words, name, target in (
            ("given order", "padded", given),
            ("sorted by length", "sorted", by_length),
        ):
            theirs = one(rows, name)
            ratio = best.rate / theirs.rate if best and best.rate and theirs and theirs.rate else None
            out.append(
                at_least(
                    worded(base, f"against {words}").replace(note=best.provider if best else why),
                    ratio,
                    target,
                )
            )
        found = [r.agreement for r in rows if r.provider.startswith("packed") and r.agreement is not None]
        agreement = min(found) if found else None
        return [*out, at_least(worded(base, "smallest cosine").replace(note=why), agreement, cosine, "")]

    return judge


def cautioned(base: Row, *rows: Row | None) -> Row:
    """Says in the note when a verdict rests on noisy rows."""
    if not any(row is not None and row.noisy for row in rows):
        return base
    return base.replace(note="; ".join(filter(None, (base.note, "noisy: repeat it on a quiet machine"))))


def _judged(base: Row, measured: float | None, target: str, met: bool) -> Row:
    verdict = "not measured" if measured is None else "met" if met else "missed"
    return base.replace(target=target, measured=measured, verdict=verdict)


def worded(base: Row, more: str) -> Row:
    """A row of ``targets`` whose bar says more."""
    return base.replace(bar=f"{base.bar}: {more}")


def _unit(unit: str) -> str:
    return unit if unit in ("", "x") else f" {unit}"


def _errors(measured: Sequence[Sequence[Row]], ours: str = OURS) -> str:
    parts = []
    for rows in measured:
        mine, theirs = one(rows, ours), one(rows, "sdpa")
        if mine and theirs and mine.error is not None and theirs.error:
            parts.append(f"error {mine.error / theirs.error:.2f}x SDPA's")
    return ", ".join(parts)
