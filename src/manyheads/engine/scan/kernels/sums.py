"""Sums of log decays inside tiles."""

import triton
import triton.language as tl

from .parts import UNSPECIALISED


@triton.jit
def _after(g1, m1, g2, m2):
    """Log decay and maximum of two stretches of tokens, one behind the other."""
    return g1 + g2, tl.maximum(m1 + g2, m2)


@triton.jit(do_not_specialize=UNSPECIALISED)
def sums(
    g, gate, prefix, reach, peak, sgb, sgh, sgn, sib, sih, sin, tokens, tiles, heads,
    TILE: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Prefix sums from the start of each tile, what a token keeps until its end, and the maximum inside the tile.

    ``prefix_i = sum_{t<=i} g_t``; ``reach_j = sum_{t>j} g_t + gate_j``; ``peak_i = max_{j<=i} (sum_{j<t<=i} g_t +
    gate_j)``, over tokens of one tile. Behind the last token nothing decays and nothing is written.
    """
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    r = tl.arange(0, TILE)
    j = tile.to(tl.int64) * TILE + r
    log = g + b * sgb + h * sgh
    now = tl.load(log + j * sgn, mask=j < tokens, other=0.0)
    later = tl.load(log + (j + 1) * sgn, mask=(r + 1 < TILE) & (j + 1 < tokens), other=0.0)
    until = tl.cumsum(later, 0, reverse=True)
    at = row.to(tl.int64) * (tiles * TILE) + j
    inside = r < TILE
    if GATE:
        written = tl.load(gate + b * sib + h * sih + j * sin, mask=j < tokens, other=float("-inf"))
        since, most = tl.associative_scan((now, written), 0, _after)
        until += written
        tl.store(peak + at, most, mask=inside)
    else:
        since = tl.cumsum(now, 0)
    tl.store(prefix + at, since, mask=inside)
    tl.store(reach + at, until, mask=inside)
