"""Key tiles outermost, one query a tile (FSA, 2025): kernels over the queries that chose a key tile.

An *entry* is one query's choice of one key tile. A program owns a *piece* of the entries of a tile: it loads the tile
once, and its rows are queries that lie anywhere, ``PACK`` heads of each in ``SPAN`` rows, a power of two. What a query
gets from a tile is written to the place of the entry, ``(section, head, query, slot)``; another kernel adds the slots
of each query up. A *section* is a range of queries of the heads that share a list; a launch takes some sections, so
that memory is bounded.
"""

import triton
import triton.language as tl

from .parts import LN2, bitmap, exponent_factor, exponential, load_packed, load_rows, units

ENTRIES = [
    "nq", "nk", "heads", "group", "units_b", "ranges", "step", "slots", "first", "n", "base", "each", "begin", "end",
]  # fmt: skip
"""Arguments of which no value is worth a kernel of its own."""


@triton.jit
def _owner(owner, piece, nk, group, units_b, ranges, BN: tl.constexpr, PACK: tl.constexpr):
    """Key tile, section, batch entry, first query head and key head of a piece."""
    own = tl.load(owner + piece)
    tiles = tl.cdiv(nk, BN)
    section = own // tiles
    unit = section // ranges
    h0 = unit % units_b * PACK
    return own % tiles, section, unit // units_b, h0, h0 // group


@triton.jit
def _rows(x, stop, entry, slots, PACK: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr):
    """Place in the sorted list, entry, head, query and presence of each row; the last one again past the end."""
    r = tl.arange(0, ROWS)
    at = x + r // SPAN
    live = (r % SPAN < PACK) & (at < stop)
    at = tl.minimum(at, stop - 1)
    e = tl.load(entry + at)
    return at, e, tl.minimum(r % SPAN, PACK - 1), e // slots, live


@triton.jit
def _places(section, ranges, first, step, slots, g, e, PACK: tl.constexpr):
    """Where the results of the entries lie."""
    size = step.to(tl.int64) * slots
    return ((section - first).to(tl.int64) * PACK - section % ranges + g) * size + e


