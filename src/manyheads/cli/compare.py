"""``manyheads compare``: what changed between two results files."""

from __future__ import annotations

from pathlib import Path

from manyheads.bench.compare import FLOOR, Change, Comparison, compare
from manyheads.bench.display import number
from manyheads.bench.row import Row
from manyheads.bench.store import Results, read

SHOWN = 12
"""Rows of a kind that are listed unless all are asked for."""


def run(old: Path, new: Path, fail_on_slower: float | None, *, everything: bool = False) -> int:
    """Reads two files and prints what changed.

    Args:
        old: The earlier results.
        new: The later results.
        fail_on_slower: Percent by which a row may be slower beyond noise; ``None`` to fail on nothing.
        everything: Whether every row is listed.

    Returns:
        The exit status.

    Raises:
        ValueError: A file that cannot be read.
    """
    return report(read(old), read(new), fail_on_slower, everything=everything)


def report(old: Results, new: Results, fail_on_slower: float | None, *, everything: bool = False) -> int:
    """Prints what changed between results that have been read.

    Args:
        old: The earlier results.
        new: The later results.
        fail_on_slower: Percent by which a row may be slower beyond noise; ``None`` to fail on nothing.
        everything: Whether every row is listed.

    Returns:
        The exit status.
    """
    found = compare(old, new)
    print("\n".join(lines(found, len(found.changes) if everything else SHOWN)))
    status = found.status(fail_on_slower)
    if status:
        print(f"failed: something of ours is slower by more than {fail_on_slower:g}% beyond noise, or broke")
    return status


def lines(found: Comparison, shown: int = SHOWN) -> list[str]:
    """Writes a comparison for people.

    Args:
        found: The comparison.
        shown: Rows of a kind that are listed.

    Returns:
        The lines.
    """
    what = "times" if found.same_machine else "times in units of a peer of the same file"
    counts = {verdict: len(found.of(verdict)) for verdict in ("faster", "slower", "within noise", "noisy")}
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    out = [f"compared: {len(found.changes)} rows by their {what}: {told or 'none was timed'}"]
    if found.drift > FLOOR:
        out.append(f"  unchanged peers drifted by {found.drift:.0%} between the runs; less than that is noise")
    for name, (before, after) in found.environment.items():
        out.append(f"  {name}: {before if before is not None else 'none'} -> {after if after is not None else 'none'}")
    if not found.same_machine:
        out.append("  the machines differ: absolute times do not compare, and errors and ratios may differ as well")
    for verdict in ("slower", "faster"):
        out += _listed(verdict, [_changed(change) for change in found.of(verdict)], shown)
    marked = [c for c in found.changes if c.remarks and c.verdict not in ("slower", "faster")]
    out += _listed("changed otherwise", [_changed(change) for change in marked], shown)
    out += _listed("appeared", [_named(row) for row in found.appeared], shown)
    return out + _listed("vanished", [_named(row) for row in found.vanished], shown)


def _listed(head: str, items: list[str], shown: int) -> list[str]:
    if not items:
        return []
    more = [f"  and {len(items) - shown} more (--all lists them)"] if len(items) > shown else []
    return [f"{head}: {len(items)}", *(f"  {item}" for item in items[:shown]), *more]


def _changed(change: Change) -> str:
    parts = [_named(change.new)]
    if change.times is not None and change.verdict in ("slower", "faster"):
        low, middle, high = change.times
        took = f"{middle:.2f}x the time (noise leaves {low:.2f} to {high:.2f})"
        parts.append(f"{took}, {number(change.old.median_ms)} -> {number(change.new.median_ms)} ms")
    return "; ".join((*parts, *change.remarks))


def _named(row: Row) -> str:
    if row.bar is not None:
        return f"{row.suite}: {row.bar}"
    phase = "" if row.phase == "forward" else f" {row.phase}"
    return f"{row.suite}/{row.case}{phase if phase.strip() not in row.case else ''}: {row.provider}"
