"""``manyheads bench``: from what was asked to cases, a results file and tables."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.bench import display, limits, providers
from manyheads.bench.environment import environment, one_line
from manyheads.bench.limits import Limits
from manyheads.bench.runner import Outcome, Run
from manyheads.bench.store import Results, Store, probe, resumable
from manyheads.bench.suite import MODULES, Case, Options, load, unfold
from manyheads.bench.workload import DTYPES, Problem
from manyheads.common.errors import unknown
from manyheads.mask import as_mask

_UNDERSTOOD = {
    "masks": ("masks", "layouts"),
    "lengths": ("masks", "layouts"),
    "dtypes": ("masks", "packing"),
    "providers": ("masks", "layouts", "overhead", "packing"),
    "input": ("masks",),
}
"""Which suites a choice applies to; the others are left out unless they are named."""


@dataclass(frozen=True)
class Request:
    """What was asked.

    Attributes:
        suites: Names; empty for all.
        options: What the suites see.
        out: The results file.
        resume: Whether to continue it.
        dry_run: Whether only to say what would run.
        verdict: Whether a missed bar fails the command.
        arguments: What stood on the command line, for the results file.
    """

    suites: tuple[str, ...]
    options: Options
    out: Path | None = None
    resume: bool = False
    dry_run: bool = False
    verdict: bool = True
    arguments: tuple[str, ...] = ()


def run(request: Request) -> int:
    """Runs the benchmark.

    Args:
        request: What was asked.

    Returns:
        The exit status.

    Raises:
        ValueError: Something was asked that does not exist, or the output cannot be written.
    """
    cases = plan(request)
    if request.dry_run:
        return _say_plan(cases)
    if request.resume and request.out is None:
        raise ValueError("resume: name the file to continue with --out")
    env = environment()
    header: dict[str, Any] = {
        "environment": env,
        "options": _plain(request),
        "command": shlex.join(["manyheads", *request.arguments]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    out = request.out or Path("reports") / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    earlier = resumable(out, header) if request.resume else None
    store, machine = _open(out, header, earlier, request.options)
    print(f"machine: {one_line(env)}\nlimits:  {machine.line()}")
    print(
        f"\n{display.capability_table(providers.capabilities(_typical(), _who(request.options)))}\n",
        flush=True,
    )
    with display.choose(cases) as shown:
        done = Run(
            request.options,
            store,
            shown,
            rows=earlier.rows if earlier is not None else (),
            finished=sorted(earlier.finished) if earlier is not None else (),
            machine=machine,
        )
        outcome = done.all(cases)
    display.show_tables(outcome.rows)
    _close(outcome, env, machine, store.path, request)
    return outcome.status(verdict=request.verdict)


def plan(request: Request) -> list[Case]:
    """The cases that were asked for, every name checked.

    Args:
        request: What was asked.

    Returns:
        The cases in the order in which they run.

    Raises:
        ValueError: An unknown suite, provider, mask or dtype, with the nearest name; or nothing is left to
            run.
    """
    options = request.options
    suites = [load(name) for name in request.suites or _implied(options)]
    for dtype in options.dtypes:
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
    known = {*providers.names(), *(name for suite in suites for name in suite.providers)}
    for name in options.providers:
        if name not in known:
            raise unknown("provider", name, known)
    asked = set(options.providers)
    cases = [case for suite in suites for case in suite.cases(options) if not asked or asked & {*case.providers}]
    if not cases:
        raise ValueError("nothing to run: no case has the suites, providers and dtypes that were asked for")
    return cases


def _implied(options: Options) -> tuple[str, ...]:
    """The suites that a choice of something inside them leaves, where none is named."""
    of = {
        "masks": options.masks,
        "lengths": options.lengths,
        "dtypes": options.dtypes,
        "providers": options.providers,
        "input": options.input,
    }
    asked = [what for what, chosen in of.items() if chosen]
    return tuple(name for name in MODULES if all(name in _UNDERSTOOD[what] for what in asked))


def _open(out: Path, header: dict[str, Any], earlier: Results | None, options: Options) -> tuple[Store, Limits]:
    """Opens the file before anything slow is done, so that a bad place is found at once."""
    if earlier is not None and "limits" in earlier.header:
        machine = Limits(**earlier.header["limits"])
        return Store(out, {**header, "limits": machine.to_dict()}, earlier=earlier), machine
    probe(out)
    machine = limits.measure(size=1024 if options.level == "quick" else 2048)
    return Store(out, {**header, "limits": machine.to_dict()}, earlier=earlier), machine


def _close(outcome: Outcome, env: dict[str, Any], machine: Limits, path: Path, request: Request) -> None:
    """The last lines: verdicts, the machine they hold for, and where the rows are."""
    bars = [row for row in outcome.rows if row.verdict is not None]
    print()
    if bars:
        met = sum(row.verdict == "met" for row in bars)
        left = " (--quick leaves out what takes minutes)" if request.options.level == "quick" else ""
        print(f"targets: {met} of {len(bars)} met on {env['cpu_vendor']} {env['cpu_model']}{left}")
        print(f"machine limits: {machine.line()}")
        for row in outcome.missed:
            found = f"{display.number(row.measured)}, target {row.target}" if row.measured is not None else row.note
            print(f"  {row.verdict}: {row.bar}: {found}")
        if outcome.missed and not request.verdict:
            print("  (--no-verdict: not counted)")
    for row in outcome.failed:
        print(f"failed: {row.suite}/{row.case}: {row.provider}: {row.reason}")
    red = [row for row in outcome.rows if row.gate == "red"]
    for row in red:
        why = f"error {row.error:.2e} above {row.error_limit:.2e}" if row.error is not None else "disagrees"
        print(f"red: {row.suite}/{row.case}: {row.provider}: {why}; its speed-up is not reported")
    if outcome.interrupted:
        print("interrupted: the rows measured so far are kept; continue with --resume --out")
    print(f"{len(outcome.rows)} rows: {path}")


def _say_plan(asked: Sequence[Case]) -> int:
    cases = unfold(asked)
    total = sum(case.seconds for case in cases)
    for case in cases:
        print(f"{case.suite}/{case.name}: {', '.join(case.providers)}, about {case.seconds:.0f} s")
    print(f"{len(cases)} cases, about {total / 60:.0f} minutes; nothing was run")
    return 0


def _typical() -> list[tuple[str, Problem]]:
    """Problems that show who can do what."""
    windowed = as_mask("causal & window(512)")
    return [
        ("dense 8192", Problem(as_mask("full"), 8192)),
        ("causal 8192", Problem(as_mask("causal"), 8192)),
        ("window 8192", Problem(windowed, 8192)),
        ("window 8192, gradients", Problem(windowed, 8192, phase="forward+backward")),
        ("window 131072", Problem(windowed, 131_072)),
        ("window 512, float64", Problem(windowed, 512, dtype="float64")),
    ]


def _who(options: Options) -> list[str]:
    return [name for name in options.chosen(providers.STANDARD) if name in providers.names()] or list(
        providers.STANDARD
    )


def _plain(request: Request) -> dict[str, Any]:
    """The options as JSON; what an interrupted run must share with the one that continues it."""
    options = request.options
    return {
        "suites": list(request.suites),
        "level": options.level,
        "providers": list(options.providers),
        "masks": list(options.masks),
        "dtypes": list(options.dtypes),
        "lengths": list(options.lengths),
        "input": None if options.input is None else options.input.name,
        "seed": options.seed,
        "budget_s": options.budget_s,
    }
