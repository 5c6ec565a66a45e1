"""The backward kernels: by queries for queries, by keys over the inverted lists for keys and values; no atomics."""

import triton
import triton.language as tl

from ...tiled.kernels.parts import exponential
from ...tiled.kernels.parts import units as in_units
from .parts import UNSPECIALISED, finished, heads_of, load_heads, load_ids, load_listed, owner


@triton.jit(do_not_specialize=UNSPECIALISED)
def listed_rows(
    q, k, v, ids, dout, lse, delta, dq,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, ids_b, ids_h,
    nq, nk, width, heads, group, units, share, tiles, first, scale, softcap,
    WHAT: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
    BN: tl.constexpr, SHARED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one query of several heads owns: ``WHAT`` 0: its gradient, 1: its sum of weights times their gradients."""
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    b, u, i, tile = owner(tl.program_id(0), nq, tiles, units)
    h, live = heads_of(u, tile, group, ROWS)
    far, kv = b.to(tl.int64), (u // share).to(tl.int64)
    qt = load_heads(q + far * sqb, h, live, i, sqh, sqn, 0, D, BD)
    start = i * 0
    if SHARED:
        start += first
    dt = load_heads(dout + far * sdb, h, live, i, sdh, sdn, start, DV, BDV)
    keys, values = k + far * skb + kv * skh, v + far * svb + kv * svh
    some = ids + far * ids_b + u.to(tl.int64) * ids_h + i.to(tl.int64) * width
    at = (b * heads + h).to(tl.int64) * nq + i
    lt = in_units(tl.load(lse + at, mask=live, other=float("inf")), NATURAL)
    if WHAT == 0:
        et = tl.load(delta + at, mask=live, other=0.0)
        acc = tl.zeros([ROWS, BD], tl.float32)
    else:
        et = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS], tl.float32)
    for x in range(0, width, BN):
        row, seen = load_ids(some, x, width, nk, BN)
        kt = load_listed(keys, row, seen, skn, D, BD)
        s, slope = finished(tl.dot(qt, tl.trans(kt), input_precision=PRECISION), scale, softcap, SOFTCAP, NATURAL)
        w = exponential(tl.where(seen[None, :], s, float("-inf")) - lt[:, None], 0, NATURAL)
        vt = kt
        if not SHARED:
            vt = load_listed(values, row, seen, svn, DV, BDV)
        dw = tl.dot(dt, tl.trans(vt), input_precision=PRECISION)
        if WHAT == 0:
            g = w * (dw - et[:, None]) * slope
            acc = tl.dot(g.to(kt.dtype), kt, acc, input_precision=PRECISION)
        else:
            acc += tl.sum(w * dw, 1)
    if WHAT == 0:
        d = tl.arange(0, BD)
        acc = acc * scale
        inside = live[:, None] & (d < D)[None, :]
        tl.store(dq + at[:, None] * D + d[None, :], acc.to(dq.dtype.element_ty), mask=inside)
    else:
        tl.store(delta + at, acc, mask=live)


@triton.jit(do_not_specialize=UNSPECIALISED)
def listed_keys(
    q, k, v, dout, lse, delta, dk, dv, queries, starts,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sdb, sdh, sdn, ids_b, ids_h, starts_b, starts_h,
    nq, nk, width, heads, group, units, share, scale, softcap,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Gradients of one key and its value, summed over the query heads and queries that list it, in their order.

    With a single key there is no product of matrices: rows are loaded, weighted and added up.
    """
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    n = tl.program_id(0)
    pair, j = n // nk, n % nk
    kv_heads = units // share
    b, kv = pair // kv_heads, pair % kv_heads
    far, side, row = b.to(tl.int64), kv.to(tl.int64), j.to(tl.int64)
    d, c, r = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, ROWS)
    kt = tl.load(k + far * skb + side * skh + row * skn + d, mask=d < D, other=0.0).to(tl.float32)
    vt = tl.load(v + far * svb + side * svh + row * svn + c, mask=c < DV, other=0.0).to(tl.float32)
    gk = tl.zeros([BD], tl.float32)
    gv = tl.zeros([BDV], tl.float32)
    for u in range(kv * share, kv * share + share):
        unit = tl.cast(u, tl.int64)
        border = starts + far * starts_b + unit * starts_h + j
        begin, end = tl.load(border), tl.load(border + 1)
        some = queries + far * ids_b + unit * ids_h + begin
        for x in range(0, (end - begin) * group, ROWS):
            e = x + r
            live = e < (end - begin) * group
            i = tl.load(some + e // group, mask=live, other=0).to(tl.int64)
            h = u * group + e % group
            head = h.to(tl.int64)
            at = (b * heads + h).to(tl.int64) * nq + i
            place = q + far * sqb + head * sqh + i * sqn
            qt = tl.load(place[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
            place = dout + far * sdb + head * sdh + i * sdn
            dt = tl.load(place[:, None] + c[None, :], mask=live[:, None] & (c < DV)[None, :], other=0.0).to(tl.float32)
            s, slope = finished(tl.sum(qt * kt[None, :], 1), scale, softcap, SOFTCAP, NATURAL)
            lt = in_units(tl.load(lse + at, mask=live, other=float("inf")), NATURAL)
            et = tl.load(delta + at, mask=live, other=0.0)
            w = exponential(s - lt, 0, NATURAL)
            g = w * (tl.sum(dt * vt[None, :], 1) - et) * slope
            gk += tl.sum(g[:, None] * qt, 0)
            gv += tl.sum(w[:, None] * dt, 0)
    at = (pair.to(tl.int64) * nk + j)
    tl.store(dk + at * D + d, (gk * scale).to(dk.dtype.element_ty), mask=d < D)
    tl.store(dv + at * DV + c, gv.to(dv.dtype.element_ty), mask=c < DV)
