"""Looking at a mask: as text in the terminal, as a picture, and whether it lets a query see a later key."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..common.errors import missing_extra
from .algebra import And, Not, Or, PerBatch, PerHead, both
from .base import Mask, Positions, resolve
from .neighborhood import Neighborhood
from .primitives import Causal, Window
from .store import whole

_EXACT = 64
_PROBES = 32
_FRONT = 4096
_SHADES = "·░▒▓█"


class _Sides(NamedTuple):
    """Coordinates of all queries and keys of a scalar mask."""

    mask: Mask
    q: dict[str, np.ndarray]
    k: dict[str, np.ndarray]
    nq: int
    nk: int

    def boxes(self, side: str, start: np.ndarray, width: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Bounds of runs of tokens that begin at ``start``, sorted, ``width`` apart or more."""
        record, n = (self.q, self.nq) if side == "q" else (self.k, self.nk)
        edges = np.stack([start, np.minimum(start + width, n)], 1).reshape(-1)
        cut = edges[:-1] if edges[-1] == n else edges
        return {
            name: (np.minimum.reduceat(a, cut)[::2], np.maximum.reduceat(a, cut)[::2]) for name, a in record.items()
        }


def _sides(mask: Mask, nq: int, nk: int, positions: Positions | None, batch: int, head: int) -> _Sides:
    q_pos, k_pos = resolve(mask, nq, nk, positions)
    if not 0 <= head < max(mask.shape[1], 1) or not 0 <= batch < max(mask.shape[0], len(q_pos), len(k_pos)):
        raise ValueError(f"batch, head: the mask has shape {mask.shape}, got {batch}, {head}")
    scalar = mask.at(batch, head)
    q = scalar.coords(q_pos[batch % len(q_pos)], "q", nq)
    k = scalar.coords(k_pos[batch % len(k_pos)], "k", nk)
    return _Sides(scalar, q, k, nq, nk)


