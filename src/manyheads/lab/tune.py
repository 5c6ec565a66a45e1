"""Finds the fastest configuration of each row of the table by measuring, and keeps it only where it clearly wins.

For each row: every legal configuration is checked against the reference and timed in heats together with the one that
the table has (the incumbent), interleaved, so that what the machine does meanwhile falls on all alike. The fastest meet
the incumbent again in a final with more rounds. Then the switches of the forward kernel (a polynomial for the
exponential, rescaling only when the maximum has grown, programs that stay) are tried on the winner one after the other.
Whatever is not faster by more than ``MARGIN`` changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from manyheads.engine.configs import Config, Key
from manyheads.lab.search import Place

MARGIN = 0.02
"""What must be gained before anything changes."""
HEAT, FINALISTS = 7, 4
SWITCHES: tuple[tuple[str, tuple[int, ...]], ...] = (("exp", (1, 4)), ("rescale", (8,)), ("persistent", (1, 2)))
"""Switches of the forward kernel and their values besides 0, in the order in which they are tried."""


class Bench(Protocol):
    """What measures; ``manyheads.cli.measure`` has the one for a GPU."""

    def check(self, place: Place, config: Config) -> str:
        """Why a configuration must not be used: a wrong result or a launch that failed; empty when all is well."""

    def times(self, place: Place, configs: Sequence[Config], *, final: bool = False) -> list[float]:
        """Milliseconds of each configuration, medians of interleaved rounds; more rounds in a final."""


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried.

    Attributes:
        stage: ``"heat"``, ``"final"`` or ``"switch"``.
        config: What was tried.
        ms: Median time in milliseconds; None if it was not timed.
        base_ms: The incumbent in the same rounds.
        error: Why it must not be used; empty when all is well.
    """

    stage: str
    config: Config
    ms: float | None
    base_ms: float | None
    error: str = ""

    @property
    def ratio(self) -> float:
        """Time over that of the incumbent; infinite if it was not timed."""
        return float("inf") if self.ms is None or not self.base_ms else self.ms / self.base_ms


class Journal:
    """A file of finished trials, one line of JSON each, so that a run can go on where it was broken off."""

    def __init__(self, path: Path | None, header: Mapping[str, Any], *, resume: bool = False) -> None:
        """Opens the file.

        Args:
            path: The file; None keeps everything in memory.
            header: What the trials depend on: the device, versions, the problem.
            resume: Whether to go on with what the file holds.

        Raises:
            ValueError: ``resume``, and the file was written for another header or is no such file.
        """
        self.path = path
        self.trials: dict[Key, list[Trial]] = {}
        self.winners: dict[Key, Config] = {}
        header = json.loads(json.dumps(dict(header)))
        if path is None:
            return
        if resume and path.is_file():
            self._read(header)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"kind": "header", **header}) + "\n", encoding="utf-8")

    def tried(self, place: Place, stage: str) -> dict[Config, Trial]:
        """What a row has seen of a stage, by configuration."""
        return {t.config: t for t in self.trials.get(place.key, []) if t.stage == stage}

    def add(self, place: Place, trial: Trial) -> None:
        """Keeps a trial."""
        self.trials.setdefault(place.key, []).append(trial)
        self._write({"kind": "trial", "place": place.key, **asdict(trial)})

    def won(self, place: Place, config: Config) -> None:
        """Keeps the winner of a row, which is then finished."""
        self.winners[place.key] = config
        self._write({"kind": "winner", "place": place.key, "config": asdict(config)})

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _read(self, header: Mapping[str, Any]) -> None:
        assert self.path is not None
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut off by a crash: that trial is made again
            kind = entry.pop("kind", None) if isinstance(entry, dict) else None
            if number == 1:
                self._same(header, entry if kind == "header" else None)
            elif kind == "trial":
                key = _key(entry.pop("place"))
                trial = Trial(**{**entry, "config": Config(**entry["config"])})
                self.trials.setdefault(key, []).append(trial)
            elif kind == "winner":
                self.winners[_key(entry["place"])] = Config(**entry["config"])

    def _same(self, mine: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> None:
        if theirs is None:
            raise ValueError(f"resume: {self.path} is no journal of `manyheads tune`")
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"resume: {self.path} was measured with another {name} ({theirs.get(name)!r} there, "
                    f"{mine.get(name)!r} here); choose another --out"
                )


