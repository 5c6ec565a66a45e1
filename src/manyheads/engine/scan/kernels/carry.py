"""The sequential pass: states at the borders of chunks, forward, and their gradients, backward."""

import triton
import triton.language as tl

from .parts import UNSPECIALISED, finite, load_matrix, load_tile, operand


@triton.jit(do_not_specialize=UNSPECIALISED)
def carry(
    x, y, start, states, norms, end, prefix, reach, peak, maxima, m_start, m_end, factor, extra,
    sxb, sxh, sxn, syb, syh, syn, tokens, tiles, per, heads, group, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, TILE: tl.constexpr, DECAY: tl.constexpr,
    GATE: tl.constexpr, NORM: tl.constexpr, FACTOR: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``S <- keep * S + sum_j w_j x_j y_j^T`` over tiles, for one block of the state of one head.

    Forward, ``x`` and ``y`` are keys and values and what is stored is the state before each chunk; ``REVERSE``, they
    are queries and output gradients, and what is stored is the gradient of the state behind each chunk. ``NORM``
    carries the vector of the normaliser too, whose ``y`` is 1, or ``extra`` backward.
    """
    row = tl.program_id(1)
    b, h = row // heads, row % heads
    far, wide = b.to(tl.int64), row.to(tl.int64)
    blocks = tl.cdiv(DV, BV)
    d0, v0 = tl.program_id(0) // blocks * BD, tl.program_id(0) % blocks * BV
    owned = tl.where(v0 == 0, D, 0)  # the sum of keys belongs to the first block of values
    d, c, r = d0 + tl.arange(0, BD), v0 + tl.arange(0, BV), tl.arange(0, TILE)
    side = (h // group).to(tl.int64)
    x += far * sxb + side * sxh
    y += far * syb + side * syh
    whole = start + wide * (D * (DV + NORM))
    s = load_matrix(whole, d0, v0, D, DV, BD, BV, DV + NORM)
    keys = tl.zeros([BD], tl.float32)
    if NORM:
        keys += tl.load(whole + d * (DV + NORM) + DV, mask=d < D, other=0.0)
    m = 0.0
    if GATE:
        if REVERSE:
            m = tl.load(maxima + wide * (tiles + 1) + tiles)
        else:
            m = tl.load(m_start + wide)
    vector = wide * (tiles * TILE)
    rows = tl.num_programs(1)
    leads = tl.program_id(0) == 0
    for step in range(0, tiles):
        tile = step
        border = tile % per == 0
        if REVERSE:
            tile = tiles - 1 - step
            border = ((tile + 1) % per == 0) | (step == 0)
        if border:
            place = tl.cast(tile // per, tl.int64) * rows + row
            inside = (d < D)[:, None] & (c < DV)[None, :]
            block = states + place * (D * DV) + d.to(tl.int64)[:, None] * DV + c[None, :]
            tl.store(block, s.to(states.dtype.element_ty), mask=inside)
            if NORM:
                tl.store(norms + place * D + d, keys, mask=d < owned)
        at = vector + tile * TILE
        live = tile * TILE + r < tokens
        w = tl.where(live, 1.0, 0.0)
        keep = 1.0
        if DECAY:
            total = tl.load(prefix + at + TILE - 1)
            if GATE:
                if REVERSE:
                    first = tl.load(maxima + wide * (tiles + 1) + tile)
                    since = tl.load(prefix + at + r % TILE) + first
                    most = tl.maximum(since, tl.load(peak + at + r % TILE))
                    w = tl.where(live, tl.exp(since - finite(most)), 0.0)
                    keep = tl.exp(total + first - finite(m))
                    m = first
                else:
                    if leads:
                        tl.store(maxima + wide * (tiles + 1) + tile, m)
                    new = tl.maximum(total + m, tl.load(peak + at + TILE - 1))
                    w = tl.where(live, tl.exp(tl.load(reach + at + r % TILE) - finite(new)), 0.0)
                    keep = tl.exp(total + m - finite(new))
                    m = new
            else:
                keep = tl.exp(total)
                if REVERSE:
                    w = tl.where(live, tl.exp(tl.load(prefix + at + r % TILE)), 0.0)
                else:
                    w = tl.where(live, tl.exp(tl.load(reach + at + r % TILE)), 0.0)
        token = wide * tokens + tile * TILE + r
        if FACTOR:
            w *= tl.load(factor + token, mask=live, other=0.0)
        if REVERSE:
            w *= scale
        xt = load_tile(x, tile * TILE, sxn, tokens, d0, D, BD, TILE)
        yt = load_tile(y, tile * TILE, syn, tokens, v0, DV, BV, TILE)
        weighed = xt.to(tl.float32) * w[:, None]
        s = tl.dot(tl.trans(operand(weighed, x)), operand(yt, x), s * keep, input_precision=PRECISION)
        if NORM:
            if REVERSE:
                weighed *= tl.load(extra + token, mask=live, other=0.0)[:, None]
            keys = keys * keep + tl.sum(weighed, 0)
    whole = end + wide * (D * (DV + NORM))
    inside = (d < D)[:, None] & (c < DV)[None, :]
    tl.store(whole + d[:, None] * (DV + NORM) + c[None, :], s, mask=inside)
    if NORM:
        tl.store(whole + d * (DV + NORM) + DV, keys, mask=d < owned)
    if GATE:
        if leads and not REVERSE:
            tl.store(maxima + wide * (tiles + 1) + tiles, m)
            tl.store(m_end + wide, m)
