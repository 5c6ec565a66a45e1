"""What a suite is: a name, a line of description, and cases that return rows.

To add a suite, write a module with a ``SUITE`` and add its name to ``MODULES``. A case is what the runner
times, resumes and interrupts: it runs its providers interleaved, in one process, on the same inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from manyheads.bench.limits import Limits
from manyheads.bench.row import CACHES, Row
from manyheads.common.errors import unknown

MODULES = ("masks", "layouts", "overhead", "packing", "linear", "sparse", "parallel", "targets", "quality")
"""Suites that come with the library, in the order in which they run; each is ``bench/suites/<name>.py``."""

ASIDE = ("quality",)
"""Suites that run only when they are named: they train models, which takes long and says nothing about speed."""

LEVELS = ("quick", "default", "full")


@dataclass(frozen=True)
class Options:
    """What was asked on the command line.

    Attributes:
        level: ``"quick"`` (a couple of minutes), ``"default"`` (at most 15) or ``"full"``.
        providers: Only these; empty for all.
        masks: Only these, by name or as text; empty for the suite's own.
        dtypes: Only these; empty for the suite's own.
        lengths: Only these numbers of tokens; empty for the suite's own.
        input: A safetensors file with captured q, k, v for the suites that can read one.
        seed: Seed of all random inputs and of the shape that is drawn.
        budget_s: Time for the rounds of one provider in one case, in seconds; ``None`` for the level's own.
        device: Where it runs: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        cache: ``"warm"``, or ``"cold"`` to empty the last-level cache before each sample.
        heads: Only these head layouts, as ``"8"`` or ``"8:2"``; empty for the suite's own.
        width: Head width; 0 for the suite's own.
        batch: Batch size of drawn input.
        phases: Only these phases; empty for the suite's own.
    """

    level: str = "default"
    providers: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    input: Path | None = None
    seed: int = 42
    budget_s: float | None = None
    device: str = "cpu"
    cache: str = "warm"
    heads: tuple[str, ...] = ()
    width: int = 0
    batch: int = 1
    phases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the words that have a few values."""
        for what, value, known in (("level", self.level, LEVELS), ("cache", self.cache, CACHES)):
            if value not in known:
                raise unknown(what, value, known)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.startswith("cuda")

    @property
    def seconds(self) -> float:
        """Time for the rounds of one provider in one case."""
        return self.budget_s if self.budget_s is not None else {"quick": 0.3, "default": 0.6, "full": 5.0}[self.level]

    def chosen(self, own: Sequence[str]) -> tuple[str, ...]:
        """The providers that were named, or a suite's own where none was."""
        return self.providers or tuple(own)

    def pick(self, own: Sequence[str]) -> tuple[str, ...]:
        """The dtypes of a suite that were asked for, in the suite's order."""
        return tuple(d for d in own if not self.dtypes or d in self.dtypes)


class Context(Protocol):
    """What a running case may use; the runner provides it."""

    options: Options

    @property
    def limits(self) -> Limits:
        """The measured limits of this machine, measured once per file."""

    def say(self, text: str) -> None:
        """Shows what is going on: one short line, replaced by the next."""

    def rows(self, case: Case) -> list[Row]:
        """Rows of a case: those that this results file has already, else the case is run and recorded."""


@dataclass(frozen=True)
class Case:
    """A group of measurements that belong together.

    Attributes:
        suite: Name of its suite.
        name: Unique in the suite, stable between runs (resuming finds finished cases by it).
        run: Called once with the context; returns all rows, refused ones included.
        seconds: Expected duration without that of ``needs``, for the dry run and the progress bar.
        providers: Who takes part, for the dry run.
        needs: Cases whose rows it will ask the context for.
    """

    suite: str
    name: str
    run: Callable[[Context], list[Row]] = field(repr=False, compare=False)
    seconds: float = 1.0
    providers: tuple[str, ...] = ()
    needs: tuple[Case, ...] = field(default=(), repr=False)

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the case in a results file."""
        return (self.suite, self.name)


def unfold(cases: Sequence[Case]) -> list[Case]:
    """Every case that will run, once, in the order in which they end.

    Args:
        cases: What was asked for.

    Returns:
        These and what they need.

    Example:
        >>> a = Case("masks", "a", lambda c: [])
        >>> b = Case("targets", "b", lambda c: [], needs=(a,))
        >>> [case.name for case in unfold([b, a])]
        ['a', 'b']
    """
    found: dict[tuple[str, str], Case] = {}
    for case in cases:
        for each in (*unfold(case.needs), case):
            found.setdefault(each.key, each)
    return list(found.values())


@dataclass(frozen=True)
class Suite:
    """A named set of cases.

    Attributes:
        name: How it is chosen on the command line.
        description: One line.
        cases: From the options to the cases, cheap: no inputs are made and nothing is measured here. Optional
            dependencies are imported inside ``Case.run``; what is missing is a refused row, not an error.
        providers: Names of all that can take part, so that a misspelt ``--provider`` is found at once.
    """

    name: str
    description: str
    cases: Callable[[Options], list[Case]] = field(repr=False)
    providers: tuple[str, ...] = ()


def load(name: str) -> Suite:
    """Imports a suite by its name.

    Args:
        name: One of ``MODULES``.

    Returns:
        The suite.

    Raises:
        ValueError: No suite has this name; the nearest is suggested.

    Example:
        >>> load("maks")
        Traceback (most recent call last):
        ValueError: unknown suite 'maks': did you mean 'masks'? known: layouts, linear, masks, overhead, packing,
            parallel, quality, sparse, targets
    """
    if name not in MODULES:
        raise unknown("suite", name, MODULES)
    suite = importlib.import_module(f"manyheads.bench.suites.{name}").SUITE
    assert isinstance(suite, Suite)
    return suite
