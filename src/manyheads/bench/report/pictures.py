"""Pictures of masks with their tiles, drawn anew from the text and the seed of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyheads.bench.measure import DENSITY_TILE
from manyheads.bench.naming import mask_name
from manyheads.bench.redraw import Drawn, drawn
from manyheads.bench.row import Row
from manyheads.mask import TileLayout

MOST = 24
"""Pictures in one report."""
FINEST = 256
"""Cells along a side of a picture, at most."""
PREFERRED = 8192
"""Tokens up to which the longest is drawn: tiles are then large enough to be seen."""
ROWS = 512
"""Tile rows above which a picture is drawn with larger tiles."""


@dataclass(frozen=True)
class Picture:
    """One mask, ready to be drawn.

    Attributes:
        name: What people call the mask.
        row: Place of the row that it belongs to.
        size: Queries and keys.
        tile: Queries and keys of a tile of the picture.
        heads: How many heads see different pairs; the first is drawn.
        visited: SVG path of the tiles that hold a visible pair.
        seen: SVG path of the visible pairs, to the nearest cell of the picture.
    """

    name: str
    row: int
    size: tuple[int, int]
    tile: tuple[int, int]
    heads: int
    visited: str
    seen: str


def pictures(rows: Sequence[Row]) -> tuple[list[Picture], list[str]]:
    """Draws each mask of the rows once.

    Args:
        rows: All rows of the file.

    Returns:
        The pictures, and one line for each mask that could not be drawn.
    """
    chosen: dict[str, int] = {}
    for place, row in enumerate(rows):
        name = mask_name(row)
        if name is None or row.bar is not None or row.length is None:
            continue
        if name not in chosen or _preference(row) > _preference(rows[chosen[name]]):
            chosen[name] = place
    pictured: list[Picture] = []
    missing: list[str] = []
    for name, place in chosen.items():
        found = drawn(rows[place]) if len(pictured) < MOST else None
        if found is not None:
            pictured.append(_picture(name, place, found))
        elif len(pictured) == MOST:
            missing.append(f"{name}: only the first {MOST} masks are drawn")
        else:
            missing.append(f"{name}: its data is not in the file and could not be drawn again from the seed")
    return pictured, missing


def _preference(row: Row) -> tuple[bool, bool, int]:
    """The longest that is short enough, else the shortest; with an exact count of pairs to compare with."""
    length = row.length or 0
    return row.pairs is not None, length <= PREFERRED, length if length <= PREFERRED else -length


def _picture(name: str, place: int, found: Drawn) -> Picture:
    mask, nq, nk, batch, heads = found
    grow = max(1, -(-nq // (DENSITY_TILE[0] * ROWS)))
    tile = (DENSITY_TILE[0] * grow, DENSITY_TILE[1] * grow)
    cell = (max(1, -(-nq // FINEST)), max(1, -(-nk // FINEST)))
    fine = mask.tiles(nq, nk, tile=cell, batch=batch, heads=heads)
    visited = mask.tiles(nq, nk, tile=tile, batch=batch, heads=heads)
    everything = [True] * (len(visited.bits) + 1)
    return Picture(
        name, place, (nq, nk), tile, visited.sets, outline(visited, everything), outline(fine, _mostly_seen(fine))
    )


def _mostly_seen(fine: TileLayout) -> list[bool]:
    """By mask id, whether a cell is drawn as visible: half of it is, or, for thin bands, half of the most that is."""
    fill = [float(fine.tile_mask(i + 1).float().mean()) for i in range(len(fine.bits))]
    whole = bool((fine.mask_id == 0).any())
    level = 0.5 if whole else 0.5 * max(fill, default=0.0)
    return [True, *(part >= level for part in fill)]


def outline(layout: TileLayout, wanted: Sequence[bool]) -> str:
    """The tiles of a layout's first head as an SVG path, in tokens; equal neighbours are one rectangle.

    Args:
        layout: The tiles.
        wanted: By mask id, whether its tiles are part of the path.

    Returns:
        The ``d`` of a path whose x are keys and whose y are queries.

    Example:
        >>> from manyheads.mask import Causal
        >>> outline(Causal().tiles(4, tile=(2, 2)), [True, True])
        'M0 0h2v2h-2zM0 2h4v2h-4z'
    """
    (height, width), path = layout.tile, []
    before: list[tuple[int, int]] = []
    top = 0
    rows = [*(_joined(spans, wanted) for spans in layout.spans(int(layout.index[0, 0]))), []]
    for number, row in enumerate(rows):
        if row == before and number < len(rows) - 1:
            continue
        bottom = min(number * height, layout.nq)
        for first, last in before:
            left, right = first * width, min(last * width, layout.nk)
            path.append(f"M{left} {top}h{right - left}v{bottom - top}h{left - right}z")
        before, top = row, bottom
    return "".join(path)


def _joined(spans: Sequence[tuple[int, int, int]], wanted: Sequence[bool]) -> list[tuple[int, int]]:
    """First and one past the last tile of each stretch of a row."""
    out: list[tuple[int, int]] = []
    for first, count, mask_id in spans:
        if not wanted[mask_id]:
            continue
        if out and out[-1][1] == first:
            out[-1] = (out[-1][0], first + count)
        else:
            out.append((first, first + count))
    return out
