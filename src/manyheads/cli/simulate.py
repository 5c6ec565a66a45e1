"""``manyheads simulate tiles``: what a mask costs in tiles, and how evenly its rows load a machine."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manyheads.bench.planning import machines, simulate
from manyheads.bench.planning.simulate import Tiling
from manyheads.cli.look import numbers
from manyheads.cli.tables import draw, size

USUAL = ("64x64", "128x64", "128x128", "256x64", "256x128")


@dataclass(frozen=True)
class Request:
    """What was asked; see ``manyheads.bench.planning.simulate.tiles``.

    Attributes:
        mask: Name or text.
        length: Queries.
        keys: Keys; as many by default.
        tile: Sizes as ``"128x128"``; the usual ones where none is given.
        batch: Batch entries.
        heads: Query heads.
        units: Cores or multiprocessors; those of the machine where none are given.
        machine: Name of a machine, for its units.
        lengths: What document lengths are drawn from.
        seed: Seed of what is drawn.
        as_json: Whether to print everything as JSON.
    """

    mask: str
    length: int
    keys: int | None
    tile: tuple[str, ...]
    batch: int
    heads: int
    units: int | None
    machine: str | None
    lengths: str | None
    seed: int
    as_json: bool


def run(request: Request) -> int:
    """Prints the counts.

    Args:
        request: What was asked.

    Returns:
        The exit status.

    Raises:
        ValueError: As ``tiles`` would, or an unknown machine.
    """
    units, whose = _units(request)
    found = simulate.tiles(
        request.mask,
        request.length,
        request.keys,
        tile=[_tile(text) for text in request.tile or USUAL],
        batch=request.batch,
        heads=request.heads,
        units=units,
        lengths=request.lengths,
        seed=request.seed,
    )
    if request.as_json:
        print(json.dumps([_plain(tiling) for tiling in found], indent=1, allow_nan=False))
        return 0
    first = found[0]
    keys = request.length if request.keys is None else request.keys
    calls = f"{request.batch} x {request.heads} batch entries and heads"
    print(f"{request.mask}: {request.length} x {keys} tokens, {calls}")
    print(f"visible pairs: {first.pairs} ({first.area:.2%}), ideal speed-up over dense {first.ideal_speedup:.2f}")
    draw(_HEADS, [_cells(tiling) for tiling in found])
    print(f"balance: work of an average unit over that of the busiest of {units} {whose}, which take rows of tiles")
    print("as they become idle, in order or the longest first; longest row: its tiles over those of an average row")
    return 0


_HEADS = (
    "tile", "visited", "density", "partial", "speed-up", "bitmaps", "layout", "rows", "longest row", "in order",
    "longest first",
)  # fmt: skip


def _cells(tiling: Tiling) -> Sequence[str]:
    return (
        f"{tiling.tile[0]}x{tiling.tile[1]}",
        str(tiling.visited),
        f"{tiling.density:.2%}",
        str(tiling.partial),
        f"{tiling.tile_speedup:.2f}",
        str(tiling.bitmaps),
        size(tiling.layout_bytes),
        str(tiling.rows),
        f"{tiling.imbalance:.2f}",
        "" if tiling.balance is None else f"{tiling.balance:.1%}",
        "" if tiling.balance_longest_first is None else f"{tiling.balance_longest_first:.1%}",
    )


def _units(request: Request) -> tuple[int, str]:
    """How many share the rows, and what they are."""
    if request.units is not None:
        return request.units, "units"
    if request.machine is None or request.machine in machines.HERE:
        return os.cpu_count() or 1, "cores of this machine"
    found = machines.find(request.machine)
    return found.units, f"multiprocessors of {found.name}"


def _tile(text: str) -> tuple[int, int]:
    rows, columns = numbers(text, 2, "tile", "128x128")
    return rows, columns


def _plain(tiling: Tiling) -> dict[str, Any]:
    """JSON has no infinity: a speed-up over nothing is null."""
    values = dataclasses.asdict(tiling)
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