def tune(
    places: Iterable[Place],
    bench: Bench,
    *,
    incumbents: Mapping[Key, Config],
    legal: Callable[[Place], Sequence[Config]],
    journal: Journal,
    source: str,
    progress: Callable[[str], object] = lambda line: None,
) -> dict[Key, Config]:
    """Measures rows of the table.

    Args:
        places: Which rows.
        bench: What measures.
        incumbents: The table.
        legal: The configurations of a row that may be tried.
        journal: Where trials are kept, and what an earlier run has kept.
        source: What a measured row says of where it comes from: the device.
        progress: Called with a line for each thing that happens.

    Returns:
        The rows that were measured, each with its winner.
    """
    done: dict[Key, Config] = {}
    for place in places:
        if place.key in journal.winners:
            done[place.key] = journal.winners[place.key]
            progress(f"{place}: measured before, {in_words(done[place.key])}")
            continue
        incumbent = incumbents[place.key]
        winner = _switched(place, bench, _tiled(place, bench, incumbent, legal(place), journal, progress), journal)
        # an incumbent that wins has now been measured too
        winner = replace(winner, source=source)
        journal.won(place, winner)
        done[place.key] = winner
        progress(f"{place}: {in_words(winner)}" + ("" if _shape(winner) != _shape(incumbent) else ", as before"))
    return done


def in_words(config: Config) -> str:
    """A configuration in words.

    Example:
        >>> in_words(Config(128, 64, 8, 3, exp=4))
        '128 x 64, 8 warps, 3 stages, exp 4'
    """
    on = [f"{name} {value}" for name, _ in SWITCHES if (value := getattr(config, name))]
    return ", ".join([f"{config.bm} x {config.bn}", f"{config.warps} warps", f"{config.stages} stages", *on])


def _tiled(
    place: Place,
    bench: Bench,
    incumbent: Config,
    some: Sequence[Config],
    journal: Journal,
    progress: Callable[[str], object],
) -> Config:
    """The fastest tile, warps and stages."""
    if why := bench.check(place, incumbent):
        progress(f"{place}: what the table has fails: {why}")
        incumbent = next((c for c in some if not bench.check(place, c)), incumbent)
    known = journal.tried(place, "heat")
    left = [c for c in some if _shape(c) != _shape(incumbent) and c not in known]
    for start in range(0, len(left), HEAT):
        for trial in _round(place, bench, incumbent, left[start : start + HEAT], "heat"):
            journal.add(place, trial)
            known[trial.config] = trial
        progress(f"{place}: {min(start + HEAT, len(left))} of {len(left)} timed")
    best = sorted((t for t in known.values() if not t.error), key=lambda t: t.ratio)[:FINALISTS]
    final = journal.tried(place, "final") or {
        t.config: t for t in _round(place, bench, incumbent, [t.config for t in best], "final", kept=journal)
    }
    return _better(incumbent, final.values())


def _switched(place: Place, bench: Bench, winner: Config, journal: Journal) -> Config:
    """The winner with the switches that pay."""
    if place.kernel != "forward":
        return winner
    for name, values in SWITCHES:
        known = journal.tried(place, "switch")
        some = [_with(winner, name, value) for value in values if not (value == 4 and place.arch == "gfx942")]
        missing = [c for c in some if c not in known]
        fresh = {t.config: t for t in _round(place, bench, winner, missing, "switch", kept=journal)}
        winner = _better(winner, [(known | fresh)[c] for c in some])
    return winner


def _round(
    place: Place, bench: Bench, incumbent: Config, some: Sequence[Config], stage: str, kept: Journal | None = None
) -> Iterator[Trial]:
    """Checks and times some configurations beside the incumbent."""
    failed = {c: why for c in some if (why := bench.check(place, c))}
    good = [c for c in some if c not in failed]
    times = bench.times(place, [incumbent, *good], final=stage != "heat") if good else [0.0]
    base = times[0] or None
    found = [Trial(stage, c, ms, base) for c, ms in zip(good, times[1:], strict=True)]
    for trial in [*found, *(Trial(stage, c, None, None, why) for c, why in failed.items())]:
        if kept is not None:
            kept.add(place, trial)
        yield trial


def _better(incumbent: Config, trials: Iterable[Trial]) -> Config:
    best = min((t for t in trials if not t.error), key=lambda t: t.ratio, default=None)
    return best.config if best is not None and best.ratio < 1 - MARGIN else incumbent


def _with(config: Config, switch: str, value: int) -> Config:
    changed: dict[str, Any] = {switch: value}
    return replace(config, **changed)


def _shape(config: Config) -> Config:
    return replace(config, source="")


def _key(values: Sequence[Any]) -> Key:
    kernel, arch, width, itemsize, kind = values
    return (kernel, arch, width, itemsize, kind)