@triton.jit(do_not_specialize=ENTRIES)
def entries_forward(
    q, k, v, part, stats, entry, mask_id, owner, start, stop, bits,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, nq, nk, group, units_b, ranges, step, slots, first, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
    PACK: tl.constexpr, SPAN: tl.constexpr, IDS_MASKED: tl.constexpr, FAST: tl.constexpr, EXP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Averages over one key tile, and their natural log-normalisers, for every entry of a piece."""
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    PER: tl.constexpr = ROWS // SPAN
    piece = tl.program_id(0)
    t, section, b, h0, kv = _owner(owner, piece, nk, group, units_b, ranges, BN, PACK)
    far, kv = b.to(tl.int64), kv.to(tl.int64)
    kt = load_rows(k + far * skb + kv * skh, t * BN, skn, nk, D, BD, BN)
    vt = load_rows(v + far * svb + kv * svh, t * BN, svn, nk, DV, BDV, BN)
    c = exponent_factor(scale, FAST, NATURAL)
    j = tl.arange(0, BN)
    inside = t * BN + j < nk
    d = tl.arange(0, BDV)
    last = tl.load(stop + piece)
    for x in range(tl.load(start + piece), last, PER):
        at, e, g, i, live = _rows(x, last, entry, slots, PACK, SPAN, ROWS)
        h = h0 + g
        qt = load_packed(q + far * sqb, h, i, sqh, sqn, D, BD)
        s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
        if not FAST:
            s *= scale
        if IDS_MASKED:
            id = tl.load(mask_id + at)
            if (tl.max(id, 0) > 0) | (t * BN + BN > nk):
                s = tl.where(bitmap(bits, id, id * 0, j, 1, BN) & inside[None, :], s, float("-inf"))
        else:
            if t * BN + BN > nk:
                s = tl.where(inside[None, :], s, float("-inf"))
        m = tl.max(s, 1) * c
        m = tl.where(m == float("-inf"), 0.0, m)
        w = exponential(s * c - m[:, None], EXP, NATURAL)
        norm = tl.sum(w, 1)
        full = tl.where(norm == 0.0, 1.0, norm)
        acc = tl.dot(w.to(vt.dtype), vt, input_precision=PRECISION) / full[:, None]
        lse = tl.log2(full) * LN2
        if NATURAL:
            lse += m
        else:
            lse += m * LN2
        place = _places(section, ranges, first, step, slots, g, e, PACK).to(tl.int64)
        tl.store(stats + place, tl.where(norm == 0.0, float("-inf"), lse), mask=live)
        to = part + place[:, None] * DV + d[None, :]
        tl.store(to, acc.to(part.dtype.element_ty), mask=live[:, None] & (d < DV)[None, :])


@triton.jit
def _seen(bits, mask_id, column, WIDTH: tl.constexpr):
    """Which columns each entry's query sees, columns first."""
    WORD: tl.constexpr = WIDTH if WIDTH < 32 else 32
    WORDS: tl.constexpr = WIDTH // WORD
    at = bits + tl.maximum(mask_id - 1, 0).to(tl.int64) * WORDS
    fill = tl.where(mask_id == 0, -1, 0)
    seen = ((tl.load(at).to(tl.int32) | fill)[None, :] >> (column % WORD)[:, None]) & 1
    for x in tl.static_range(1, WORDS):
        bit = ((tl.load(at + x).to(tl.int32) | fill)[None, :] >> (column % WORD)[:, None]) & 1
        seen = tl.where((column // WORD == x)[:, None], bit, seen)
    return seen != 0


@triton.jit(do_not_specialize=ENTRIES)
def entries_backward(
    q, k, v, dout, lse, delta, part, dk, dv, entry, mask_id, owner, start, stop, bits,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn,
    nq, nk, heads, group, units_b, ranges, step, slots, first, scale,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr,
    PACK: tl.constexpr, SPAN: tl.constexpr, IDS_MASKED: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a key tile from one piece of its entries, and of the queries from this tile; keys first."""
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    PER: tl.constexpr = ROWS // SPAN
    piece = tl.program_id(0)
    t, section, b, h0, kv = _owner(owner, piece, nk, group, units_b, ranges, BN, PACK)
    far, kv = b.to(tl.int64), kv.to(tl.int64)
    kt = load_rows(k + far * skb + kv * skh, t * BN, skn, nk, D, BD, BN)
    vt = load_rows(v + far * svb + kv * svh, t * BN, svn, nk, DV, BDV, BN)
    c = exponent_factor(scale, FAST, NATURAL)
    j = tl.arange(0, BN)
    inside = t * BN + j < nk
    d = tl.arange(0, BD)
    gk = tl.zeros([BN, BD], tl.float32)
    gv = tl.zeros([BN, BDV], tl.float32)
    last = tl.load(stop + piece)
    for x in range(tl.load(start + piece), last, PER):
        at, e, g, i, live = _rows(x, last, entry, slots, PACK, SPAN, ROWS)
        h = h0 + g
        qt = load_packed(q + far * sqb, h, i, sqh, sqn, D, BD)
        dt = load_packed(dout + far * sdb, h, i, sdh, sdn, DV, BDV)
        row = (b * heads + h).to(tl.int64) * nq + i
        lt = units(tl.load(lse + row, mask=live, other=float("inf")), NATURAL)
        et = tl.load(delta + row, mask=live, other=0.0)
        s = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
        if not FAST:
            s *= scale
        s = s * c
        if IDS_MASKED:
            id = tl.load(mask_id + at)
            if (tl.max(id, 0) > 0) | (t * BN + BN > nk):
                s = tl.where(_seen(bits, id, j, BN) & inside[:, None], s, float("-inf"))
        else:
            if t * BN + BN > nk:
                s = tl.where(inside[:, None], s, float("-inf"))
        w = exponential(s - lt[None, :], 0, NATURAL)
        dw = tl.dot(vt, tl.trans(dt), input_precision=PRECISION)
        gv = tl.dot(w.to(dt.dtype), dt, gv, input_precision=PRECISION)
        ds = (w * (dw - et[None, :])).to(qt.dtype)
        gk = tl.dot(ds, qt, gk, input_precision=PRECISION)
        gq = tl.dot(tl.trans(ds), kt, input_precision=PRECISION) * scale
        place = _places(section, ranges, first, step, slots, g, e, PACK).to(tl.int64)
        to = part + place[:, None] * D + d[None, :]
        tl.store(to, gq.to(part.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
    at = (piece.to(tl.int64) * BN + j)[:, None]
    tl.store(dk + at * D + d[None, :], gk * scale, mask=(d < D)[None, :])
    d = tl.arange(0, BDV)
    tl.store(dv + at * DV + d[None, :], gv, mask=(d < DV)[None, :])


@triton.jit(do_not_specialize=ENTRIES)
def merge_entries(
    part, stats, counts, out, lse, sink, nq, heads, units_b, ranges, step, slots, first,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr, WEIGHTED: tl.constexpr,
    SINK: tl.constexpr,
):  # fmt: skip
    """Adds the slots of every query up, weighted by their log-normalisers where ``WEIGHTED``, in one order."""
    blocks = tl.cdiv(step, ROWS)
    block, own = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, section = own % PACK, first + own // PACK
    unit = section // ranges
    row = block * ROWS + tl.arange(0, ROWS)
    i = section % ranges * step + row
    live = (row < step) & (i < nq)
    h = unit % units_b * PACK + head
    filled = tl.load(counts + unit.to(tl.int64) * nq + i, mask=live, other=0)
    at = (own.to(tl.int64) * step + row) * slots
    d = tl.arange(0, PADDED)
    most = tl.max(filled, 0)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    if WEIGHTED:
        for s in range(0, most):
            best = tl.maximum(best, tl.load(stats + at + s, mask=s < filled, other=float("-inf")))
        if SINK:
            logit = tl.load(sink + h).to(tl.float32)
            best = tl.maximum(best, logit)
        best = tl.where(best == float("-inf"), 0.0, best)
        if SINK:
            norm += exponential(logit - best, 0, True)
    for s in range(0, most):
        inside = (s < filled)[:, None] & (d < WIDTH)[None, :]
        x = tl.load(part + (at + s)[:, None] * WIDTH + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            w = exponential(tl.load(stats + at + s, mask=s < filled, other=float("-inf")) - best, 0, True)
            norm += w
            x = x * w[:, None]
        acc += x
    to = (unit // units_b * heads + h).to(tl.int64) * nq + i
    if WEIGHTED:
        full = tl.where(norm == 0.0, 1.0, norm)
        acc = acc / full[:, None]
        tl.store(lse + to, tl.where(norm == 0.0, float("-inf"), best + tl.log2(full) * LN2), mask=live)
    inside = live[:, None] & (d < WIDTH)[None, :]
    tl.store(out + to[:, None] * WIDTH + d[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ENTRIES)
def total_pieces(
    part, bounds, out, n, nk, ranges, each, begin, end, base,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Gradients of a key tile: the sums over its pieces in the sections ``begin`` to ``end``."""
    tiles = tl.cdiv(nk, BN)
    t, key_head = tl.program_id(0) % tiles, n + tl.program_id(0) // tiles
    j, d = tl.arange(0, BN), tl.arange(0, PADDED)
    acc = tl.zeros([BN, PADDED], tl.float32)
    to = out + (key_head.to(tl.int64) * nk + t * BN + j)[:, None] * WIDTH + d[None, :]
    inside = (t * BN + j < nk)[:, None] & (d < WIDTH)[None, :]
    if ADD:
        acc += tl.load(to, mask=inside, other=0.0)
    size = each * ranges
    first = tl.load(bounds + base.to(tl.int64) * tiles)
    for section in range(tl.maximum(key_head * size, begin), tl.minimum(key_head * size + size, end)):
        at = bounds + tl.cast(section, tl.int64) * tiles + t
        for piece in range(tl.load(at), tl.load(at + 1)):
            place = (tl.cast(piece - first, tl.int64) * BN + j)[:, None] * WIDTH + d[None, :]
            acc += tl.load(part + place, mask=(d < WIDTH)[None, :], other=0.0)
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)
