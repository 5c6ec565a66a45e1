"""What the kernels of this engine are made of.

A program owns one row of tiles: queries in ``forward`` and ``rows_backward``, keys in ``keys_backward`` (over the
transposed layout). An outer loop goes over the runs of that row, a pipelined inner loop over the tiles of a run;
bitmaps are read, and the end of the keys is cut, only in tiles that need it. Query rows are ``PACK`` heads of one key
head times ``BM`` queries, so that a query tile of 1 still fills a matrix instruction.

Scores are ``s = cap(scale * q k^T) + bias``; with ``FAST`` (softmax, positive scale, nothing else) the scale joins
the exponent. Loads beyond the end repeat the last row instead of being masked.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNSPECIALISED = [
    "nq", "nk", "total", "width", "row0", "strip", "seed", "dropped", "heads", "group", "reach",
    "index_b", "index_h", "q_pos_b", "k_pos_b",
]  # fmt: skip
"""Arguments of which no value is worth a kernel of its own: lengths above all."""


# --- elementwise --------------------------------------------------------------------------------------------------


@triton.jit
def exp2_polynomial(x):
    """2 ** x on the fused multiply-add unit: exponent by integer addition, fraction by a cubic."""
    x = tl.maximum(x, -127.0)
    n = tl.floor(x)
    f = x - n
    y = f * 0.077119089663028717041015625 + 0.227564394474029541015625
    y = y * f + 0.695146143436431884765625
    y = y * f + 1.0
    return (y.to(tl.int32, bitcast=True) + (n.to(tl.int32) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x, EXP: tl.constexpr, NATURAL: tl.constexpr):
    """``2 ** x``, or ``e ** x`` where ``NATURAL``.

    ``EXP`` 0: the special-function unit; 1: the polynomial; 4: the polynomial for one element in four.
    """
    if NATURAL:
        x = x * LOG2E
    if EXP == 0:
        y = tl.exp2(x)
    elif EXP == 1:
        y = exp2_polynomial(x)
    else:
        y = tl.inline_asm_elementwise(
            """
            {
            .reg .f32 x, t, n, f, y;
            .reg .b32 i, p;
            ex2.approx.ftz.f32 $0, $4;
            ex2.approx.ftz.f32 $1, $5;
            ex2.approx.ftz.f32 $2, $6;
            max.ftz.f32 x, $7, 0fC2FE0000;
            add.rm.ftz.f32 t, x, 0f4B400000;
            sub.ftz.f32 n, t, 0f4B400000;
            sub.ftz.f32 f, x, n;
            fma.rn.ftz.f32 y, f, 0f3D9DF09D, 0f3E6906A4;
            fma.rn.ftz.f32 y, y, f, 0f3F31F519;
            fma.rn.ftz.f32 y, y, f, 0f3F800000;
            mov.b32 i, t;
            shl.b32 i, i, 23;
            mov.b32 p, y;
            add.s32 $3, i, p;
            }
            """,
            "=r,=r,=r,=r,r,r,r,r",
            args=[x],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return y


@triton.jit
def tanh(x):
    """Accurate near 0, where the quotient of exponentials cancels."""
    y = tl.abs(x)
    t = tl.exp2(y * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    z = x * x
    near = y * (1.0 + z * (-1.0 / 3 + z * (2.0 / 15 + z * (-17.0 / 315 + z * (62.0 / 2835)))))
    y = tl.where(y < 0.25, near, far)
    return tl.where(x < 0, -y, y)


@triton.jit
def _mix(x):
    """The 32-bit scrambler of ``dropout.py``, on unsigned integers."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def survives(seed, b, h, q_pos, k_pos, dropped):
    """Which weights survive dropout: a function of seed, batch, head and logical positions only."""
    plane = _mix(_mix((b + seed).to(tl.uint32)) + h.to(tl.uint32))
    row = _mix(plane + q_pos.to(tl.uint32))
    bits = _mix(row + _mix(k_pos.to(tl.uint32)))
    return (bits & 0x7FFFFFFF).to(tl.int32) >= dropped


@triton.jit
def weight_of(s, WEIGHT: tl.constexpr):
    """The weight of a score that is not a softmax."""
    if WEIGHT == "sigmoid":
        w = 1.0 / (1.0 + tl.exp2(s * -LOG2E))
    elif WEIGHT == "relu":
        w = tl.maximum(s, 0.0)
    elif WEIGHT == "boxcar":
        w = tl.where(tl.abs(s) <= 1.0, 1.0, 0.0)
    elif WEIGHT == "triangular":
        w = tl.maximum(1.0 - tl.abs(s), 0.0)
    elif WEIGHT == "epanechnikov":
        w = tl.maximum(1.0 - s * s, 0.0)
    elif WEIGHT == "gaussian":
        w = tl.exp2(s * s * (-0.5 * LOG2E))
    else:
        tl.static_assert(WEIGHT == "constant")
        w = tl.full(s.shape, 1.0, tl.float32)
    return w


