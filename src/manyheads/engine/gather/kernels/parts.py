"""What the kernels over lists of ids are made of.

A program owns one query of up to ``ROWS`` query heads that read the same rows, so that the heads are the rows of its
products; ``listed_keys`` owns one key. Everything that an id does not name is masked in its load, so it may hold
anything. With ``SHARED`` the values are columns of the keys, and each row is loaded once: the result is then as wide
as the keys, and only its columns from ``first`` on are kept.
"""

import triton
import triton.language as tl

from ...tiled.kernels.parts import LOG2E, tanh

UNSPECIALISED = [
    "nq", "nk", "width", "heads", "group", "units", "share", "tiles", "first", "ids_b", "ids_h",
]  # fmt: skip
"""Arguments of which no value is worth a kernel of its own."""


@triton.jit
def owner(n, nq, tiles, units):
    """Batch entry, unit, query and tile of heads of the n-th program: neighbours are queries of the same heads."""
    rest = n // nq
    return rest // tiles // units, rest // tiles % units, n % nq, rest % tiles


@triton.jit
def heads_of(u, tile, group, ROWS: tl.constexpr):
    """Query heads of a tile, the last again where there are no more, and which there are."""
    r = tile * ROWS + tl.arange(0, ROWS)
    return u * group + tl.minimum(r, group - 1), r < group


@triton.jit
def load_heads(ptr, h, live, i, sh, sn, first, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """One query of several heads, ``(ROWS, PADDED)``: its width from column ``first`` on, 0 elsewhere."""
    d = tl.arange(0, PADDED) - first
    at = ptr + h.to(tl.int64)[:, None] * sh + i.to(tl.int64) * sn + d[None, :]
    return tl.load(at, mask=live[:, None] & ((d >= 0) & (d < WIDTH))[None, :], other=0.0)


@triton.jit
def load_ids(ids, x, width, nk, BN: tl.constexpr):
    """The rows that a block of ids names, 0 for none, and which name one."""
    j = x + tl.arange(0, BN)
    id = tl.load(ids + j, mask=j < width, other=-1)
    seen = (id >= 0) & (id < nk)
    return tl.where(seen, id, 0).to(tl.int64), seen


@triton.jit
def load_listed(ptr, row, seen, sn, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Named rows, ``(BN, PADDED)``, 0 for none."""
    d = tl.arange(0, PADDED)
    at = ptr + row.to(tl.int64)[:, None] * sn + d[None, :]
    return tl.load(at, mask=seen[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def finished(s, scale, softcap, SOFTCAP: tl.constexpr, NATURAL: tl.constexpr):
    """Scores from dot products in the units of the exponent, and the slope of the cap."""
    slope = 1.0
    s = s * scale
    if SOFTCAP:
        t = tanh(s / softcap)
        s = softcap * t
        slope = 1.0 - t * t
    if not NATURAL:
        s = s * LOG2E
    return s, slope
