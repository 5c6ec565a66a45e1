"""The forward kernel: output and log-normaliser."""

import triton
import triton.language as tl

from .parts import (
    LN2,
    UNSPECIALISED,
    exponent_factor,
    exponential,
    load_packed,
    load_rows,
    packed_rows,
    read_id,
    read_run,
    row_scores,
    run_bounds,
    units,
    visible,
    weight_of,
    work_item,
)


@triton.jit
def _forward_tile(
    acc, norm, m, q, t, mask_id, side, keys, terms, numbers,
    DV: tl.constexpr, BDV: tl.constexpr, WEIGHT: tl.constexpr, SKIP: tl.constexpr, EXP: tl.constexpr,
    RESCALE: tl.constexpr, NATURAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, FAST: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr,
    PAIR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes one tile into the running averages of a row of tiles."""
    s, slope, kt, kept = row_scores(
        q, t, side, keys, terms, numbers,
        D, BD, BM, BN, FAST, SOFTCAP, ALIBI, RELATIVE, PAIR, BLOCK_Q, BLOCK_K, DROPOUT, PRECISION,
    )  # fmt: skip
    c = numbers[1]
    cut = (mask_id != 0) | (t * BN + BN > keys[5])
    needed = True
    if WEIGHT == "softmax" or SKIP:
        if cut:
            s = tl.where(visible(t, mask_id, side, keys, BM, BN), s, float("-inf"))
        top = tl.max(s, 1) * c
        new = tl.maximum(m, top)
        if SKIP:
            near = (top >= new + numbers[6]) & (top > float("-inf")) & side[4]
            needed = tl.max(near.to(tl.int32), 0) > 0
    if needed:
        vt = load_rows(keys[1], t * BN, keys[3], keys[5], DV, BDV, BN)
        if WEIGHT == "softmax":
            if RESCALE > 0:
                new = tl.where(m >= new - RESCALE, m, new)
            base = tl.where(new == float("-inf"), 0.0, new)
            w = exponential(s * c - base[:, None], EXP, NATURAL)
            alpha = exponential(m - base, 0, NATURAL)
            norm = norm * alpha + tl.sum(w, 1)
            if RESCALE > 0:
                if tl.min(alpha, 0) < 1.0:
                    acc = acc * alpha[:, None]
            else:
                acc = acc * alpha[:, None]
        else:
            w = weight_of(s, WEIGHT)
            if cut:
                w = tl.where(visible(t, mask_id, side, keys, BM, BN), w, 0.0)
            norm += tl.sum(w, 1)
        if WEIGHT == "softmax" or SKIP:
            m = new
        if DROPOUT:
            w = tl.where(kept, w, 0.0)
        acc = tl.dot(w.to(vt.dtype), vt, acc, input_precision=PRECISION)
    return acc, norm, m


@triton.jit
def _forward_item(
    n, q, k, v, out, lse, sink, work, rows, first, count, mask_id, bits, index, q_pos, k_pos, terms, numbers,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, index_b, index_h, q_pos_b, k_pos_b,
    nq, nk, heads, group, width,
    DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr, IDS: tl.constexpr,
    IDS_MASKED: tl.constexpr, SINK: tl.constexpr, WEIGHT: tl.constexpr, SKIP: tl.constexpr, EXP: tl.constexpr,
    RESCALE: tl.constexpr, NATURAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, FAST: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr,
    PAIR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One row of tiles of one batch entry and head (or pack of heads)."""
    tiles = tl.cdiv(nq, BM)
    b, h0, row, row_set = work_item(work, n, tiles, heads, index, index_b, index_h, PACK)
    h, i, r, live = packed_rows(row * BM, h0, nq, BM, PACK, ROWS)
    far = b.to(tl.int64)
    qt = load_packed(q + far * sqb, h, i, sqh, sqn, D, BD)
    qp = i
    if ALIBI or RELATIVE or DROPOUT:
        qp = tl.load(q_pos + far * q_pos_b + i)
    kv = (h0 // group).to(tl.int64)
    keys = (k + far * skb + kv * skh, v + far * svb + kv * svh, skn, svn, k_pos + far * k_pos_b, nk, bits)
    side = (b, h, i, r, live, qp)
    acc = tl.zeros([ROWS, BDV], tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    if SINK:
        m = units(tl.load(sink + h).to(tl.float32), NATURAL)
        norm += 1.0
    start, stop = run_bounds(rows, row_set, row, tiles, width, IDS)
    for x in range(start, stop):
        if IDS:
            t, id = read_id(first, mask_id, x, IDS_MASKED)
            acc, norm, m = _forward_tile(
                acc, norm, m, qt, t, id, side, keys, terms, numbers,
                DV, BDV, WEIGHT, SKIP, EXP, RESCALE, NATURAL, D, BD, BM, BN, FAST, SOFTCAP, ALIBI,
                RELATIVE, PAIR, BLOCK_Q, BLOCK_K, DROPOUT, PRECISION,
            )  # fmt: skip
        else:
            t0, t1, id = read_run(first, count, mask_id, x)
            for t in range(t0, t1):
                acc, norm, m = _forward_tile(
                    acc, norm, m, qt, t, id, side, keys, terms, numbers,
                    DV, BDV, WEIGHT, SKIP, EXP, RESCALE, NATURAL, D, BD, BM, BN, FAST, SOFTCAP,
                    ALIBI, RELATIVE, PAIR, BLOCK_Q, BLOCK_K, DROPOUT, PRECISION,
                )  # fmt: skip
    full = tl.where(norm == 0.0, 1.0, norm)
    if WEIGHT != "sigmoid":
        acc = acc / full[:, None]
    if DROPOUT:
        acc = acc * numbers[5]
    stats = tl.log2(full) * LN2
    if WEIGHT == "softmax":
        if NATURAL:
            stats += m
        else:
            stats += m * LN2
    d = tl.arange(0, BDV)
    at = (b * heads + h).to(tl.int64) * nq + i
    tl.store(lse + at, tl.where(norm == 0.0, float("-inf"), stats), mask=live)
    tl.store(out + at[:, None] * DV + d[None, :], acc.to(out.dtype.element_ty), mask=live[:, None] & (d < DV)[None, :])


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward(
    q, k, v, out, lse, sink, work, rows, first, count, mask_id, bits, index, q_pos, k_pos, slopes, table, pair, block,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, index_b, index_h, q_pos_b, k_pos_b,
    table_h, reach, pair_b, pair_h, pair_q, pair_k, block_b, block_h, block_q,
    nq, nk, heads, group, width, total, scale, softcap, dropped, seed, keep_scale, floor,
    DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr, IDS: tl.constexpr,
    IDS_MASKED: tl.constexpr, SINK: tl.constexpr, WEIGHT: tl.constexpr, SKIP: tl.constexpr, EXP: tl.constexpr,
    RESCALE: tl.constexpr, PERSISTENT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, FAST: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, RELATIVE: tl.constexpr,
    PAIR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and natural log-normaliser of every row of tiles."""
    terms = (slopes, table, table_h, reach, pair, pair_b, pair_h, pair_q, pair_k, block, block_b, block_h, block_q)
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    c = exponent_factor(scale, FAST, NATURAL)
    numbers = (scale, c, softcap, dropped, seed, keep_scale, units(floor, NATURAL))
    n = tl.program_id(0)
    stop = n + 1
    if PERSISTENT:
        stop = total
    for x in range(n, stop, tl.num_programs(0)):
        _forward_item(
            x, q, k, v, out, lse, sink, work, rows, first, count, mask_id, bits, index, q_pos, k_pos, terms, numbers,
            sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, index_b, index_h, q_pos_b, k_pos_b,
            nq, nk, heads, group, width,
            DV, BDV, ROWS, PACK, IDS, IDS_MASKED, SINK, WEIGHT, SKIP, EXP, RESCALE, NATURAL, D, BD, BM, BN,
            FAST, SOFTCAP, ALIBI, RELATIVE, PAIR, BLOCK_Q, BLOCK_K, DROPOUT, PRECISION,
        )  # fmt: skip
