"""The backward kernels: by query tiles for queries, by key tiles for keys and values; no atomics."""

import triton
import triton.language as tl

from .parts import (
    UNSPECIALISED,
    bitmap,
    exponent_factor,
    exponential,
    finish_scores,
    load_packed,
    load_rows,
    packed_rows,
    product,
    read_id,
    read_run,
    row_scores,
    run_bounds,
    slope_of,
    survives,
    units,
    visible,
    weight_of,
    work_item,
)


@triton.jit
def _grad_of_scores(
    s, dw, lse, delta, kept, keep_scale, WEIGHT: tl.constexpr, DROPOUT: tl.constexpr, NATURAL: tl.constexpr
):
    """The weights that multiplied the values, ``w * dw``, and the gradient of the scores.

    ``s`` and ``lse`` are in the units of the exponent for a softmax; an infinite ``lse`` makes everything 0.
    """
    if WEIGHT == "softmax":
        w = exponential(s - lse, 0, NATURAL)
        raw = w
    else:
        raw = weight_of(s, WEIGHT)
        inverse = exponential(-lse, 0, NATURAL)
        w = raw * inverse
        dw = dw * inverse
        delta = delta * inverse
    used = w
    if DROPOUT:
        used = tl.where(kept, w * keep_scale, 0.0)
        dw = tl.where(kept, dw * keep_scale, 0.0)
    if WEIGHT == "softmax":
        ds = w * (dw - delta)
    else:
        ds = slope_of(s, raw, WEIGHT) * (dw - delta)
    return used, w * dw, ds


