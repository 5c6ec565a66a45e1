"""``manyheads bench``: from what was asked to cases, a results file and tables."""

from __future__ import annotations

import datetime
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyheads.bench import device, display, limits, providers
from manyheads.bench.environment import environment, one_line
from manyheads.bench.limits import Limits
from manyheads.bench.runner import Outcome, Run
from manyheads.bench.store import Results, Store, probe, read, resumable
from manyheads.bench.suite import Options
from manyheads.cli import compare, plan, report

_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
"""Dtypes whose product rate is measured, by kind of device."""


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
        report: Whether a report is written beside the results.
        cases: Only these cases, by name or pattern; empty for all.
        threads: Threads of the processor: a number, ``"all"``, or empty for torch's own choice.
        against: An earlier results file to compare with.
        fail_on_slower: Percent by which a row may be slower than there, beyond noise.
    """

    suites: tuple[str, ...]
    options: Options
    out: Path | None = None
    resume: bool = False
    dry_run: bool = False
    verdict: bool = True
    arguments: tuple[str, ...] = ()
    report: bool = True
    cases: tuple[str, ...] = ()
    threads: str = ""
    against: Path | None = None
    fail_on_slower: float | None = None


def run(request: Request) -> int:
    """Runs the benchmark.

    Args:
        request: What was asked.

    Returns:
        The exit status.

    Raises:
        ValueError: Something was asked that does not exist, or the output cannot be written.
    """
    if request.fail_on_slower is not None and request.against is None:
        raise ValueError("fail-on-slower: name the file to compare with as --against")
    set_threads(request.threads)
    cases = plan.plan(request.suites, request.options, request.cases)
    if request.resume and request.out is None:
        raise ValueError("resume: name the file to continue with --out")
    if request.dry_run and not request.resume:
        return plan.say(cases)
    device.resolve(request.options.device)
    before = None if request.against is None else read(request.against)
    env = environment(request.options.device)
    header: dict[str, Any] = {
        "environment": env,
        "options": _plain(request),
        "command": shlex.join(["manyheads", *request.arguments]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    out = request.out or Path("reports") / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    earlier = resumable(out, header) if request.resume else None
    if request.dry_run:
        return plan.say(cases, () if earlier is None else earlier.finished)
    store, machine = _open(out, header, earlier, request.options)
    print(f"machine: {one_line(env)}\nlimits:  {machine.line()}")
    who = plan.who(request.options)
    table = display.capability_table(
        providers.capabilities(plan.typical(request.options.device), who), providers.presence(who)
    )
    print(f"\n{table}\n", flush=True)
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
    status = outcome.status(verdict=request.verdict)
    if before is None:
        return status
    print(f"\nagainst {request.against}:")
    return max(status, compare.report(before, read(store.path), request.fail_on_slower))


def set_threads(asked: str) -> None:
    """Gives torch the threads that were asked for.

    Args:
        asked: A number, ``"all"`` for every core that this process may use, or empty for torch's own choice.

    Raises:
        ValueError: Neither, or more than there are cores.
    """
    if not asked:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked != "all" and not (asked.isdigit() and 1 <= int(asked) <= cores):
        raise ValueError(f"threads: expected 'all' or a number from 1 to {cores}, got {asked!r}")
    torch.set_num_threads(cores if asked == "all" else int(asked))


def _open(out: Path, header: dict[str, Any], earlier: Results | None, options: Options) -> tuple[Store, Limits]:
    """Opens the file before anything slow is done, so that a bad place is found at once."""
    if earlier is not None and "limits" in earlier.header:
        machine = Limits.from_dict(earlier.header["limits"])
        return Store(out, {**header, "limits": machine.to_dict()}, earlier=earlier), machine
    probe(out)
    kind = "cuda" if options.on_gpu else "cpu"
    small = 1024 if options.level == "quick" and not options.on_gpu else None
    machine = limits.measure(_DTYPES[kind], size=small, device=options.device)
    return Store(out, {**header, "limits": machine.to_dict()}, earlier=earlier), machine


def _close(outcome: Outcome, env: dict[str, Any], machine: Limits, path: Path, request: Request) -> None:
    """The last lines: verdicts, the machine they hold for, and where the rows are."""
    bars = [row for row in outcome.rows if row.verdict is not None and row.status != "refused"]
    print()
    if bars:
        met = sum(row.verdict == "met" for row in bars)
        left = " (--quick leaves out what takes minutes)" if request.options.level == "quick" else ""
        where = env.get("gpu") or f"{env['cpu_vendor']} {env['cpu_model']}"
        print(f"targets: {met} of {len(bars)} met on {where}{left}")
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
    report.conclude(path, html=request.report)


def _plain(request: Request) -> dict[str, Any]:
    """The options as JSON; what an interrupted run must share with the one that continues it."""
    options, usual = request.options, Options()
    later: dict[str, Any] = {name: getattr(options, name) for name in ("device", "cache", "width", "batch")}
    later |= {"heads": list(options.heads), "phases": list(options.phases), "cases": list(request.cases)}
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
        # options that came later stand here only where they were used, so that older files can be continued
        **{name: value for name, value in later.items() if value and value != getattr(usual, name, None)},
    }
