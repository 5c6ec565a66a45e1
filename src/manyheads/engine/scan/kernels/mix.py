"""The parallel pass: outputs and the gradients of queries, keys and values, all by one kernel.

A program owns one tile of rows and one block of columns of the result. It goes over the other tiles of its chunk, takes
``x y^T`` between rows and columns, weighs it by the decay between the two tokens, and sums ``z``; what passes the
border of the chunk comes from the state there.

| result | rows ``x`` | columns ``y`` | ``z`` | state |
|---|---|---|---|---|
| output | q | k | v | before the chunk |
| dq | dout | v | k | before the chunk, transposed |
| dk (``REVERSE``) | v | dout | q | gradient behind the chunk, transposed |
| dv (``REVERSE``) | k | q | dout | gradient behind the chunk |

``REVERSE`` rows are keys, which later queries read, once for every query head of their group. With a normaliser
values have a last column of ones and output gradients the column ``extra`` (``AUGMENT`` 1: of the rows, 2: of the
columns); its share of the state is ``norms``.
"""

import triton
import triton.language as tl

from .parts import UNSPECIALISED, finite, load_matrix, load_tile, operand

# The kernel hands its arguments down in tuples:
#   vectors  decays and gates of the head; prefix, reach, peak and maxima; strides of the first two over tokens
#   rows     tile, chunk, first tile of the chunk and the one behind it, batch entry and head in one
#   numbers  tokens, tiles, scale, rows of the batch and heads