@triton.jit
def slope_of(s, w, WEIGHT: tl.constexpr):
    """Derivative of ``_value`` from the score and the weight."""
    if WEIGHT == "sigmoid":
        d = w * (1.0 - w)
    elif WEIGHT == "relu":
        d = tl.where(s > 0, 1.0, 0.0)
    elif WEIGHT == "triangular":
        d = tl.where(w > 0, tl.where(s > 0, -1.0, tl.where(s < 0, 1.0, 0.0)), 0.0)
    elif WEIGHT == "epanechnikov":
        d = tl.where(w > 0, -2.0 * s, 0.0)
    elif WEIGHT == "gaussian":
        d = -s * w
    else:
        d = tl.zeros(s.shape, tl.float32)
    return d


# --- pieces of a tile ---------------------------------------------------------------------------------------------
# The kernels hand their arguments down in tuples:
#   side     batch; heads, queries, bitmap rows, presence and positions of the query rows
#   keys     k, v, their strides over tokens, positions, number of keys, bitmaps
#   numbers  scale, factor of the exponent, softcap; dropout's threshold, seed and factor; skip threshold
#   terms    slopes; table, its stride and reach; pair values and strides; block values and strides


@triton.jit
def load_rows(ptr, start, stride, n, WIDTH: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr):
    """Rows ``start`` to ``start + TILE``, ``(TILE, PADDED)``: 0 beyond the width, the last row again past ``n``."""
    row = tl.minimum(tl.arange(0, TILE), n - 1 - start)
    d = tl.arange(0, PADDED)
    at = ptr + start * tl.cast(stride, tl.int64) + row[:, None] * stride + d[None, :]
    if WIDTH == PADDED:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
