"""``manyheads simulate neighborhood``: what windows on a grid cost in tiles, and which stride suits the tiles."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manyheads.bench.planning import neighborhood
from manyheads.bench.planning.neighborhood import Simulation
from manyheads.cli.tables import draw
from manyheads.mask import Neighborhood

TILES = {1: ("256", "128"), 2: ("16x16", "8x16"), 3: ("4x8x8", "2x8x8")}
"""Tiles of queries and of keys by the number of axes, as published for the newest GPUs."""


@dataclass(frozen=True)
class Request:
    """What was asked; see ``manyheads.bench.planning.neighborhood.simulate``.

    Attributes:
        shape: Sizes of the grid, as ``"30x48x80"``.
        window: Keys along each axis.
        stride: Queries that share a window; several are compared.
        dilation: Distance of neighbours.
        causal: Axes on which a query sees no later key, as ``"1x0x0"``.
        q_tile: Tile of queries; the published one by default.
        kv_tile: Tile of keys.
        flat: Tokens of tiles of the flattened grid, as ``"128x64"``, to compare with.
        goal: Share of the speed-up by operations that the searched stride shall reach.
        here: Whether to predict the time on this machine too.
        as_json: Whether to print everything as JSON.
    """

    shape: str
    window: str
    stride: tuple[str, ...]
    dilation: str
    causal: str
    q_tile: str | None
    kv_tile: str | None
    flat: str | None
    goal: float | None
    here: bool
    as_json: bool


def run(request: Request) -> int:
    """Prints the counts.

    Args:
        request: What was asked.

    Returns:
        The exit status.

    Raises:
        ValueError: Sizes that are no numbers, or that make no neighbourhood.
    """
    grid = _sizes(request.shape, "shape")
    window, dilation = (_per_axis(text, len(grid), name) for text, name in _named(request, "window", "dilation"))
    causal = tuple(bool(n) for n in _per_axis(request.causal, len(grid), "causal", least=0))
    usual = TILES.get(len(grid), TILES[3])
    q_tile = _per_axis(request.q_tile or usual[0], len(grid), "q_tile")
    kv_tile = _per_axis(request.kv_tile or usual[1], len(grid), "kv_tile")
    rows: list[tuple[str, Simulation]] = []
    for text in request.stride or ("1",):
        mask = Neighborhood(grid, window, _per_axis(text, len(grid), "stride"), dilation, causal)
        if request.flat is not None:
            queries, keys = _per_axis(request.flat, 2, "flat")
            rows.append(("flattened", neighborhood.flat(mask, queries, keys)))
        for dynamic in (False, True):
            found = neighborhood.simulate(mask, q_tile, kv_tile, dynamic=dynamic)
            rows.append(("dynamic" if dynamic else "fixed", found))
    more = {"dilation": dilation, "causal": causal}
    best = neighborhood.search(grid, window, q_tile, kv_tile, **more, goal=request.goal)  # type: ignore[arg-type]
    if best is not None:
        rows.append(("searched", best))
    here = neighborhood.predict(rows[0][1].mask) if request.here else None
    if request.as_json:
        print(json.dumps({"rows": [_plain(*row) for row in rows], "here": here and here._asdict()}, indent=1))
        return 0
    first = rows[0][1]
    print(f"{_text(grid)} tokens, windows of {_text(window)}: {first.flop_speedup:.2f}x fewer operations than plain")
    heads = ("tiles of keys", "stride", "queries x keys", "visited", "most", "speed-up", "masked")
    draw(heads, [_cells(row) for row in rows])
    if best is None:
        print("no stride reaches the goal with these tiles")
    if here is not None:
        box = _text(here.box)
        print(f"here, 4 heads of width 32 in float32: {here.near_ms:.1f} ms by boxes of {box} queries, ", end="")
        print(f"{here.dense_ms:.1f} ms for plain attention, predicted speed-up {here.speedup:.1f}")
    return 0


def _named(request: Request, *names: str) -> list[tuple[str, str]]:
    return [(getattr(request, name), name) for name in names]


def _cells(row: tuple[str, Simulation]) -> Sequence[str]:
    name, found = row
    return (
        name,
        _text(found.mask.stride),
        f"{_text(found.q_tile)} x {_text(found.kv_tile)}",
        str(found.visited),
        str(found.most),
        f"{found.tile_speedup:.2f}",
        "nothing" if found.perfect else "edges",
    )


def _plain(name: str, found: Simulation) -> dict[str, Any]:
    values = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return {"tiles": name, **values, "mask": found.mask.text, "stride": found.mask.stride}


def _text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _sizes(text: str, name: str, least: int = 1) -> tuple[int, ...]:
    parts = re.split("[x×]", text.lower())
    if not 1 <= len(parts) <= 3 or not all(part.isdigit() and int(part) >= least for part in parts):
        raise ValueError(f"{name}: expected 1 to 3 numbers from {least} as 30x48x80, got {text!r}")
    return tuple(map(int, parts))


def _per_axis(text: str, axes: int, name: str, least: int = 1) -> tuple[int, ...]:
    """One number for each axis; one for all counts for each."""
    sizes = _sizes(text, name, least)
    if len(sizes) not in (1, axes):
        raise ValueError(f"{name}: expected one number or {axes} of them as {_text((8,) * axes)}, got {text!r}")
    return sizes * axes if len(sizes) == 1 else sizes
