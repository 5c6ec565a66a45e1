"""Suite ``quality``: small models of each mechanism, trained on tasks that tell mechanisms apart.

Everything that could be tuned stands here and was fixed before the runs: sizes, steps, learning rates, seeds, and the
claims of the papers that are put to the test. Models of one task differ in nothing but the mixer. A claim that does not
hold is a row like any other.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from manyheads.bench.environment import version
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options, Suite
from manyheads.bench.suites import quality_needle
from manyheads.bench.tasks import TASKS, Task
from manyheads.bench.tasks.crew import Job, do_all
from manyheads.bench.tasks.train import Protocol, Trained
from manyheads.common.rope import RoPE
from manyheads.model import NoPE

SEEDS = 3
"""Models of each mechanism and task; the first has the seed of the options, the others the next ones."""
MARGIN = 0.01
"""By how much, in the unit of the task, every seed must be ahead for a claim to hold."""

MECHANISMS: dict[str, str] = {
    "softmax": "softmax",
    "linear": "linear",
    "gated-delta": "gated-delta",
    "lla": "lla",
    "parallax": "parallax",
    "least-squares": "least-squares",
    "rat": "rat(chunk=16)",
    "rnn": "rat(chunk=128)",
}
"""Mixers by the name in the rows; ``rnn`` is RAT with one chunk, as long as the longest example."""

PLAN: dict[str, dict[str, tuple[str, ...]]] = {
    "quick": {
        "recall": ("softmax", "linear", "gated-delta"),
        "regression": ("softmax", "linear", "lla"),
        "bytes": ("softmax", "rat", "rnn"),
    },
    "default": {
        "recall": ("softmax", "linear", "gated-delta", "lla", "least-squares"),
        "regression": ("softmax", "linear", "gated-delta", "lla", "parallax", "least-squares"),
        "bytes": ("softmax", "linear", "gated-delta", "rat", "rnn"),
        "passkey": ("softmax", "linear", "gated-delta", "rat"),
        "states": ("softmax", "linear", "gated-delta"),
        "listops": ("softmax", "linear", "gated-delta", "rat"),
    },
}
PLAN["full"] = {task: tuple(MECHANISMS) for task in TASKS}

STEPS: dict[str, dict[str, int]] = {
    "quick": {"recall": 600, "regression": 300, "bytes": 200},
    "default": dict.fromkeys(TASKS, 2000),
    "full": dict.fromkeys(TASKS, 6000),
}

RATES = {"quick": (5e-3,), "default": (2e-3, 5e-3), "full": (1e-3, 2e-3, 5e-3)}
"""Learning rates that the first seed tries, for every mechanism and task alike."""

SECONDS = 0.05
"""Of a step, about, on one core; for the dry run and the progress bar."""


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper that can fail here.

    Attributes:
        task: Where.
        better: The mechanism that should be ahead.
        worse: The one that should be behind.
        words: The claim.
    """

    task: str
    better: str
    worse: str
    words: str


CLAIMS = (
    Claim("regression", "lla", "softmax", "local linear attention follows changes better than softmax"),
    Claim("regression", "lla", "linear", "local linear attention follows changes better than linear attention"),
    Claim("regression", "lla", "gated-delta", "local linear attention follows changes better than the delta rule"),
    Claim("regression", "softmax", "linear", "linear attention follows changes worse than softmax"),
    Claim("recall", "gated-delta", "linear", "the delta rule recalls more than plain linear attention"),
    Claim("recall", "softmax", "linear", "softmax recalls more than plain linear attention"),
    Claim("recall", "lla", "softmax", "local linear attention recalls more than softmax"),
    Claim("recall", "least-squares", "linear", "least squares recalls more than plain linear attention"),
    Claim("bytes", "softmax", "rat", "RAT, between recurrence and attention, is behind attention"),
    Claim("bytes", "rat", "rnn", "RAT, between recurrence and attention, is ahead of recurrence"),
    Claim("states", "gated-delta", "linear", "the delta rule follows states better than plain linear attention"),
)
"""What the papers say, one sentence a row."""


