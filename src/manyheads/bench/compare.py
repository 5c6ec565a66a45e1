"""Two results files: what became faster or slower beyond noise, what became wrong, what came and went.

Times are compared row by row on the same machine. Between machines they mean nothing, so there the ratios to the
baseline of each case are compared instead, which both machines measured for themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from manyheads.bench import providers
from manyheads.bench.row import Row
from manyheads.bench.store import Results
from manyheads.bench.suites.overhead import BARE_GRAD
from manyheads.bench.timing import percentile

FLOOR = 0.03
"""Two runs of the same program differ by this share, or by more, however quiet each of them was."""
SURE = 5
"""Rows of unchanged packages from which their drift is taken for that of the machine."""
ERRORS = 1.5
"""An error that grew or shrank by this factor is another result, not another rounding of the same."""
MEMORY = 0.10
"""Peaks of memory that differ by less than this share are the same."""
MACHINE = ("cpu_vendor", "cpu_model", "cores", "threads", "system", "memory_gib", "gpu", "gpu_count")
"""Fields of the environment that make another machine, or another part of it; the other fields are software."""
Key = tuple[Any, ...]


class Bounds(NamedTuple):
    """A quantity and what noise leaves open."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Change:
    """One row in both files.

    Attributes:
        old: The earlier row.
        new: The later row.
        times: How many times as long the later one took, with bounds: below 1 is faster; ``None`` if one of them was
            not timed.
        verdict: ``"faster"``, ``"slower"``, ``"within noise"``, ``"noisy"`` or ``"not timed"``.
        remarks: What else changed: gate, error, memory, verdict of a bar, status.
    """

    old: Row
    new: Row
    times: Bounds | None
    verdict: str
    remarks: tuple[str, ...] = ()

    @property
    def broke(self) -> bool:
        """Whether it was right and measured, and is so no more."""
        worse = self.old.gate == "green" and self.new.gate == "red"
        return worse or (self.old.status == "measured" and self.new.status == "failed")


@dataclass(frozen=True)
class Comparison:
    """What two files say about each other.

    Attributes:
        changes: Rows of both files.
        appeared: Rows that only the later file has.
        vanished: Rows that only the earlier file has.
        environment: Differing fields of the environment, earlier and later.
        same_machine: Whether times were compared; otherwise ratios.
        drift: By which share equal programs differed between the two runs: what is less is noise.
    """

    changes: tuple[Change, ...]
    appeared: tuple[Row, ...]
    vanished: tuple[Row, ...]
    environment: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    same_machine: bool = True
    drift: float = FLOOR

    def of(self, verdict: str) -> list[Change]:
        """Changes with a verdict, the largest first."""
        found = [change for change in self.changes if change.verdict == verdict]
        return sorted(found, key=lambda c: -abs(math.log(c.times.middle)) if c.times is not None else 0.0)

    def status(self, fail_on_slower: float | None) -> int:
        """The exit status of the command.

        Args:
            fail_on_slower: Percent by which a row may be slower beyond noise; ``None`` to fail on nothing.

        Returns:
            1 if a row of ours is slower than that or broke, else 0.
        """
        if fail_on_slower is None:
            return 0
        limit = 1.0 + fail_on_slower / 100
        ours = [change for change in self.changes if not theirs(change.new)]
        slow = [c for c in ours if c.verdict == "slower" and c.times is not None and c.times.middle > limit]
        return int(bool(slow) or any(change.broke for change in ours))


def compare(old: Results, new: Results) -> Comparison:
    """Compares two results files.

    Args:
        old: The earlier one.
        new: The later one.

    Returns:
        What changed.
    """
    differing = _environment(old.header, new.header)
    same = not any(name in differing for name in MACHINE)
    before, after = ({_key(row): row for row in results.rows} for results in (old, new))
    earlier, later = _groups(old.rows), _groups(new.rows)
    pairs = []
    for key in (key for key in after if key in before):
        first, then = before[key], after[key]
        if same:
            times = _times(first, then)
        else:
            times = _ratios(first, then, earlier[_group(first)], later[_group(then)])
        pairs.append((first, then, times))
    drift = _drift(pairs) if same and "torch" not in differing else FLOOR
    return Comparison(
        tuple(_change(first, then, times, drift) for first, then, times in pairs),
        tuple(row for key, row in after.items() if key not in before),
        tuple(row for key, row in before.items() if key not in after),
        differing,
        same,
        drift,
    )