@triton.jit
def _products(
    x, y, x_row, y_row, sxn, syn, tokens,
    W: tl.constexpr, BX: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x y^T`` of two tiles. Rows are loaded again for every tile of columns: registers are what is short."""
    s = tl.zeros([TILE, TILE], tl.float32)
    for at in range(0, W, BX):
        xb = load_tile(x, x_row, sxn, tokens, at, W, BX, TILE)
        yb = load_tile(y, y_row, syn, tokens, at, W, BX, TILE)
        s = tl.dot(xb, tl.trans(yb), s, input_precision=PRECISION)
    return s


@triton.jit
def _decays_inside(
    since, g, gate, m, TILE: tl.constexpr, LIMIT: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr
):
    """Exponents ``sum_{j<t<=i} g_t + gate_j - m_i`` inside a tile, queries first, or keys first with ``REVERSE``.

    Differences of prefix sums are taken only where the whole tile decays by less than ``LIMIT``, so that they keep
    their digits; else each is summed by itself.
    """
    r = tl.arange(0, TILE)
    total = tl.sum(g, 0)
    if REVERSE:
        before = r[None, :] > r[:, None]
        if total >= -LIMIT:
            log = tl.where(before, since[None, :] - since[:, None], 0.0)
        else:
            log = tl.cumsum(tl.where(before, tl.broadcast_to(g[None, :], [TILE, TILE]), 0.0), 1)
        if GATE:
            log += gate[:, None] - m[None, :]
    else:
        before = r[:, None] > r[None, :]
        if total >= -LIMIT:
            log = tl.where(before, since[:, None] - since[None, :], 0.0)
        else:
            log = tl.cumsum(tl.where(before, tl.broadcast_to(g[:, None], [TILE, TILE]), 0.0), 0)
        if GATE:
            log += gate[None, :] - m[:, None]
    return log


@triton.jit
def _row_maxima(vectors, tile, TILE: tl.constexpr):
    """The running maximum of the log weights at every token of a tile."""
    at = tile * TILE + tl.arange(0, TILE) % TILE
    since, peak = tl.load(vectors[2] + at), tl.load(vectors[4] + at)
    return finite(tl.maximum(since + tl.load(vectors[5] + tile), peak))


@triton.jit
def _border(
    acc, weight, numbers, rows, vectors, own_extra, x, sxn, states, norms, z0, base, mid,
    W: tl.constexpr, WZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, TILE: tl.constexpr, DECAY: tl.constexpr,
    GATE: tl.constexpr, AUGMENT: tl.constexpr, WEIGHT: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what comes from the state at the border of the chunk, with the decay between it and each row."""
    tile, chunk, first, last, row = rows
    tokens, tiles, scale, places = numbers
    place = chunk.to(tl.int64) * places + row
    part = tl.zeros([TILE, BZ], tl.float32)
    passed = tl.zeros([TILE], tl.float32)
    for at in range(0, W, BX):
        xb = load_tile(x, tile * TILE, sxn, tokens, at, W, BX, TILE)
        if TRANSPOSED:
            block = tl.trans(load_matrix(states + place * (W * WZ), z0, at, WZ, W, BZ, BX, W))
        else:
            block = load_matrix(states + place * (W * WZ), at, z0, W, WZ, BX, BZ, WZ)
        part = tl.dot(operand(xb, x), operand(block, x), part, input_precision=PRECISION)
        if WEIGHT:
            d = at + tl.arange(0, BX)
            n = tl.load(norms + place * W + d, mask=d < W, other=0.0)
            passed += tl.sum(xb.to(tl.float32) * n[None, :], 1)
    if AUGMENT > 0:
        d = z0 + tl.arange(0, BZ)
        n = tl.load(norms + place * WZ + d, mask=d < WZ, other=0.0)
        if AUGMENT == 1:
            part += own_extra[:, None] * n[None, :]
        else:
            part += n[None, :]
    if DECAY:
        log = base + mid
        if GATE:
            maxima = vectors[5]
            if REVERSE:
                log -= finite(tl.load(maxima + last))
            else:
                log += tl.load(maxima + first)
        decayed = tl.exp(log)
        part *= decayed[:, None]
        passed *= decayed
    if not REVERSE:
        part *= scale
    return acc + part, weight + passed


@triton.jit
def _inside(
    s, since, m, live, rows, numbers, vectors,
    TILE: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr, LIMIT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The products of a tile with itself, weighed; nothing where a query would see a later key."""
    r = tl.arange(0, TILE)
    seen = r[:, None] >= r[None, :]
    if REVERSE:
        seen = (r[:, None] <= r[None, :]) & live[None, :]
    if DECAY:
        token = rows[0].to(tl.int64) * TILE + r
        now = tl.load(vectors[0] + token * vectors[6], mask=live, other=0.0)
        gate = now
        if GATE:
            gate = tl.load(vectors[1] + token * vectors[7], mask=live, other=float("-inf"))
        log = _decays_inside(since, now, gate, m, TILE, LIMIT, GATE, REVERSE)
        s *= tl.exp(tl.where(seen, log, float("-inf")))
    return tl.where(seen, s, 0.0)


@triton.jit
def _share_of_head(
    x, y, z, own, states, norms, factor, extra, vectors, results, steps, numbers, rows, z0,
    W: tl.constexpr, WZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, TILE: tl.constexpr, DECAY: tl.constexpr,
    GATE: tl.constexpr, FACTOR: tl.constexpr, AUGMENT: tl.constexpr, WEIGHT: tl.constexpr, SUMS: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one query head contributes to a tile of the result; the sums of weights, and the maxima, of its rows."""
    sxn, syn, szn, son = steps
    tile, chunk, first, last, row = rows
    tokens, tiles, scale, places = numbers
    r = tl.arange(0, TILE)
    start = tile * TILE
    live = start + r < tokens
    token = row.to(tl.int64) * tokens
    since = tl.zeros([TILE], tl.float32)
    base, m, own_extra, own_factor = since, since, since, since
    if DECAY:
        since = tl.load(vectors[2] + start + r % TILE)
        if GATE:
            m = _row_maxima(vectors, tile, TILE)
        if REVERSE:
            base = tl.load(vectors[3] + start + r % TILE)
        else:
            base = since - m
    if AUGMENT == 1:
        own_extra = tl.load(extra + token + start + r, mask=live, other=0.0)
    if FACTOR and not REVERSE:
        own_factor = tl.load(factor + token + start + r, mask=live, other=0.0)
    acc = tl.zeros([TILE, BZ], tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    mid = 0.0
    count = tile - first
    if REVERSE:
        count = last - 1 - tile
    for step in range(0, count):
        t = tile - 1 - step
        if REVERSE:
            t = tile + 1 + step
        s = _products(x, y, start, t * TILE, sxn, syn, tokens, W, BX, TILE, PRECISION)
        cols = t * TILE + r
        if AUGMENT == 1:
            s += own_extra[:, None]
        elif AUGMENT == 2:
            s += tl.load(extra + token + cols, mask=cols < tokens, other=0.0)[None, :]
        if DECAY:
            if REVERSE:
                log = tl.load(vectors[2] + t * TILE + r % TILE) + mid
                if GATE:
                    log -= _row_maxima(vectors, t, TILE)
            else:
                log = tl.load(vectors[3] + t * TILE + r % TILE) + mid
            s *= tl.exp(base[:, None] + log[None, :])
            mid += tl.load(vectors[2] + t * TILE + TILE - 1)
        if REVERSE:
            seen = tl.where(cols < tokens, 1.0, 0.0)
            if FACTOR:
                seen *= tl.load(factor + token + cols, mask=cols < tokens, other=0.0)
            s *= seen[None, :]
        if WEIGHT:
            weight += tl.sum(s, 1)
        zb = load_tile(z, t * TILE, szn, tokens, z0, WZ, BZ, TILE)
        acc = tl.dot(operand(s, x), operand(zb, x), acc, input_precision=PRECISION)
    acc, weight = _border(
        acc * scale, weight, numbers, rows, vectors, own_extra, x, sxn, states, norms, z0, base, mid,
        W, WZ, BX, BZ, TILE, DECAY, GATE, AUGMENT, WEIGHT, REVERSE, TRANSPOSED, PRECISION,
    )  # fmt: skip
    if FACTOR and not REVERSE:
        acc *= own_factor[:, None]
    if SUMS:
        flow, drop, column = results
        lead = (z0 // BZ * places + row).to(tl.int64) * (tiles * TILE) + start + r
        mine = load_tile(own, start, son, tokens, z0, WZ, BZ, TILE)
        tl.store(flow + lead, tl.where(live, tl.sum(mine.to(tl.float32) * acc, 1), 0.0), mask=r < TILE)
    s = _products(x, y, start, start, sxn, syn, tokens, W, BX, TILE, PRECISION)
    if AUGMENT == 1:
        s += own_extra[:, None]
    elif AUGMENT == 2:
        s += tl.load(extra + token + start + r, mask=live, other=0.0)[None, :]
    s = _inside(s, since, m, live, rows, numbers, vectors, TILE, DECAY, GATE, LIMIT, REVERSE)
    if FACTOR:
        if REVERSE:
            s *= tl.load(factor + token + start + r, mask=live, other=0.0)[None, :]
        else:
            s *= own_factor[:, None]
    if WEIGHT:
        weight += tl.sum(s, 1)
    s *= scale
    zt = load_tile(z, start, szn, tokens, z0, WZ, BZ, TILE)
    if SUMS and not REVERSE:
        mine = load_tile(own, start, son, tokens, z0, WZ, BZ, TILE)
        pairs = tl.where(live[:, None], tl.dot(mine, tl.trans(zt), input_precision=PRECISION) * s, 0.0)
        tl.store(column + lead, tl.sum(pairs, 0), mask=r < TILE)
        tl.store(drop + lead, _passing(pairs, TILE, LIMIT), mask=r < TILE)
    acc += tl.dot(operand(s, x), operand(zt, x), input_precision=PRECISION)
    return acc, weight * scale, m


@triton.jit
def _passing(pairs, TILE: tl.constexpr, LIMIT: tl.constexpr):
    """``sum_{i>=t>j} pairs_ij`` for each token ``t`` of a tile: what its decay stands between."""
    r = tl.arange(0, TILE)
    below = r[:, None] > r[None, :]
    pairs = tl.where(below, pairs, 0.0)
    if LIMIT == 0:
        later = tl.cumsum(pairs, 0, reverse=True)
        passing = tl.sum(tl.where(below, later, 0.0), 1)
    else:
        # read from here on, less what is sent from here on: both small beside what half precision rounds
        passing = tl.cumsum(tl.sum(pairs, 1) - tl.sum(tl.trans(pairs), 1), 0, reverse=True)
    return passing


@triton.jit
def _divided(acc, weight, m, NORMALISE: tl.constexpr, GATE: tl.constexpr):
    """Results, the factor that made them of sums, and the derivative of the divisor by the sum of weights."""
    slope = weight * 0.0
    if NORMALISE == "":
        inverse = tl.exp(m)
    else:
        slope += 1.0
        if NORMALISE != "sum":
            slope = tl.where(weight < 0.0, -1.0, 1.0)
            weight = tl.abs(weight)
        if NORMALISE == "max1":
            floor = tl.exp(-m)  # 1 without a gate
            slope *= tl.where(weight > floor, 1.0, tl.where(weight == floor, 0.5, 0.0))
            weight = tl.maximum(weight, floor)
        inverse = tl.where(weight == 0.0, 0.0, 1.0 / tl.where(weight == 0.0, 1.0, weight))
    return acc * inverse[:, None], inverse, slope


@triton.jit(do_not_specialize=UNSPECIALISED)
def mix(
    x, y, z, own, states, norms, g, gate, prefix, reach, peak, maxima, factor, extra, slope, out, flow, drop, column,
    sxb, sxh, sxn, syb, syh, syn, szb, szh, szn, sob, soh, son, sgb, sgh, sgn, sib, sih, sin,
    tokens, tiles, per, heads, group, scale,
    W: tl.constexpr, WZ: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, TILE: tl.constexpr, DECAY: tl.constexpr,
    GATE: tl.constexpr, FACTOR: tl.constexpr, AUGMENT: tl.constexpr, NORMALISE: tl.constexpr, SUMS: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows and one block of columns of an output or of a gradient."""
    blocks: tl.constexpr = (WZ + BZ - 1) // BZ
    WEIGHT: tl.constexpr = NORMALISE != ""
    place = tl.program_id(0) // blocks
    z0 = tl.program_id(0) % blocks * BZ
    tile = place % tiles
    owner = place // tiles
    chunk = tile // per
    first = chunk * per
    last = tl.minimum(first + per, tiles)
    b, h = owner // heads, owner % heads
    far, near, wide = b.to(tl.int64), h.to(tl.int64), owner.to(tl.int64)
    side, other = near, near // group
    if REVERSE:
        side, other = near // group, near
    vector = wide * (tiles * TILE)
    vectors = (
        g + far * sgb + near * sgh, gate + far * sib + near * sih, prefix + vector, reach + vector, peak + vector,
        maxima + wide * (tiles + 1), sgn, sin,
    )  # fmt: skip
    total, weight, m = _share_of_head(
        x + far * sxb + side * sxh, y + far * syb + other * syh, z + far * szb + other * szh,
        own + far * sob + side * soh, states, norms, factor, extra, vectors, (flow, drop, column),
        (sxn, syn, szn, son), (tokens, tiles, scale, tl.num_programs(0) // blocks // tiles),
        (tile, chunk, first, last, owner), z0,
        W, WZ, BX, BZ, TILE, DECAY, GATE, FACTOR, AUGMENT, WEIGHT, SUMS, REVERSE, TRANSPOSED, LIMIT, PRECISION,
    )  # fmt: skip
    r, d = tile * TILE + tl.arange(0, TILE), z0 + tl.arange(0, BZ)
    wide *= tokens
    if not (REVERSE or TRANSPOSED) and (WEIGHT or GATE):
        total, inverse, bend = _divided(total, weight, m, NORMALISE, GATE)
        owned = tl.where(z0 == 0, tokens, 0)
        tl.store(factor + wide + r, inverse, mask=r < owned)
        tl.store(slope + wide + r, bend, mask=r < owned)
    at = (wide + r)[:, None] * WZ + d[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(r < tokens)[:, None] & (d < WZ)[None, :])