def show(
    mask: Mask,
    nq: int,
    nk: int | None = None,
    *,
    size: int = 32,
    positions: Positions | None = None,
    batch: int = 0,
    head: int = 0,
    tile: tuple[int, int] | None = None,
    png: Any = None,
) -> str:
    """Draws a mask.

    One cell stands for one pair, or for a rectangle of pairs when there are more than ``size`` queries or
    keys; then ``·`` is empty, ``█`` full and ``░▒▓`` partly visible. Full and empty are exact for rules that
    say so of whole boxes; other cells are counted when small and sampled when large, so any length can be
    drawn.

    Args:
        mask: The mask.
        nq: Number of queries.
        nk: Number of keys; as many as queries by default.
        size: Largest number of cells per side.
        positions: ``(q_pos, k_pos)``; see `Mask.default_positions`.
        batch: Which batch entry to draw.
        head: Which head to draw.
        tile: Queries and keys per cell, instead of ``size``.
        png: Where to save a picture of the same cells too.

    Returns:
        The drawing with a headline, and a warning when a mask with `Causal` in it lets a query see a later
        key.

    Raises:
        ImportError: ``png`` without matplotlib.
        ValueError: The mask does not fit, or a batch entry or head that it does not have.

    Example:
        >>> from manyheads.mask import Causal, Window
        >>> print((Causal() & Window(2)).show(4))
        causal & window(2)
        4 queries x 4 keys, one cell per pair, 43.8% visible
        █ · · ·
        █ █ · ·
        · █ █ ·
        · · █ █
    """
    nk = nq if nk is None else nk
    sides = _sides(mask, nq, nk, positions, batch, head)
    if tile is None:
        step = (-(-nq // whole(size, "size", 1)), -(-nk // size))
    else:
        step = (whole(tile[0], "tile", 1), whole(tile[1], "tile", 1))
    share, exact = _shares(sides, max(step[0], 1), max(step[1], 1))
    title = repr(mask)
    rows = [title if len(title) <= 120 else title[:117] + "...", _headline(share, exact, nq, nk, step)]
    if mask.shape != (1, 1):
        rows[1] += f", batch entry {batch} and head {head} of {mask.shape}"
    for row in share:
        rows.append(" ".join([_shade(cell) for cell in row.tolist()]))
    warning = later_warning(mask, nq, nk, positions=positions)
    if warning:
        rows.append(warning)
    if png is not None:
        _save(png, share, rows[0], rows[1], step)
    return "\n".join(rows)


def _shade(share: float) -> str:
    if share <= 0 or share >= 1:
        return _SHADES[-1] if share >= 1 else _SHADES[0]
    return _SHADES[1 + min(2, int(share * 3))]


def _headline(share: np.ndarray, exact: bool, nq: int, nk: int, step: tuple[int, int]) -> str:
    cell = "one cell per pair" if max(step) <= 1 else f"cells of {step[0]} x {step[1]}"
    rows = np.minimum(step[0], nq - np.arange(share.shape[0]) * step[0])
    columns = np.minimum(step[1], nk - np.arange(share.shape[1]) * step[1])
    seen = float(rows @ share @ columns) / max(nq * nk, 1)
    return f"{nq} queries x {nk} keys, {cell}, {'' if exact else 'about '}{seen:.1%} visible"


def _shares(sides: _Sides, bm: int, bn: int) -> tuple[np.ndarray, bool]:
    """Visible share of each cell, and whether all of them are exact."""
    top, left = np.arange(0, sides.nq, bm), np.arange(0, sides.nk, bn)
    if not len(top) or not len(left):
        return np.zeros((len(top), len(left))), True
    q = {name: (lo[:, None], hi[:, None]) for name, (lo, hi) in sides.boxes("q", top, bm).items()}
    may, must = sides.mask.classify(q, sides.boxes("k", left, bn))
    share = must.astype(float)
    exact = True
    for r, c in zip(*np.nonzero(may & ~must), strict=True):
        rows, whole_rows = _probe(top[r], min(bm, sides.nq - top[r]), r)
        columns, whole_columns = _probe(left[c], min(bn, sides.nk - left[c]), c)
        exact &= whole_rows and whole_columns
        q_some = {name: a[rows][:, None] for name, a in sides.q.items()}
        seen = sides.mask.allows(q_some, {name: a[columns] for name, a in sides.k.items()})
        share[r, c] = seen.mean()
        if not (whole_rows and whole_columns):
            share[r, c] = min(max(share[r, c], 1e-6), 1 - 1e-6)
    return share, exact


def _probe(start: int, width: int, salt: int) -> tuple[np.ndarray, bool]:
    """Tokens of a cell to look at: all of a small one, otherwise one at random in each of equal parts."""
    if width <= _EXACT:
        return np.arange(start, start + width), True
    cuts = np.linspace(0, width, _PROBES + 1).astype(np.int64)
    rng = np.random.default_rng(salt)
    return start + rng.integers(cuts[:-1], cuts[1:]), False


def _save(path: Any, share: np.ndarray, title: str, headline: str, step: tuple[int, int]) -> None:
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("bench", "drawing a mask as a picture") from None
    figure = Figure(figsize=(6, 6.6), dpi=150)
    axes = figure.add_subplot()
    colours = ListedColormap(["#f4f4f2", "#cfe0ee", "#8fb8da", "#4d8ac0", "#17436b"])
    levels = np.where(share <= 0, 0, np.where(share >= 1, 4, 1 + np.minimum(2, (share * 3).astype(int))))
    axes.imshow(levels, cmap=colours, vmin=0, vmax=4, interpolation="nearest")
    if max(share.shape) <= 128:
        axes.set_xticks(np.arange(-0.5, share.shape[1]), minor=True)
        axes.set_yticks(np.arange(-0.5, share.shape[0]), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.4)
        axes.tick_params(which="minor", length=0)
    unit = "" if max(step) <= 1 else " (cells of {} {})"
    axes.set_xlabel("key" + unit.format(step[1], "keys"))
    axes.set_ylabel("query" + unit.format(step[0], "queries"))
    axes.set_title(title + "\n" + headline, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def later_warning(mask: Mask, nq: int, nk: int, *, positions: Positions | None = None) -> str | None:
    """A sentence when a mask that contains `Causal` lets a query see a later key.

    Args:
        mask: The mask.
        nq: Number of queries.
        nk: Number of keys.
        positions: ``(q_pos, k_pos)``; see `Mask.default_positions`.

    Returns:
        The warning with an example, or None.

    Example:
        >>> from manyheads.mask import Causal, Sink
        >>> later_warning(Causal() | Sink(2), 4, 4)
        'warning: contains causal, yet the query at position 0 sees the later key at position 1'
    """
    if not any(isinstance(node, Causal) for node in mask.walk()):
        return None
    found = later_key(mask, nq, nk, positions=positions)
    if found is None:
        return None
    i, j = found
    return f"warning: contains causal, yet the query at position {i} sees the later key at position {j}"


def later_key(
    mask: Mask, nq: int, nk: int | None = None, *, positions: Positions | None = None
) -> tuple[int, int] | None:
    """Finds a query that sees a key at a later position.

    Args:
        mask: The mask.
        nq: Number of queries.
        nk: Number of keys; as many as queries by default.
        positions: ``(q_pos, k_pos)``; see `Mask.default_positions`.

    Returns:
        The positions of such a query and key, or None when there is none. For rules that say nothing of boxes
        (`Predicate`) at lengths beyond some thousands, None may also mean that none was found.

    Raises:
        ValueError: The mask does not fit.

    Example:
        >>> from manyheads.mask import Causal, Prefix, later_key
        >>> later_key(Causal(), 1000), later_key(Causal() | Prefix(2), 1000)
        (None, (0, 1))
    """
    nk = nq if nk is None else nk
    if _never_later(mask) or not nq or not nk:
        return None
    batch = max(mask.shape[0], *(len(p) for p in resolve(mask, nq, nk, positions)))
    for b in range(batch):
        for h in range(mask.shape[1]):
            if _never_later(mask.at(b, h)):
                continue
            sides = _sides(both(mask, _LATER), nq, nk, positions, b, h)
            found = _search(sides)
            if found is not None:
                q_pos, k_pos = resolve(mask, nq, nk, positions)
                return int(q_pos[b % len(q_pos), found[0]]), int(k_pos[b % len(k_pos), found[1]])
    return None


_LATER = Not(Causal())


def _never_later(mask: Mask) -> bool:
    """Whether the structure alone rules a later key out."""
    if isinstance(mask, And):
        return any(_never_later(part) for part in mask.parts)
    if isinstance(mask, (Or, PerHead, PerBatch)):
        return all(_never_later(part) for part in mask.parts)
    if isinstance(mask, Window):
        return mask.right == 1
    if isinstance(mask, Neighborhood):
        return mask.causal == (True,)
    return isinstance(mask, Causal)


def _search(sides: _Sides) -> tuple[int, int] | None:
    """Indices of some allowed pair, by cutting boxes in four until they are small; a bounded search."""
    width = 1 << max(sides.nq - 1, sides.nk - 1, 1).bit_length()
    front = np.zeros((1, 2), dtype=np.int64)
    while len(front):
        q_start, q_at = np.unique(front[:, 0], return_inverse=True)
        k_start, k_at = np.unique(front[:, 1], return_inverse=True)
        q = {name: (lo[q_at], hi[q_at]) for name, (lo, hi) in sides.boxes("q", q_start, width).items()}
        k = {name: (lo[k_at], hi[k_at]) for name, (lo, hi) in sides.boxes("k", k_start, width).items()}
        may, must = sides.mask.classify(q, k)
        if must.any():
            first = front[np.argmax(must)]
            return int(first[0]), int(first[1])
        front = front[may]
        if width <= 16:
            return _exactly(sides, front, width)
        if len(front) > _FRONT:
            front = front[np.linspace(0, len(front) - 1, _FRONT).astype(np.int64)]
        width //= 2
        front = (front[:, None, :] + width * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])).reshape(-1, 2)
        front = front[(front[:, 0] < sides.nq) & (front[:, 1] < sides.nk)]
    return None


def _exactly(sides: _Sides, front: np.ndarray, width: int) -> tuple[int, int] | None:
    """The first allowed pair in any of the boxes."""
    rows = np.minimum(front[:, :1] + np.arange(width), sides.nq - 1)
    columns = np.minimum(front[:, 1:] + np.arange(width), sides.nk - 1)
    for start in range(0, len(front), 1024):
        r, c = rows[start : start + 1024], columns[start : start + 1024]
        seen = sides.mask.allows(
            {name: a[r][:, :, None] for name, a in sides.q.items()},
            {name: a[c][:, None, :] for name, a in sides.k.items()},
        )
        if seen.any():
            box, i, j = np.argwhere(seen)[0]
            return int(r[box, i]), int(c[box, j])
    return None