def load_packed(ptr, h, i, sh, sn, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Query rows of several heads, ``(ROWS, PADDED)``."""
    d = tl.arange(0, PADDED)
    at = ptr + h.to(tl.int64)[:, None] * sh + i.to(tl.int64)[:, None] * sn + d[None, :]
    return tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)


@triton.jit
def packed_rows(start, h0, n, BM: tl.constexpr, PACK: tl.constexpr, ROWS: tl.constexpr):
    """Head, token (the last again past ``n``), row of the bitmap and presence of each query row."""
    row = tl.arange(0, ROWS)
    i = start + row % BM
    live = (row < BM * PACK) & (i < n)
    return h0 + tl.minimum(row // BM, PACK - 1), tl.minimum(i, n - 1), row % BM, live


@triton.jit
def bitmap(bits, mask_id, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Which columns each row of a tile sees: its bitmap ``(HEIGHT, WIDTH)``, or all where the id is 0.

    Words of a row are loaded once a row, in the layout of the product's rows, and spread by shifts.
    """
    WORD: tl.constexpr = WIDTH if WIDTH < 32 else 32
    WORDS: tl.constexpr = WIDTH // WORD
    at = bits + tl.maximum(mask_id - 1, 0).to(tl.int64) * (HEIGHT * WORDS) + row * WORDS
    fill = tl.where(mask_id == 0, -1, 0)
    seen = ((tl.load(at).to(tl.int32) | fill)[:, None] >> (column % WORD)[None, :]) & 1
    for x in tl.static_range(1, WORDS):
        bit = ((tl.load(at + x).to(tl.int32) | fill)[:, None] >> (column % WORD)[None, :]) & 1
        seen = tl.where((column // WORD == x)[None, :], bit, seen)
    return seen != 0


@triton.jit
def pair_values(at, terms):
    """Biases of pairs, in float32."""
    b, h, i, j, q_pos, k_pos = at
    place = terms[4] + b.to(tl.int64) * terms[5] + h.to(tl.int64) * terms[6] + i.to(tl.int64) * terms[7]
    return tl.load(place + j.to(tl.int64) * terms[8]).to(tl.float32)


@triton.jit
def finish_scores(
    s, numbers, at, terms,
    FAST: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr, PAIR: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Scores from dot products, and the slope of the cap; ``FAST`` scores stay without their scale.

    ``at`` is batch, head, query, key and their positions, broadcast to the tile either way round, and inside the call.
    """
    slope = 1.0
    if not FAST:
        s *= numbers[0]
    if SOFTCAP:
        t = tanh(s / numbers[2])
        s = numbers[2] * t
        slope = 1.0 - t * t
    b, h, i, j, q_pos, k_pos = at
    slopes, table, table_h, reach, pair, pair_b, pair_h, pair_q, pair_k, block, block_b, block_h, block_q = terms
    if ALIBI:
        s -= tl.load(slopes + h) * tl.abs(q_pos - k_pos).to(tl.float32)
    if RELATIVE:
        away = tl.minimum(tl.maximum(k_pos - q_pos, -reach), reach) + reach
        s += tl.load(table + h * table_h + away).to(tl.float32)
    if PAIR == 1:
        s += pair_values(at, terms)
    if BLOCK_Q > 0:
        place = block + b.to(tl.int64) * block_b + h.to(tl.int64) * block_h + (i // BLOCK_Q).to(tl.int64) * block_q
        s += tl.load(place + j // BLOCK_K).to(tl.float32)
    return s, slope


@triton.jit
def product(x, y, numbers, at, terms, PAIR: tl.constexpr, PRECISION: tl.constexpr):
    """``x y^T``; with ``PAIR`` 2 the biases of pairs are what the product starts from.

    A tile that is loaded and added afterwards draws the scores, and the softmax with them, into the layout of the load.
    """
    if PAIR == 2:
        s = tl.dot(x, tl.trans(y), pair_values(at, terms) / numbers[0], input_precision=PRECISION)
    else:
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    return s


@triton.jit
def row_scores(
    q, t, side, keys, terms, numbers,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FAST: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, RELATIVE: tl.constexpr, PAIR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores ``(ROWS, BN)`` of key tile ``t``, the slope of the cap, the keys, and which weights survive dropout."""
    b, h, i, r, live, q_pos = side
    k, v, skn, svn, k_pos, nk, bits = keys
    j = tl.minimum(t * BN + tl.arange(0, BN), nk - 1)
    kt = load_rows(k, t * BN, skn, nk, D, BD, BN)
    kp = j
    if ALIBI or RELATIVE or DROPOUT:
        kp = tl.load(k_pos + j)
    at = (b, h[:, None], i[:, None], j[None, :], q_pos[:, None], kp[None, :])
    s = product(q, kt, numbers, at, terms, PAIR, PRECISION)
    s, slope = finish_scores(s, numbers, at, terms, FAST, SOFTCAP, ALIBI, RELATIVE, PAIR, BLOCK_Q, BLOCK_K)
    kept = kp
    if DROPOUT:
        kept = survives(numbers[4], b, h[:, None], q_pos[:, None], kp[None, :], numbers[3])
    return s, slope, kt, kept


@triton.jit
def visible(t, mask_id, side, keys, BM: tl.constexpr, BN: tl.constexpr):
    """Which pairs of a tile may interact."""
    j = tl.arange(0, BN)
    return bitmap(keys[6], mask_id, side[3], j, BM, BN) & (t * BN + j < keys[5])[None, :]


@triton.jit
def work_item(work, n, tiles, heads, index, index_b, index_h, PACK: tl.constexpr):
    """Batch, first head, tile row and row set of the n-th item of the work list."""
    item = tl.load(work + n)
    pack = item // tiles
    b = pack // (heads // PACK)
    h0 = pack % (heads // PACK) * PACK
    return b, h0, item % tiles, tl.load(index + b * index_b + h0 * index_h)


@triton.jit
def run_bounds(rows, row_set, row, tiles, width, IDS: tl.constexpr):
    """First and last run of a row; a padded id is a run of one tile."""
    if IDS:
        start = (row_set * tiles + row).to(tl.int64) * width
        stop = start + tl.load(rows + row_set * tiles + row)
    else:
        at = rows + row_set.to(tl.int64) * (tiles + 1) + row
        start = tl.load(at).to(tl.int64)
        stop = tl.load(at + 1).to(tl.int64)
    return start, stop


@triton.jit
def read_run(first, count, mask_id, r):
    """First tile, end and bitmap of a run."""
    start = tl.load(first + r)
    return start, start + tl.load(count + r), tl.load(mask_id + r)


@triton.jit
def read_id(first, mask_id, r, IDS_MASKED: tl.constexpr):
    """Tile and bitmap of a padded id."""
    t = tl.load(first + r)
    if IDS_MASKED:
        m = tl.load(mask_id + r)
    else:
        m = t * 0
    return t, m


@triton.jit
def exponent_factor(scale, FAST: tl.constexpr, NATURAL: tl.constexpr):
    """What scores are multiplied by on their way to the exponent.

    Half-precision inputs take powers of 2, so that scale and base are one factor. In float32 the rounding of that
    factor would show in sharp attention: there the difference to the maximum is taken first, in natural units.
    """
    c = tl.full([], 1.0, tl.float32)
    if FAST:
        c = c * scale
    if not NATURAL:
        c = c * LOG2E
    return c


@triton.jit
def units(x, NATURAL: tl.constexpr):
    """A natural logarithm in the units of the exponent."""
    if not NATURAL:
        x = x * LOG2E
    return x
