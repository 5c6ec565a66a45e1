"""Ten lines that say what a run came to, in words that need no legend."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from manyheads.bench.display import number
from manyheads.bench.naming import place
from manyheads.bench.row import Row
from manyheads.bench.store import Results

OURS = "manyheads"
MOST = 10


def lines(results: Results) -> list[str]:
    """Says what a run came to.

    Args:
        results: Rows and header of a results file.

    Returns:
        At most ten lines, each about one thing; what was not measured is not spoken of.

    Example:
        >>> ours = Row("masks", "causal", "manyheads", median_ms=2.0, gate="green", ratio=2.5, baseline="sdpa")
        >>> lines(Results({}, [ours]))[2]
        'Speed: manyheads ran 2.50x as fast as the fastest other way to do the same work (one comparison).'
    """
    rows = results.rows
    measured = [row for row in rows if row.bar is None]
    said = [
        _what(results.header, measured),
        _right(measured),
        _speed(measured),
        _extremes(measured),
        _machine(measured),
        _memory(measured),
        _packing(measured),
        _overhead(measured),
        _quality(measured),
        _targets([row for row in rows if row.verdict is not None and row.task is None]),
        _claims([row for row in rows if row.verdict is not None and row.task is not None]),
        _caution(measured, results.notes),
    ]
    return [line for line in said if line][:MOST]


def _what(header: dict[str, Any], rows: Sequence[Row]) -> str:
    env = header.get("environment") or {}
    if not rows:
        return "Measured: nothing; the file has no measurements."
    where = [str(x) for x in (env.get("cpu_model") or env.get("cpu_vendor"),) if x]
    where += [_count(int(env["threads"]), "thread")] if env.get("threads") else []
    where += [f"torch {env['torch']}"] if env.get("torch") else []
    cases = len({(row.suite, row.case) for row in rows})
    done = sum(row.median_ms is not None for row in rows)
    models = sum(row.score is not None for row in rows)
    what = " and ".join(
        [_count(done, "timing")] * bool(done or not models) + [_count(models, "trained model")] * bool(models)
    )
    return f"Measured: {what} in {_count(cases, 'case')}{' on ' if where else ''}{', '.join(where)}."


def _right(rows: Sequence[Row]) -> str | None:
    judged = [row for row in rows if row.gate in ("green", "red")]
    if not judged:
        timed = any(row.median_ms is not None for row in rows)
        return "Correct: no result was compared with an exact one, so no speed-up is claimed." if timed else None
    red = [row for row in judged if row.gate == "red"]
    if not red:
        whole = "the one result" if len(judged) == 1 else f"all {len(judged)} results"
        return f"Correct: {whole} compared with float64 came as close to it as rounding allows."
    who = ", ".join(dict.fromkeys(row.provider for row in red))
    share = f"{len(red)} of {_count(len(judged), 'result')}"
    return f"Wrong: {share} missed float64 by more than rounding ({who}) and get no speed-up."


def _speed(rows: Sequence[Row]) -> str | None:
    ratios = [row.ratio for row in _compared(rows) if row.ratio is not None]
    if not ratios:
        return None
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    start = f"Speed: {OURS} ran {number(mean)}x as fast as the fastest other way to do the same work"
    if len(ratios) == 1:
        return f"{start} (one comparison)."
    ahead = sum(ratio >= 1.05 for ratio in ratios)
    level = sum(0.95 <= ratio < 1.05 for ratio in ratios)
    counts = f"faster in {ahead}, about equal in {level}, slower in {len(ratios) - ahead - level}"
    return f"{start} (geometric mean of {len(ratios)}: {counts})."


def _extremes(rows: Sequence[Row]) -> str | None:
    noisy = {(row.suite, row.case, row.provider) for row in rows if row.noisy}
    compared = [
        row
        for row in _compared(rows)
        if not noisy & {(row.suite, row.case, row.provider), (row.suite, row.case, row.baseline or "")}
    ]
    if len(compared) < 2:
        return None
    best, worst = (pick(compared, key=lambda row: row.ratio or 0.0) for pick in (max, min))
    parts = [f"{number(row.ratio)}x as fast as {row.baseline} for {place(row)}" for row in (best, worst)]
    return f"Best: {parts[0]}; worst: {parts[1]} (noisy timings left out)."


def _machine(rows: Sequence[Row]) -> str | None:
    ours = [row for row in rows if row.provider == OURS and row.gate == "green" and row.of_matrix_rate]
    parts = []
    for dtype in dict.fromkeys(row.dtype for row in ours):
        best = max(row.of_matrix_rate or 0.0 for row in ours if row.dtype == dtype)
        parts.append(f"{100 * best:.0f}% in {dtype}")
    if not parts:
        return None
    return f"Machine: at best {OURS} reached {' and '.join(parts)} of the rate of a plain matrix product here."


def _memory(rows: Sequence[Row]) -> str | None:
    pairs = []
    for row in rows:
        if row.provider == OURS and row.peak_mib is not None:
            pairs += [
                (other.peak_mib / max(row.peak_mib, 0.1), row, other)
                for other in rows
                if (other.suite, other.case) == (row.suite, row.case) and other is not row and other.peak_mib
            ]
    if not pairs:
        return None
    _, ours, other = max(pairs, key=lambda pair: pair[0])
    return (
        f"Memory: at best {number(ours.peak_mib)} MiB beyond inputs and results where {other.provider} needs "
        f"{number(other.peak_mib)} ({place(ours)})."
    )


def _packing(rows: Sequence[Row]) -> str | None:
    rated = [row for row in rows if row.rate is not None and row.ratio is not None and row.baseline != row.provider]
    if not rated:
        return None
    best = max(rated, key=lambda row: row.ratio or 0.0)
    return (
        f"Packing: {best.provider} does {number(best.rate)} {best.rate_unit or 'items/s'} ({best.dtype}), "
        f"{number(best.ratio)} times as many as {best.baseline}."
    )


def _overhead(rows: Sequence[Row]) -> str | None:
    found: dict[str, float] = {}
    for row in rows:
        if row.overhead_us is not None:
            found.setdefault(row.provider, row.overhead_us)
    if not found:
        return None
    parts = ", ".join(f"{us:.1f} us ({name})" for name, us in found.items())
    return f"Overhead: one call costs {parts} more than the bare call of torch."


def _quality(rows: Sequence[Row]) -> str | None:
    found: dict[str, dict[str, list[float]]] = {}
    signs = {}
    for row in rows:
        if row.task is not None and row.score is not None:
            found.setdefault(row.task, {}).setdefault(row.provider, []).append(row.score)
            signs[row.task] = 1.0 if row.better == "higher" else -1.0
    if not found:
        return None
    ahead = [
        f"{max(some, key=lambda who: signs[task] * statistics.fmean(some[who]))} in {task}"
        for task, some in found.items()
    ]
    return f"Quality: on average over seeds the best is {', '.join(ahead)}."


def _claims(bars: Sequence[Row]) -> str | None:
    if not bars:
        return None
    met, missed = (sum(b.verdict == v for b in bars) for v in ("met", "missed"))
    return f"Claims: of {_count(len(bars), 'claim')} from papers, {met} held in these small models, {missed} did not."


def _targets(bars: Sequence[Row]) -> str | None:
    if not bars:
        return None
    met, missed, unknown = (sum(b.verdict == v for b in bars) for v in ("met", "missed", "not measured"))
    open_ones = f", {unknown} could not be measured" if unknown else ""
    return f"Targets: {met} of {len(bars)} promises of speed and memory are kept, {missed} missed{open_ones}."


def _caution(rows: Sequence[Row], notes: Sequence[str]) -> str | None:
    parts = []
    if noisy := sum(bool(row.noisy) for row in rows):
        parts.append(f"{_count(noisy, 'timing')} scattered too much to be trusted")
    if refused := sum(row.status == "refused" for row in rows):
        parts.append(f"{_count(refused, 'row')} refused with a reason")
    if failed := sum(row.status == "failed" for row in rows):
        parts.append(f"{failed} failed")
    parts += list(notes)
    return f"Caution: {'; '.join(parts)}." if parts else None


def _compared(rows: Sequence[Row]) -> list[Row]:
    """Ours against somebody else."""
    return [row for row in rows if row.provider == OURS and row.ratio is not None and row.baseline != OURS]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