@triton.jit
def _rows_tile(
    acc, best, q, dout, lse, delta, t, mask_id, side, keys, terms, numbers, ds, skipped, row, row0, strip, heads, nq,
    WHAT: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, WEIGHT: tl.constexpr, SKIP: tl.constexpr,
    NATURAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FAST: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr, PAIR: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's share of a row's gradients: ``WHAT`` 0: of the queries, 1: sum of ``w dw``, 2: of the scores."""
    s, slope, kt, kept = row_scores(
        q, t, side, keys, terms, numbers,
        D, BD, BM, BN, FAST, SOFTCAP, ALIBI, RELATIVE, PAIR, BLOCK_Q, BLOCK_K, DROPOUT, PRECISION,
    )  # fmt: skip
    b, h, i, r, live, q_pos = side
    cut = (mask_id != 0) | (t * BN + BN > keys[5])
    if WEIGHT == "softmax" or SKIP:
        if cut:
            s = tl.where(visible(t, mask_id, side, keys, BM, BN), s, float("-inf"))
    needed = True
    if SKIP:
        top = tl.max(s, 1) * numbers[1]
        new = tl.maximum(best, top)
        near = (top >= new + numbers[6]) & (top > float("-inf")) & live
        needed = tl.max(near.to(tl.int32), 0) > 0
        if WHAT == 0:
            # heads of a pack are skipped together, so any of them may say so for all
            at = skipped + ((b * heads + h).to(tl.int64) * tl.cdiv(nq, BM) + row) * tl.cdiv(keys[5], BN) + t
            tl.store(at, tl.where(needed, 0, 1) + h * 0)
    if WEIGHT == "softmax":
        s = s * numbers[1]
    if needed:
        if SKIP:
            best = new
        vt = load_rows(keys[1], t * BN, keys[3], keys[5], DV, BDV, BN)
        dw = tl.dot(dout, tl.trans(vt), input_precision=PRECISION)
        used, sums, g = _grad_of_scores(s, dw, lse[:, None], delta[:, None], kept, numbers[5], WEIGHT, DROPOUT, NATURAL)
        if WEIGHT != "softmax":
            if cut:
                g = tl.where(visible(t, mask_id, side, keys, BM, BN), g, 0.0)
        if WHAT == 0:
            acc = tl.dot((g * slope).to(kt.dtype), kt, acc, input_precision=PRECISION)
        elif WHAT == 1:
            acc += tl.sum(sums, 1)
        else:
            j = t * BN + tl.arange(0, BN)
            at = ds + ((b * heads + h).to(tl.int64) * strip + (i - row0))[:, None] * keys[5] + j[None, :]
            tl.store(at, g, mask=live[:, None] & (j < keys[5])[None, :])
    return acc, best


@triton.jit(do_not_specialize=UNSPECIALISED)
def rows_backward(
    q, k, v, dout, lse, delta, dq, ds, skipped, work, rows, first, count, mask_id, bits, index, q_pos, k_pos,
    slopes, table, pair, block,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, index_b, index_h, q_pos_b, k_pos_b,
    table_h, reach, pair_b, pair_h, pair_q, pair_k, block_b, block_h, block_q,
    nq, nk, heads, group, width, total, scale, softcap, dropped, seed, keep_scale, floor, row0, strip,
    WHAT: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    IDS: tl.constexpr, IDS_MASKED: tl.constexpr, WEIGHT: tl.constexpr, SKIP: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FAST: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, RELATIVE: tl.constexpr, PAIR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients that a row of query tiles owns: of its queries, the sums ``delta``, or a strip of score gradients."""
    terms = (slopes, table, table_h, reach, pair, pair_b, pair_h, pair_q, pair_k, block, block_b, block_h, block_q)
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    c = exponent_factor(scale, FAST, NATURAL)
    numbers = (scale, c, softcap, dropped, seed, keep_scale, units(floor, NATURAL))
    tiles = tl.cdiv(nq, BM)
    b, h0, row, row_set = work_item(work, tl.program_id(0), tiles, heads, index, index_b, index_h, PACK)
    h, i, r, live = packed_rows(row * BM, h0, nq, BM, PACK, ROWS)
    far = b.to(tl.int64)
    qt = load_packed(q + far * sqb, h, i, sqh, sqn, D, BD)
    dt = load_packed(dout + far * sdb, h, i, sdh, sdn, DV, BDV)
    qp = i
    if ALIBI or RELATIVE or DROPOUT:
        qp = tl.load(q_pos + far * q_pos_b + i)
    at = (b * heads + h).to(tl.int64) * nq + i
    lt = units(tl.load(lse + at, mask=live, other=float("inf")), NATURAL)
    if WHAT == 1:
        et = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS], tl.float32)
    else:
        et = tl.load(delta + at, mask=live, other=0.0)
        acc = tl.zeros([ROWS, BD], tl.float32)
    kv = (h0 // group).to(tl.int64)
    keys = (k + far * skb + kv * skh, v + far * svb + kv * svh, skn, svn, k_pos + far * k_pos_b, nk, bits)
    side = (b, h, i, r, live, qp)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    start, stop = run_bounds(rows, row_set, row, tiles, width, IDS)
    for x in range(start, stop):
        if IDS:
            t, id = read_id(first, mask_id, x, IDS_MASKED)
            acc, best = _rows_tile(
                acc, best, qt, dt, lt, et, t, id, side, keys, terms, numbers, ds, skipped, row, row0, strip, heads, nq,
                WHAT, DV, BDV, WEIGHT, SKIP, NATURAL, D, BD, BM, BN, FAST, SOFTCAP, ALIBI, RELATIVE,
                PAIR, BLOCK_Q, BLOCK_K, DROPOUT, PRECISION,
            )  # fmt: skip
        else:
            t0, t1, id = read_run(first, count, mask_id, x)
            for t in range(t0, t1):
                acc, best = _rows_tile(
                    acc, best, qt, dt, lt, et, t, id, side, keys, terms, numbers, ds, skipped, row, row0, strip,
                    heads, nq,
                    WHAT, DV, BDV, WEIGHT, SKIP, NATURAL, D, BD, BM, BN, FAST, SOFTCAP, ALIBI,
                    RELATIVE, PAIR, BLOCK_Q, BLOCK_K, DROPOUT, PRECISION,
                )  # fmt: skip
    if WHAT == 0:
        d = tl.arange(0, BD)
        acc = acc * scale
        tl.store(dq + at[:, None] * D + d[None, :], acc.to(dq.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])
    elif WHAT == 1:
        tl.store(delta + at, acc, mask=live)


@triton.jit
def _keys_tile(
    dk, dv, k, v, t, mask_id, h0, side, queries, terms, numbers, bits, skipped, row, tiles, heads, nq, nk,
    DV: tl.constexpr, BDV: tl.constexpr, PACK: tl.constexpr, COLS: tl.constexpr, WEIGHT: tl.constexpr,
    SKIP: tl.constexpr, NATURAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, FAST: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr,
    PAIR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile's share of the gradients of a row of key tiles; everything is transposed, keys first."""
    b, j, r, kp = side
    q, dout, lse, delta, q_pos, sqh, sqn, sdh, sdn = queries
    h, i, column, live = packed_rows(t * BM, h0, nq, BM, PACK, COLS)
    if PACK == 1 and BM == COLS:
        qt = load_rows(q + h0.to(tl.int64) * sqh, t * BM, sqn, nq, D, BD, COLS)
        dt = load_rows(dout + h0.to(tl.int64) * sdh, t * BM, sdn, nq, DV, BDV, COLS)
    else:
        qt = load_packed(q, h, i, sqh, sqn, D, BD)
        dt = load_packed(dout, h, i, sdh, sdn, DV, BDV)
    qp = i
    if ALIBI or RELATIVE or DROPOUT:
        qp = tl.load(q_pos + i)
    at = (b * heads + h).to(tl.int64) * nq + i
    lt = units(tl.load(lse + at, mask=live, other=float("inf")), NATURAL)
    et = tl.load(delta + at, mask=live, other=0.0)
    if SKIP:
        place = skipped + ((b * heads + h).to(tl.int64) * tl.cdiv(nq, BM) + t) * tiles + row
        lt = tl.where(tl.load(place) != 0, float("inf"), lt)
    where = (b, h[None, :], i[None, :], j[:, None], qp[None, :], kp[:, None])
    s = product(k, qt, numbers, where, terms, PAIR, PRECISION)
    s, slope = finish_scores(s, numbers, where, terms, FAST, SOFTCAP, ALIBI, RELATIVE, PAIR, BLOCK_Q, BLOCK_K)
    kept = kp
    if DROPOUT:
        kept = survives(numbers[4], b, h[None, :], qp[None, :], kp[:, None], numbers[3])
    if WEIGHT == "softmax":
        s = s * numbers[1]
        if mask_id != 0:
            s = tl.where(bitmap(bits, mask_id, r, column, BN, BM), s, float("-inf"))
    dw = tl.dot(v, tl.trans(dt), input_precision=PRECISION)
    used, sums, g = _grad_of_scores(s, dw, lt[None, :], et[None, :], kept, numbers[5], WEIGHT, DROPOUT, NATURAL)
    if WEIGHT != "softmax":
        if mask_id != 0:
            seen = bitmap(bits, mask_id, r, column, BN, BM)
            used = tl.where(seen, used, 0.0)
            g = tl.where(seen, g, 0.0)
    dv = tl.dot(used.to(dt.dtype), dt, dv, input_precision=PRECISION)
    dk = tl.dot((g * slope).to(qt.dtype), qt, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=UNSPECIALISED)
def keys_backward(
    q, k, v, dout, lse, delta, dk, dv, skipped, work, rows, first, count, mask_id, bits, index, q_pos, k_pos,
    slopes, table, pair, block,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, index_b, index_h, q_pos_b, k_pos_b,
    table_h, reach, pair_b, pair_h, pair_q, pair_k, block_b, block_h, block_q,
    nq, nk, heads, group, width, total, scale, softcap, dropped, seed, keep_scale, floor,
    DV: tl.constexpr, BDV: tl.constexpr, PACK: tl.constexpr, COLS: tl.constexpr, WEIGHT: tl.constexpr,
    SKIP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FAST: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr, PAIR: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of a tile, summed over the query heads that read them."""
    terms = (slopes, table, table_h, reach, pair, pair_b, pair_h, pair_q, pair_k, block, block_b, block_h, block_q)
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    c = exponent_factor(scale, FAST, NATURAL)
    numbers = (scale, c, softcap, dropped, seed, keep_scale, units(floor, NATURAL))
    tiles = tl.cdiv(nk, BN)
    item = tl.load(work + tl.program_id(0))
    row = item % tiles
    b = item // tiles // (heads // group)
    head = item // tiles % (heads // group)
    far, kv = b.to(tl.int64), head.to(tl.int64)
    kt = load_rows(k + far * skb + kv * skh, row * BN, skn, nk, D, BD, BN)
    vt = load_rows(v + far * svb + kv * svh, row * BN, svn, nk, DV, BDV, BN)
    r = tl.arange(0, BN)
    j = row * BN + r
    near = tl.minimum(j, nk - 1)
    kp = near
    if ALIBI or RELATIVE or DROPOUT:
        kp = tl.load(k_pos + far * k_pos_b + near)
    side = (b, near, r, kp)
    queries = (q + far * sqb, dout + far * sdb, lse, delta, q_pos + far * q_pos_b, sqh, sqn, sdh, sdn)
    gk = tl.zeros([BN, BD], tl.float32)
    gv = tl.zeros([BN, BDV], tl.float32)
    for g in range(0, group // PACK):
        h0 = head * group + g * PACK
        row_set = tl.load(index + b * index_b + h0 * index_h)
        start, stop = run_bounds(rows, row_set, row, tiles, width, False)
        for x in range(start, stop):
            t0, t1, id = read_run(first, count, mask_id, x)
            for t in range(t0, t1):
                gk, gv = _keys_tile(
                    gk, gv, kt, vt, t, id, h0, side, queries, terms, numbers, bits, skipped, row, tiles, heads, nq, nk,
                    DV, BDV, PACK, COLS, WEIGHT, SKIP, NATURAL, D, BD, BM, BN, FAST, SOFTCAP, ALIBI,
                    RELATIVE, PAIR, BLOCK_Q, BLOCK_K, DROPOUT, PRECISION,
                )  # fmt: skip
    d = tl.arange(0, BD)
    at = ((b * (heads // group) + head).to(tl.int64) * nk + j)[:, None]
    tl.store(dk + at * D + d[None, :], (gk * scale).to(dk.dtype.element_ty), mask=(j < nk)[:, None] & (d < D)[None, :])
    d = tl.arange(0, BDV)
    tl.store(dv + at * DV + d[None, :], gv.to(dv.dtype.element_ty), mask=(j < nk)[:, None] & (d < DV)[None, :])


@triton.jit(do_not_specialize=["n", "tokens"])
def row_products(
    x, y, out, sxb, sxh, sxn, n, heads, tokens,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``sum_d x y`` of every row: ``x`` strided over batch, heads and tokens, ``y`` contiguous."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    inside = (row < n)[:, None] & (d < WIDTH)[None, :]
    b, h, i = row // tokens // heads, row // tokens % heads, row % tokens
    at = b.to(tl.int64) * sxb + h.to(tl.int64) * sxh + i.to(tl.int64) * sxn
    left = tl.load(x + at[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    right = tl.load(y + row.to(tl.int64)[:, None] * WIDTH + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(left * right, 1), mask=row < n)
