"""Whether a trained selector finds needles: part of the suite ``quality``.

The protocol was fixed here before the runs that count: small decoders whose mixers are NSA or MSA learn to answer
questions about needles, and the selector of the trained model is asked how often it keeps the block with the answer, at
a budget of a tenth of the blocks. It is compared with itself before training and with as many blocks at random, seed by
seed. One seed of softmax and of both layers was tried before, to find a length and a learning rate at which anything is
learned in a few hundred steps; at twice the length none was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from manyheads.bench.environment import version
from manyheads.bench.row import Row
from manyheads.bench.suite import Case, Context, Options
from manyheads.bench.tasks import needle
from manyheads.bench.tasks.base import Task
from manyheads.bench.tasks.train import Protocol, learn, one_thread
from manyheads.model import Decoder
from manyheads.nn.msa import warm_up

SEEDS = 3
STEPS = {"quick": 300, "default": 300, "full": 1000}
RATE, BATCH = 5e-3, 16
MIXERS = {
    # 40 blocks of 4 tokens, of which 4 are kept, the own one among them
    "nsa": "nsa(kernel=4, stride=2, block=4, keep=4, first=0, local=1, window=16)",
    "msa": "msa(block=4, keep=4)",
}
WARM = 0.5
"""Share of the steps in which MSA attends densely, so that its index has something to learn from."""
TWICE = 2.0
"""How many times as many needles as before training, and as at random, every seed must find."""
SIDES = {"untrained": "its untrained self", "random": "random blocks"}
JUDGED = 64
"""Examples that recall is taken over; as many others choose the layer."""
VALIDATION, TEST = 20_000_003, 20_000_033
SECONDS = 0.25
"""Of a step, about, on one core."""


def cases(options: Options) -> list[Case]:
    """One case for each layer and seed, then one for the claims of each layer."""
    found: list[Case] = []
    for name in MIXERS:
        if name not in options.chosen(tuple(MIXERS)):
            continue
        models = [_model(name, options.seed + number, options) for number in range(SEEDS)]
        judge = functools.partial(_judge, name=name, models=models)
        found += [*models, Case("quality", f"claims-needle-{name}", judge, 0.0, (name,), tuple(models))]
    return found


def _model(name: str, seed: int, options: Options) -> Case:
    case = f"needle-{name}-seed-{seed}"
    steps = STEPS[options.level]

    def run(context: Context) -> list[Row]:
        task = needle.task()
        base = Row("quality", case, name, phase="train", task="needle", seed=seed, device="cpu", dtype="float32")
        base = base.replace(threads=1, version=version("manyheads"), score_unit="needle recall", better="higher")
        if context.options.device != "cpu":
            return [base.replace(status="refused", reason="models are trained on a CPU only")]
        base = base.replace(input=task.description, length=task.length, steps=steps, learning_rate=RATE)
        context.say(f"quality/{case}: {steps} steps")
        return trained(base, name, task, Protocol(steps, batch=BATCH, rates=(RATE,)), seed, context)

    return Case("quality", case, run, SECONDS * steps, (name,))


def trained(base: Row, name: str, task: Task, protocol: Protocol, seed: int, context: Context) -> list[Row]:
    """Trains one decoder and asks its selector for needles before and after.

    Args:
        base: The row with all that the models have in common.
        name: One of ``MIXERS``.
        task: The needles.
        protocol: Sizes and steps.
        seed: Of weights, examples and random blocks.
        context: Of the run.

    Returns:
        The row of the trained selector, then those of the untrained one and of random blocks.
    """
    layers = (task.draw(JUDGED, torch.Generator().manual_seed(s), True).inputs for s in (VALIDATION, TEST))
    validation, test = layers
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = Decoder(protocol.decoder(task, MIXERS[name]))
        before = max(needle.recall(model, test))
        warm_up(model)
        ends = round(WARM * protocol.steps)
        losses = learn(
            model, task, protocol, seed, RATE, lambda text: context.say(f"quality/{base.case}: {text}"),
            before=lambda step: warm_up(model, False) if step == ends else None,
        )  # fmt: skip
        warm_up(model, False)
        if not math.isfinite(losses[-1]):
            return [base.replace(status="failed", reason=f"the loss was not finite at rate {RATE:g}")]
        at = max(enumerate(needle.recall(model, validation)), key=lambda pair: pair[1])[0]
        after = needle.recall(model, test)[at]
        ids, block = needle.chosen(model, test)[at]
        drawn = needle.found(needle.at_random(ids, block, torch.Generator().manual_seed(seed)), block, test)
    part = max(1, len(losses) // 20)
    curve = tuple(round(sum(losses[i : i + part]) / part, 5) for i in range(0, len(losses) - part + 1, part))
    row = base.replace(parameters=model.parameter_count(), chance=round(drawn, 6))
    note = f"layer {at} of {protocol.depth}; accuracy of the answers is another question"
    return [
        row.replace(score=round(after, 6), curve=curve, note=note),
        row.replace(provider=f"{name}-untrained", score=round(before, 6), steps=0, note="its best layer"),
        row.replace(provider=f"{name}-random", score=round(drawn, 6), steps=0, note="as many blocks of every query"),
    ]


def _judge(context: Context, *, name: str, models: Sequence[Case]) -> list[Row]:
    rows = [row for case in models for row in context.rows(case)]
    scores = {side: [r.score for r in rows if r.provider == f"{name}-{side}"] for side in SIDES}
    mine = [r.score for r in rows if r.provider == name]
    return [verdict(name, side, mine, scores[side]) for side in SIDES]


def verdict(name: str, side: str, mine: Sequence[float | None], other: Sequence[float | None]) -> Row:
    """Whether a trained selector finds twice as many needles as something else, with every seed.

    Args:
        name: Of the layer.
        side: One of ``SIDES``.
        mine: Recall of the trained selector, one a seed.
        other: Recall of the other side, likewise.

    Example:
        >>> verdict("msa", "random", [0.4, 0.3], [0.1, 0.1]).verdict
        'met'
    """
    row = Row("quality", f"claims-needle-{name}", name, phase="claim", task="needle", baseline=f"{name}-{side}")
    words = f"quality, needle: the trained selector of {name.upper()} finds twice as many needles as {SIDES[side]}"
    row = row.replace(bar=words, target=f">= {TWICE:g}x")
    pairs = [(a, b) for a, b in zip(mine, other, strict=False) if a is not None and b is not None]
    if len(pairs) != len(models_wanted := list(mine)) or not models_wanted:
        return row.replace(verdict="not measured", note="a model was not trained")
    times = [a / max(b, 1e-6) for a, b in pairs]
    told = "; ".join(f"{a:.3f} against {b:.3f}" for a, b in pairs)
    met = "met" if min(times) >= TWICE else "missed"
    return row.replace(measured=round(min(times), 4), verdict=met, note=f"{told}; the smallest over {len(pairs)} seeds")
