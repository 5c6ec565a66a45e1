"""The efficiency of providers, fitted from a results file, and how far predictions with it are off.

For each row that was measured, believed (green gate) and quiet, the slowest unit's time at the machine's full rates is
divided by the measured median. The efficiency of a provider, dtype, phase and kind of mask is the median of these
shares; the 20th and the 80th percentile are its spread. Where a combination was not measured, coarser ones serve.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from manyheads.bench.limits import Limits
from manyheads.bench.planning.model import Efficiency, Work, count, predict, unit_times
from manyheads.bench.redraw import problem_of
from manyheads.bench.row import Row
from manyheads.bench.store import Results
from manyheads.bench.timing import percentile
from manyheads.bench.workload import PHASES, Problem
from manyheads.engine.tiled.plan import cheapest
from manyheads.mask import TileLayout

OURS = ("manyheads", "manyheads-blocked", "manyheads-triton")
FITTED = (*OURS, "sdpa", "flex", "varlen")
"""Providers whose way of visiting a mask is known."""

Kind = str


class Sample(NamedTuple):
    """One row as the fit sees it: its work, and the share of the perfect speed that it reached."""

    row: Row
    problem: Problem
    work: Work
    kind: Kind
    share: float

    @property
    def case(self) -> tuple[str | None, int | None]:
        """What a prediction that shall not know the row must leave out: its mask and length."""
        return self.row.mask, self.row.length


@dataclass(frozen=True)
class Fit:
    """Samples of one results file.

    Attributes:
        samples: What the efficiencies are taken from.
        source: The file and its day.
    """

    samples: tuple[Sample, ...]
    source: str

    def efficiency(
        self,
        providers: Sequence[str],
        dtype: str,
        phase: str,
        kind: Kind,
        *,
        without: tuple[str | None, int | None] | None = None,
    ) -> Efficiency | None:
        """The efficiency of the first of some providers that was measured.

        Args:
            providers: Names, the best match first.
            dtype: Dtype of the inputs.
            phase: ``"forward"``, ``"backward"`` or ``"forward+backward"``.
            kind: What ``kind_of`` says of the problem. One query is a case of its own: nothing else stands for it.
            without: Mask and length of rows to leave out.

        Returns:
            The efficiency; from other kinds of masks, then other dtypes, then other phases, where this combination was
            not measured, which its source then says. ``None`` where nothing fits.
        """
        asked = {"dtype": dtype, "phase": phase, "kind": kind}
        for loose in ((), ("kind",), ("dtype",), ("phase",), ("kind", "dtype")):
            if kind == "decode" and "kind" in loose:
                continue
            wanted = {name: value for name, value in asked.items() if name not in loose}
            for provider in providers:
                shares = [s.share for s in self._like(provider, wanted) if s.case != without]
                if shares:
                    words = ", ".join([provider, *(f"any {name}" if name in loose else asked[name] for name in asked)])
                    return _efficiency(shares, f"{len(shares)} rows of {self.source}: {words}")
        return None

    def _like(self, provider: str, wanted: dict[str, str]) -> Iterable[Sample]:
        for sample in self.samples:
            found = {"dtype": sample.row.dtype, "phase": sample.row.phase, "kind": sample.kind}
            if "kind" not in wanted and sample.kind == "decode":
                continue
            if sample.row.provider == provider and all(found[name] == value for name, value in wanted.items()):
                yield sample


class Check(NamedTuple):
    """A row, predicted without the rows of its own mask and length."""

    row: Row
    predicted_ms: float
    low_ms: float
    high_ms: float

    @property
    def factor(self) -> float:
        """Predicted over measured or the inverse, whichever is above 1."""
        assert self.row.median_ms is not None
        ratio = self.predicted_ms / self.row.median_ms
        return max(ratio, 1 / ratio)


def fit(results: Results) -> Fit:
    """Takes samples from a results file.

    Args:
        results: Its contents.

    Returns:
        The samples; rows that are noisy, not green, cold, or limited to fewer threads than the limits are left out, and
        so are rows whose mask cannot be drawn again.

    Raises:
        ValueError: The file holds no machine limits.
    """
    if "limits" not in results.header:
        raise ValueError(f"results: {results.path} holds no machine limits; an efficiency is a share of them")
    limits = Limits.from_dict(results.header["limits"])
    day = str(results.header.get("started", "an unknown day"))[:10]
    source = f"{results.path.name if results.path else 'results'} ({day})"
    found = (_sample(row, limits) for row in results.rows)
    return Fit(tuple(sample for sample in found if sample is not None), source)


def validate(results: Results) -> list[Check]:
    """Predicts every sample from the others: rows of the same mask and length are left out of its fit.

    Args:
        results: Contents of a results file.

    Returns:
        One check for each sample that can still be predicted.

    Raises:
        ValueError: The file holds no machine limits.
    """
    known = fit(results)
    limits = Limits.from_dict(results.header["limits"])
    checks = []
    for s in known.samples:
        dtype = s.row.dtype or "float32"
        found = known.efficiency([s.row.provider], dtype, s.row.phase, s.kind, without=s.case)
        if found is not None:
            ms, low, high, *_ = predict(s.work, limits, dtype, found)
            checks.append(Check(s.row, ms, low, high))
    return checks


def error_table(checks: Sequence[Check]) -> list[tuple[str, int, float, float, float]]:
    """How far predictions are off, by provider and dtype.

    Args:
        checks: What ``validate`` returns.

    Returns:
        Provider and dtype, number of rows, and the factor between prediction and measurement: median, that of the worst
        row in ten, and the worst.
    """
    groups: dict[str, list[float]] = {}
    for check in checks:
        groups.setdefault(f"{check.row.provider}, {check.row.dtype}, {check.row.phase}", []).append(check.factor)
    groups["all"] = [check.factor for check in checks]
    return [
        (name, len(factors), statistics.median(factors), percentile(tuple(factors), 0.9), max(factors))
        for name, factors in groups.items()
        if factors
    ]


def kind_of(problem: Problem) -> Kind:
    """``"decode"`` for one query, ``"whole"`` for masks that dense kernels know, else ``"masked"``."""
    if problem.queries == 1 < problem.nk:
        return "decode"
    square = problem.queries == problem.nk
    return "whole" if problem.mask.text == "full" or (problem.mask.text == "causal" and square) else "masked"


def work_of(provider: str, problem: Problem, *, cache: int | None = None, kind: str = "cpu") -> Work:
    """What a provider has to do for a problem: the tiles that it visits, or every pair.

    Args:
        provider: One of ``FITTED``.
        problem: The call.
        cache: Bytes of cache that one head's keys and values can use; the model's default by default.
        kind: ``"cpu"`` or ``"gpu"``, which differ in their tiles.

    Returns:
        The counts.
    """
    whole = kind_of(problem) != "masked"
    dense = provider == "sdpa" and kind_of(problem) == "masked"
    if problem.queries == 1:
        tile = (1, 128)
    elif kind == "cpu" and not dense and provider != "flex":
        tile = (256, 256) if whole and provider != "manyheads-blocked" else _engine_tile(problem)
    else:
        tile = (128, 128)
    given = {} if cache is None else {"cache": cache}
    return _counted(problem, tile, dense, **given)


@functools.lru_cache(maxsize=256)
def _counted(problem: Problem, tile: tuple[int, int], dense: bool, **given: int) -> Work:
    return count(problem, tile=tile, dense=dense, **given)


def _engine_tile(problem: Problem) -> tuple[int, int]:
    """The tile that our engine chooses on a CPU."""
    half = torch.empty((), dtype=problem.torch_dtype).element_size() == 2
    return cheapest(lambda size: _tiles(problem, size), problem.queries, half, problem.backward).tile


def _tiles(problem: Problem, tile: tuple[int, int]) -> TileLayout:
    return problem.mask.tiles(problem.queries, problem.nk, tile=tile, batch=problem.batch, heads=problem.heads)


def _sample(row: Row, limits: Limits) -> Sample | None:
    quiet = row.status == "measured" and row.gate == "green" and row.median_ms and not row.noisy
    same = row.threads in (None, limits.threads) and row.cache != "cold" and (row.device or "cpu") == limits.device
    if not (quiet and same) or row.provider not in FITTED or row.phase not in PHASES:
        return None
    problem = problem_of(row)
    if problem is None or problem.dtype not in limits.matrix:
        return None
    work = work_of(row.provider, problem, kind="cpu" if limits.device == "cpu" else "gpu")
    perfect = max(unit_times(work, limits, problem.dtype).values())
    return Sample(row, problem, work, kind_of(problem), perfect / (row.median_ms or 1.0))


def _efficiency(shares: list[float], source: str) -> Efficiency:
    middle = statistics.median(shares)
    if len(shares) < _FEW:  # two rows say nothing about a spread
        return Efficiency(middle, min(*shares, 0.8 * middle), max(*shares, 1.25 * middle), len(shares), source)
    low, high = (percentile(tuple(shares), share) for share in (0.2, 0.8))
    return Efficiency(middle, low, high, len(shares), source)


_FEW = 3