def cases(options: Options) -> list[Case]:
    """One case for each task, mechanism and seed, then one for the claims of each task."""
    found: list[Case] = []
    for task, names in PLAN[options.level].items():
        chosen = [name for name in names if name in options.chosen(names)]
        models = {name: models_of(task, name, options) for name in chosen}
        # the seeds of a mechanism together: they are trained side by side, and each is written down when they are
        found += [case for some in models.values() for case in some]
        if claims := [claim for claim in CLAIMS if claim.task == task and {claim.better, claim.worse} <= {*chosen}]:
            needs = tuple(case for some in models.values() for case in some)
            judge = functools.partial(_judge, claims=claims, models=models)
            found.append(Case("quality", f"claims-{task}", judge, 0.0, tuple(chosen), needs))
    return found + quality_needle.cases(options)


def protocol_of(task: str, level: str) -> Protocol:
    """How models of a task are trained at a level.

    Example:
        >>> protocol_of("recall", "quick").steps
        600
    """
    # the tokens of the regression are a set of pairs: whatever order says, the causal mask says
    position = NoPE() if task == "regression" else RoPE()
    return Protocol(STEPS[level][task], rates=RATES[level], position=position)


def models_of(task: str, mechanism: str, options: Options) -> list[Case]:
    """The cases that train one mechanism on one task, the first one with all learning rates.

    Args:
        task: A name in ``TASKS``.
        mechanism: A name in ``MECHANISMS``.
        options: Level and seed.

    Returns:
        One case a seed. Each has one row that counts, its first.
    """
    protocol = protocol_of(task, options.level)
    models = Models(task, mechanism, protocol, tuple(options.seed + number for number in range(SEEDS)))
    found: list[Case] = []
    for seed in models.seeds:
        first = tuple(found[:1])
        run = functools.partial(models.run, seed=seed, first=first)
        seconds = SECONDS * protocol.steps * (1 if found else len(protocol.rates))
        found.append(Case("quality", models.case(seed), run, seconds, (mechanism,), first))
    return found


@dataclass(frozen=True)
class Models:
    """The models of one mechanism on one task, one a seed.

    Attributes:
        task: A name in ``TASKS``.
        mechanism: A name in ``MECHANISMS``.
        protocol: How they are trained.
        seeds: One a model; the first one chooses the learning rate.
        ahead: Models that were trained beside another, until their own case asks for them.
    """

    task: str
    mechanism: str
    protocol: Protocol
    seeds: tuple[int, ...]
    ahead: dict[int, Trained] = field(default_factory=dict, repr=False, compare=False)

    def case(self, seed: int) -> str:
        """The name of the case of a seed."""
        return f"{self.task}-{self.mechanism}-seed-{seed}"

    def run(self, context: Context, *, seed: int, first: Sequence[Case]) -> list[Row]:
        """Trains the model of a seed, with all learning rates if it is the first.

        Args:
            context: Of the run.
            seed: One of the seeds.
            first: The case of the first seed, unless this is it.

        Returns:
            The row that counts, then those of other learning rates.
        """
        base = Row("quality", self.case(seed), self.mechanism, phase="train", task=self.task, seed=seed)
        base = base.replace(device="cpu", dtype="float32", threads=1, version=version("manyheads"))
        if context.options.device != "cpu":
            return [base.replace(status="refused", reason="models are trained on a CPU only")]
        try:
            made = TASKS[self.task]()
        except OSError as error:
            return [base.replace(status="refused", reason=str(error))]
        base = _described(base, made, self.protocol)
        if len(self.protocol.rates) > 1 and not first:
            return self._first(context, base)
        rate = context.rows(first[0])[0].learning_rate if first else self.protocol.rates[0]
        if rate is None:
            return [base.replace(status="refused", reason="the first seed found no learning rate")]
        if seed not in self.ahead:
            # once the rate is known the seeds wait for nothing: they are trained side by side
            some = [s for s in self.seeds[self.seeds.index(seed) :] if s not in self.ahead]
            trained = do_all([self._job(s, rate) for s in some], self._teller(context, seed))
            self.ahead.update(zip(some, trained, strict=True))
        return [_row(base, rate, self.ahead.pop(seed))]

    def _first(self, context: Context, base: Row) -> list[Row]:
        seed, rates = self.seeds[0], self.protocol.rates
        trained = do_all([self._job(seed, rate) for rate in rates], self._teller(context, seed))
        found = sorted(zip(rates, trained, strict=True), key=lambda pair: pair[1].validation)
        rows = [_row(base, rate, each) for rate, each in found]
        # the score of a rate that was not chosen is not shown, lest the better of two test scores be read off
        return [rows[0], *(row.replace(phase="other rate", score=None) for row in rows[1:])]

    def _job(self, seed: int, rate: float) -> Job:
        return Job(self.task, MECHANISMS[self.mechanism], self.protocol, seed, rate)

    def _teller(self, context: Context, seed: int) -> Callable[[str], None]:
        return lambda text: context.say(f"quality/{self.case(seed)}: {text}")


