"""What ``manyheads bench`` will run: from what was asked to cases, every name checked."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import replace

from manyheads.bench import providers
from manyheads.bench.suite import ASIDE, MODULES, Case, Options, Suite, load, unfold
from manyheads.bench.workload import DTYPES, PHASES, Problem
from manyheads.common.errors import unknown
from manyheads.mask import as_mask

UNDERSTOOD = {
    "masks": ("masks", "layouts"),
    "lengths": ("masks", "layouts"),
    "dtypes": ("masks", "packing"),
    "providers": ("masks", "layouts", "overhead", "packing"),
    "input": ("masks",),
    "heads": ("masks",),
    "width": ("masks",),
    "batch": ("masks",),
    "phases": ("masks",),
    "cold": ("masks",),
}
"""Which suites a choice applies to; the others are left out unless they are named."""


def plan(suites: Sequence[str], options: Options, names: Sequence[str] = ()) -> list[Case]:
    """The cases that were asked for, every name checked.

    Args:
        suites: Names; empty for all that the other choices apply to, but for those that run only when named.
        options: What the suites see.
        names: Only these cases: names, ``suite/name``, or patterns with ``*``. One that the level leaves out is
            looked for in the full one.

    Returns:
        The cases in the order in which they run.

    Raises:
        ValueError: An unknown suite, provider, mask, dtype, phase or case, with the nearest name; or nothing is
            left to run.
    """
    found = [load(name) for name in suites or _implied(options)]
    for kind, given, words in (("dtype", options.dtypes, DTYPES), ("phase", options.phases, PHASES)):
        for name in given:
            if name not in words:
                raise unknown(kind, name, words)
    known = {*providers.names(), *(name for suite in found for name in suite.providers)}
    for name in options.providers:
        if name not in known:
            raise unknown("provider", name, known)
    asked = set(options.providers)
    cases = [case for suite in found for case in suite.cases(options) if not asked or asked & {*case.providers}]
    if names:
        cases = _named(cases, names, found, options)
    if not cases:
        raise ValueError("nothing to run: no case has the suites, providers and dtypes that were asked for")
    return cases


def say(asked: Sequence[Case], finished: Iterable[tuple[str, str]] = ()) -> int:
    """Prints what would run and how long it would take.

    Args:
        asked: The cases.
        finished: Cases that the file to be continued has already.

    Returns:
        The exit status.
    """
    done = set(finished)
    cases = [case for case in unfold(asked) if case.key not in done]
    for case in cases:
        print(f"{case.suite}/{case.name}: {', '.join(case.providers)}, about {case.seconds:.0f} s")
    print()
    for suite in dict.fromkeys(case.suite for case in cases):
        some = [case for case in cases if case.suite == suite]
        print(f"{suite}: {len(some)} cases, {_duration(some)}")
    held = f", {len(done)} are measured already" if done else ""
    print(f"{len(cases)} cases{held}, {_duration(cases)}; nothing was run")
    return 0


def typical(device: str) -> list[tuple[str, Problem]]:
    """Problems that show who can do what.

    Args:
        device: Where they would run.

    Returns:
        Name and problem.
    """
    windowed = as_mask("causal & window(512)")
    dtype = "float32" if device == "cpu" else "bfloat16"
    half = 4096

    def problem(mask: str, length: int = 8192, **more: object) -> Problem:
        return replace(Problem(as_mask(mask), length, dtype=dtype, device=device), **more)  # type: ignore[arg-type]

    return [
        ("dense", problem("full")),
        ("causal", problem("causal")),
        ("window", replace(problem("full"), mask=windowed)),
        ("documents", problem(f"causal & document([{half}, {half}])")),
        ("grouped", problem("causal", kv_heads=2)),
        ("gradients", problem("causal", phase="forward+backward")),
        ("131072", replace(problem("full", 131_072), mask=windowed)),
        ("float64", replace(problem("full", 512), mask=windowed, dtype="float64")),
    ]


def who(options: Options) -> list[str]:
    """Providers to show in the table of capabilities: those that were named, else all."""
    named = [name for name in options.providers if name in providers.names()]
    return named or list(providers.names())


def _implied(options: Options) -> tuple[str, ...]:
    """The suites that a choice of something inside them leaves, where none is named."""
    chosen = {
        "masks": options.masks,
        "lengths": options.lengths,
        "dtypes": options.dtypes,
        "providers": options.providers,
        "input": options.input,
        "heads": options.heads,
        "width": options.width,
        "batch": options.batch > 1,
        "phases": options.phases,
        "cold": options.cache == "cold",
    }
    asked = [what for what, value in chosen.items() if value]
    some = [name for name in MODULES if name not in ASIDE]
    return tuple(name for name in some if all(name in UNDERSTOOD[what] for what in asked))


def _named(cases: list[Case], names: Sequence[str], suites: Sequence[Suite], options: Options) -> list[Case]:
    """The cases that names or patterns choose, those of the full level where the own has none."""
    every: list[Case] = []
    found: dict[tuple[str, str], Case] = {}
    for name in names:
        some = _matching(cases, name)
        if not some:
            every = every or [case for suite in suites for case in suite.cases(replace(options, level="full"))]
            some = _matching(every, name)
        if not some:
            near = difflib.get_close_matches(name, [case.name for case in (*cases, *every)], n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown case {name!r}: {hint}`manyheads bench --dry-run` lists the cases of a level")
        found.update((case.key, case) for case in some)
    return list(found.values())


def _matching(cases: Iterable[Case], name: str) -> list[Case]:
    """Cases of exactly this name, else those that it matches as a pattern."""
    cases = list(cases)
    exact = [case for case in cases if name in (case.name, f"{case.suite}/{case.name}")]
    return exact or [
        case
        for case in cases
        if fnmatch.fnmatchcase(case.name, name) or fnmatch.fnmatchcase(f"{case.suite}/{case.name}", name)
    ]


def _duration(cases: Sequence[Case]) -> str:
    seconds = sum(case.seconds for case in cases)
    return f"about {seconds / 60:.0f} minutes" if seconds < 7200 else f"about {seconds / 3600:.0f} hours"
