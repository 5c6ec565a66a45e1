"""``manyheads simulate cluster``: schemes and deals on many devices, before anything is run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from manyheads.bench.planning import architecture, machines
from manyheads.bench.planning.cluster import EFFICIENCY, INSIDE, Links, Outcome, cluster
from manyheads.bench.planning.simulate import named
from manyheads.cli.tables import draw, duration, size
from manyheads.parallel.plan import SCHEMES, Sizes

SHARDS = ("contiguous", "zigzag", "balanced", "nearby")
MODEL = "64:8x128x32"
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Request:
    """What was asked; see ``manyheads.bench.planning.cluster.cluster``.

    Attributes:
        mask: Name or text.
        ranks: Numbers of devices.
        per_rank: Tokens on each.
        machine: Name of a machine.
        model: ``heads:key heads x width x layers`` as ``"64:8x128x32"``, or a ``config.json``.
        links: ``inside:between x devices of a node`` as ``"450:50x8"``; by the machine where nothing is given.
        schemes: Names; all where none is given.
        shards: Names; the usual ones where none is given.
        dtype: Of the inputs.
        lengths: What document lengths are drawn from.
        seed: Seed of what is drawn.
        as_json: Whether to print everything as JSON.
    """

    mask: str
    ranks: tuple[int, ...]
    per_rank: int
    machine: str
    model: str
    links: str | None
    schemes: tuple[str, ...]
    shards: tuple[str, ...]
    dtype: str
    lengths: str | None
    seed: int
    as_json: bool


def run(request: Request) -> int:
    """Prints the outcomes, the fastest first.

    Args:
        request: What was asked.

    Returns:
        The exit status.

    Raises:
        ValueError: As ``cluster`` would, or a model or links that cannot be read.
    """
    model = _model(request.model, request.dtype)
    machine = machines.find(request.machine)
    links = _links(request.links, machine.name)
    if request.per_rank < 1:
        raise ValueError(f"per-rank: expected at least one token, got {request.per_rank}")
    found: list[Outcome] = []
    for ranks in request.ranks:
        length = ranks * request.per_rank
        some = list(
            cluster(
                named(request.mask, length, seed=request.seed, lengths=request.lengths, heads=model.sizes.heads),
                length,
                ranks,
                model.sizes,
                machine=machine,
                dtype=request.dtype,
                links=links,
                layers=model.layers,
                schemes=request.schemes or SCHEMES,
                shards=request.shards or SHARDS,
            )
        )
        found += some
        if not request.as_json:
            print(f"{request.mask}: {length} tokens on {ranks} x {machine.name}, {model.words}, {request.dtype}")
            _show(some)
    if request.as_json:
        print(json.dumps([_plain(outcome) for outcome in found], indent=1, allow_nan=False))
        return 0
    print(f"links: {links.inside:g} GB/s inside a node of {links.per_node}, {links.between:g} GB/s between nodes;")
    print(f"modelled at {EFFICIENCY:.0%} of the {request.dtype} peak of {machine.name}: {machine.source}")
    print("times are of one layer; sent: most bytes that a rank sends; memory: all layers in training, on one rank")
    return 0


def _show(found: Sequence[Outcome]) -> None:
    runs = sorted((o for o in found if o.reason is None), key=lambda o: o.ms)
    draw(_HEADS, [_cells(outcome) for outcome in runs], left=2)
    for reason in dict.fromkeys(f"{o.scheme}: {o.reason}" for o in found if o.reason is not None):
        print(f"cannot run: {reason}")
    if runs:
        print(f"planned and simulated in {sum(o.seconds for o in found):.1f} s\n")


_HEADS = ("scheme", "deal", "forward", "backward", "idle", "max/mean", "sent", "sent back", "to nodes", "memory")


def _cells(found: Outcome) -> Sequence[str]:
    scheme = f"{found.scheme} ({found.degree})" if 1 < found.degree < found.ranks else found.scheme
    return (
        scheme,
        found.shard,
        duration(found.forward_ms),
        duration(found.backward_ms),
        f"{found.idle:.0%}",
        f"{found.imbalance:.3f}",
        size(int(found.sent.max())),
        size(int(found.sent_back.max())),
        f"{found.far:.0%}",
        size(found.memory),
    )


class _Model(NamedTuple):
    sizes: Sizes
    layers: int
    words: str


def _model(text: str, dtype: str) -> _Model:
    """Heads, width and layers, written out or from a config."""
    if dtype not in _BYTES:
        raise ValueError(f"dtype: expected one of {', '.join(_BYTES)}, got {dtype!r}")
    if parts := re.fullmatch(r"(\d+):(\d+)x(\d+)x(\d+)", text):
        heads, kv_heads, width, layers = map(int, parts.groups())
        if min(heads, kv_heads, width, layers) < 1:
            raise ValueError(f"model: expected positive numbers as {MODEL}, got {text!r}")
        words = f"{layers} layers of {heads}:{kv_heads} heads of width {width}"
        return _Model(Sizes(heads, kv_heads, width, itemsize=_BYTES[dtype]), layers, words)
    if not Path(text).exists():
        raise ValueError(f"model: expected heads:key heads x width x layers as {MODEL}, or a config.json, got {text!r}")
    read = architecture.read(text)
    sizes = Sizes(read.heads, read.kv_heads, read.width, read.value_width, itemsize=_BYTES[dtype])
    return _Model(sizes, read.layers, read.line())


def _links(text: str | None, machine: str) -> Links:
    if text is None:
        return Links(inside=INSIDE.get(machine, 32.0))
    number = r"(\d+(?:\.\d+)?)"
    if not (parts := re.fullmatch(rf"{number}:{number}x(\d+)", text)):
        raise ValueError(f"links: expected GB/s inside:between x devices of a node, as 450:50x8, got {text!r}")
    return Links(inside=float(parts[1]), between=float(parts[2]), per_node=int(parts[3]))


def _plain(found: Outcome) -> dict[str, Any]:
    """Everything but the numbers of each rank, of which the largest and the sum stay."""
    if found.reason is not None:
        return {"scheme": found.scheme, "shard": found.shard, "ranks": found.ranks, "reason": found.reason}
    names = ("scheme", "shard", "ranks", "degree", "forward_ms", "backward_ms", "idle", "imbalance", "far", "memory")
    values: dict[str, Any] = {name: getattr(found, name) for name in (*names, "seconds")}
    for name in ("areas", "sent", "sent_back"):
        array = getattr(found, name)
        values |= {f"{name}_most": int(array.max()), f"{name}_all": int(array.sum())}
    return values