def _drift(pairs: Iterable[tuple[Row, Row, Bounds | None]]) -> float:
    """What four of five rows of peers that did not change differ by: so much is the machine, and not the code."""
    moved = [
        abs(times.middle - 1.0)
        for old, new, times in pairs
        if times is not None and _peer(old) and _peer(new) and old.version == new.version
    ]
    return max(FLOOR, percentile(tuple(moved), 0.8)) if len(moved) >= SURE else FLOOR


def _change(old: Row, new: Row, times: Bounds | None, drift: float) -> Change:
    if times is None:
        verdict = "not timed"
    elif times.low <= 1.0 + drift and times.high >= 1.0 / (1.0 + drift):  # the bounds reach "the same"
        verdict = "noisy" if old.noisy or new.noisy else "within noise"
    else:
        verdict = "slower" if times.middle > 1.0 else "faster"
    return Change(old, new, times, verdict, tuple(_remarks(old, new)))


def _remarks(old: Row, new: Row) -> Iterable[str]:
    if old.status != new.status:
        why = new.reason or old.reason
        yield f"was {old.status}, is {new.status}" + (f" ({why})" if why else "")
    if old.gate != new.gate and old.status == new.status == "measured":
        yield f"gate was {old.gate}, is {new.gate}"
    if old.error is not None and new.error is not None and old.seed == new.seed:
        least = max(min(old.error, new.error), 1e-300)
        if max(old.error, new.error) / least > ERRORS:
            yield f"error {old.error:.1e} -> {new.error:.1e}"
    if old.peak_mib and new.peak_mib and abs(new.peak_mib / old.peak_mib - 1) > MEMORY:
        yield f"memory {old.peak_mib:.0f} -> {new.peak_mib:.0f} MiB"
    if old.verdict != new.verdict:
        yield f"bar was {old.verdict}, is {new.verdict}"
    if old.version != new.version and old.version and new.version:
        yield f"version {old.version} -> {new.version}"


def _times(old: Row, new: Row) -> Bounds | None:
    """How many times as long the later row took; the spreads of both bound it."""
    if not old.median_ms or not new.median_ms:
        return None
    low = (new.p20_ms or new.median_ms) / (old.p80_ms or old.median_ms)
    high = (new.p80_ms or new.median_ms) / (old.p20_ms or old.median_ms)
    return Bounds(low, new.median_ms / old.median_ms, high)


def _ratios(old: Row, new: Row, earlier: list[Row], later: list[Row]) -> Bounds | None:
    """The same with both times in units of a provider that is not ours and that both files have in this case."""
    mine, theirs = ({row.provider: row for row in rows if _peer(row)} for rows in (earlier, later))
    common = [name for name in mine if name in theirs and name != old.provider]
    if not common or "red" in (old.gate, new.gate):
        return None
    base = old.baseline if old.baseline in common else common[0]
    before, after = _times(mine[base], old), _times(theirs[base], new)
    if before is None or after is None:
        return None
    return Bounds(after.low / before.high, after.middle / before.middle, after.high / before.low)


def theirs(row: Row) -> bool:
    """Whether a row measured somebody else's code, which no change of this library makes slower.

    Example:
        >>> [theirs(Row("overhead", "x", name)) for name in ("sdpa", "sdpa with gradients", "delegated", "manyheads")]
        [True, True, False, False]
    """
    known = row.provider in providers.names() and not providers.is_ours(row.provider)
    return known or row.provider in (BARE_GRAD, "padded", "sorted")


def _peer(row: Row) -> bool:
    return theirs(row) and row.gate != "red" and bool(row.median_ms)


def _groups(rows: Iterable[Row]) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    for row in rows:
        found.setdefault(_group(row), []).append(row)
    return found


def _group(row: Row) -> Key:
    return (row.suite, row.case, row.phase)


def _key(row: Row) -> Key:
    """What makes two rows the same measurement; a bar is known by its words."""
    kind = "cpu" if row.device in (None, "cpu") else "gpu"
    if row.bar is not None:
        return (row.suite, row.provider, row.bar, kind)
    where = (row.input, row.seed, row.cache or "warm", kind)  # files of the first version were all warm
    return (*_group(row), row.provider, row.shape, row.dtype, row.setting, *where)


def _environment(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    mine, theirs = (header.get("environment", {}) for header in (old, new))
    names = dict.fromkeys((*mine, *theirs))
    return {name: (mine.get(name), theirs.get(name)) for name in names if mine.get(name) != theirs.get(name)}