def _described(base: Row, made: Task, protocol: Protocol) -> Row:
    """The row with all that the models of a task have in common."""
    return base.replace(
        shape=f"{protocol.batch}x{made.length}, width {protocol.width}, {protocol.depth} layers",
        length=made.length,
        input=f"{made.description}; {made.source}",
        score_unit=made.unit,
        better="higher" if made.higher else "lower",
        chance=made.chance,
        steps=protocol.steps,
    )


def _row(base: Row, rate: float, trained: Trained) -> Row:
    row = base.replace(learning_rate=rate, parameters=trained.parameters, curve=trained.curve or None)
    if math.isnan(trained.score):
        return row.replace(status="failed", reason=f"the loss was not finite at rate {rate:g}")
    return row.replace(score=round(trained.score, 6), note=f"validation loss {trained.validation:.4f}")


def _judge(context: Context, *, claims: Sequence[Claim], models: dict[str, list[Case]]) -> list[Row]:
    scores = {name: [context.rows(case)[0] for case in some] for name, some in models.items()}
    return [verdict(claim, scores[claim.better], scores[claim.worse]) for claim in claims]


def verdict(claim: Claim, better: Sequence[Row], worse: Sequence[Row]) -> Row:
    """Puts a claim to the test: is one mechanism ahead with every seed?

    Args:
        claim: What is claimed.
        better: Rows of the mechanism that should be ahead, one a seed.
        worse: Rows of the other, with the same seeds, that is, the same examples.

    Returns:
        A row whose ``measured`` is the smallest lead over the seeds, in the unit of the task.

    Example:
        >>> rows = [Row("quality", "a", "a", score=s, score_unit="accuracy", better="higher") for s in (0.9, 0.4)]
        >>> verdict(Claim("recall", "a", "b", "a recalls more than b"), rows[:1], rows[1:]).verdict
        'met'
    """
    row = Row(
        "quality",
        f"claims-{claim.task}",
        claim.better,
        phase="claim",
        task=claim.task,
        baseline=claim.worse,
        bar=f"quality, {claim.task}: {claim.words}",
    )
    pairs = [(a.score, b.score) for a, b in zip(better, worse, strict=True)]
    unit = next((a.score_unit for a in (*better, *worse) if a.score_unit), "")
    row = row.replace(target=f">= {MARGIN:g} {unit}".strip())
    if any(a is None or b is None for a, b in pairs):
        return row.replace(verdict="not measured", note="a model was not trained")
    sign = 1.0 if better[0].better == "higher" else -1.0
    leads = [sign * (a - b) for a, b in pairs if a is not None and b is not None]
    lead = round(min(leads), 6)
    said = [f"{who}: {spread([s.score for s in rows if s.score is not None])}" for who, rows in
            ((claim.better, better), (claim.worse, worse))]  # fmt: skip
    note = f"{'; '.join(said)}; smallest lead over {len(leads)} seeds"
    if unit == "accuracy" and min(score or 0.0 for pair in pairs for score in pair) > 1 - MARGIN:
        note += "; both solve it: too easy here to tell them apart"
    return row.replace(measured=lead, verdict="met" if lead >= MARGIN else "missed", note=note)


def spread(scores: Sequence[float]) -> str:
    """Mean and range of scores in words.

    Example:
        >>> spread([0.5, 0.7])
        '0.600 (0.500 to 0.700)'
    """
    return f"{statistics.fmean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})"


SUITE = Suite(
    "quality",
    "Small models of each mechanism, trained: recall, regression, states, text. Runs when it is named.",
    cases,
    (*MECHANISMS, *quality_needle.MIXERS),
)
