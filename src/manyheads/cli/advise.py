"""``manyheads advise``: which attention to use for a model, a length and a machine."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from manyheads.bench.planning import advise
from manyheads.bench.planning.advise import Advice, Group, Option
from manyheads.cli.tables import draw, duration, size


@dataclass(frozen=True)
class Request:
    """What was asked; see ``manyheads.bench.planning.advise.advise``."""

    config: Path
    length: int | None
    machine: str
    phase: str
    mask: str | None
    dtype: str | None
    batch: int
    results: Path | None
    lengths: str | None
    seed: int
    as_json: bool


def run(request: Request) -> int:
    """Prints the advice.

    Args:
        request: What was asked.

    Returns:
        The exit status: 1 when no option can run some kind of layer.

    Raises:
        ValueError: As ``advise`` would.
    """
    found = advise.advise(
        request.config,
        request.length,
        machine=request.machine,
        phase=request.phase,
        mask=request.mask,
        dtype=request.dtype,
        batch=request.batch,
        results=request.results,
        lengths=request.lengths,
        seed=request.seed,
    )
    if request.as_json:
        print(json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False))
    else:
        show(found)
    return int(any(group.best is None for group in found.groups))


def show(found: Advice) -> None:
    """Prints advice for people.

    Args:
        found: The advice.
    """
    each = {"prefill": "prefill of", "train": "training on", "decode": "one decoding step after"}[found.phase]
    print(f"model:   {found.model}")
    print(f"asked:   {each} {found.length} tokens, batch {found.batch}, {found.dtype}")
    print(f"machine: {found.machine} ({'' if found.measured_rates else 'not here: '}{found.source})")
    print(f"rates:   {found.rates}")
    footnotes: dict[str, int] = {}
    for group in found.groups:
        _show_group(group, footnotes)
    if found.totals:
        print("\nattention of the whole model")
        heads = ["", "time", "range", "memory", "fits"]
        fits = {True: "yes", False: "no", None: "unknown"}
        draw(
            heads,
            [[t.name, duration(t.ms), _range(t.low_ms, t.high_ms), size(t.memory), fits[t.fits]] for t in found.totals],
        )
    for text, number in footnotes.items():
        print(f"  ({number}) {text}")
    for note in found.notes:
        print(f"note: {note}")


def _show_group(group: Group, footnotes: dict[str, int]) -> None:
    layers = f"{group.layers} layer{'' if group.layers == 1 else 's'}"
    print(f"\n{layers}, {group.kind}: {_brief(group.mask)}, {group.area:.2%} of the pairs visible, each {group.shape}")
    able = [option for option in group.options if option.ms is not None]
    heads = ["option", "known from", "one layer", "range", layers, "memory", "bound by"]
    if able:
        draw(heads, [_cells(option, group, footnotes) for option in able], left=2)
    for option in group.options:
        if option.ms is None:
            print(f"cannot run: {option.name}: {'; '.join(option.reasons)}")
    if group.command:
        print(f"measure it: {group.command}")


def _cells(option: Option, group: Group, footnotes: dict[str, int]) -> list[str]:
    marks = [footnotes.setdefault(text, len(footnotes) + 1) for text in (option.basis, *option.notes)]
    return [
        option.name,
        f"{option.status} ({', '.join(map(str, marks))})",
        duration(option.ms),
        _range(option.low_ms, option.high_ms),
        duration(None if option.ms is None else group.layers * option.ms),
        size(option.memory),
        option.bound or "",
    ]


def _range(low: float | None, high: float | None) -> str:
    return f"{duration(low)} to {duration(high)}" if low is not None and high is not None else ""


def _brief(mask: str) -> str:
    return mask if len(mask) <= 60 else f"{mask[:57]}..."
