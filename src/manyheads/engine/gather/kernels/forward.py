"""The forward kernel: a softmax that runs over blocks of ids."""

import triton
import triton.language as tl

from ...tiled.kernels.parts import LN2, exponential
from ...tiled.kernels.parts import units as in_units
from .parts import UNSPECIALISED, finished, heads_of, load_heads, load_ids, load_listed, owner


@triton.jit(do_not_specialize=UNSPECIALISED)
def listed(
    q, k, v, ids, out, lse, sink,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, ids_b, ids_h,
    nq, nk, width, heads, group, units, share, tiles, first, scale, softcap,
    D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    SHARED: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and natural log-normaliser of one query of several heads."""
    NATURAL: tl.constexpr = q.dtype.element_ty == tl.float32
    b, u, i, tile = owner(tl.program_id(0), nq, tiles, units)
    h, live = heads_of(u, tile, group, ROWS)
    far, kv = b.to(tl.int64), (u // share).to(tl.int64)
    qt = load_heads(q + far * sqb, h, live, i, sqh, sqn, 0, D, BD)
    keys, values = k + far * skb + kv * skh, v + far * svb + kv * svh
    some = ids + far * ids_b + u.to(tl.int64) * ids_h + i.to(tl.int64) * width
    acc = tl.zeros([ROWS, BDV], tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    if SINK:
        m = in_units(tl.load(sink + h), NATURAL)
        norm += 1.0
    for x in range(0, width, BN):
        row, seen = load_ids(some, x, width, nk, BN)
        kt = load_listed(keys, row, seen, skn, D, BD)
        s, slope = finished(tl.dot(qt, tl.trans(kt), input_precision=PRECISION), scale, softcap, SOFTCAP, NATURAL)
        s = tl.where(seen[None, :], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        anchor = tl.where(new == float("-inf"), 0.0, new)
        w = exponential(s - anchor[:, None], 0, NATURAL)
        alpha = exponential(m - anchor, 0, NATURAL)
        norm = norm * alpha + tl.sum(w, 1)
        vt = kt
        if not SHARED:
            vt = load_listed(values, row, seen, svn, DV, BDV)
        acc = tl.dot(w.to(vt.dtype), vt, acc * alpha[:, None], input_precision=PRECISION)
        m = new
    full = tl.where(norm == 0.0, 1.0, norm)
    acc = acc / full[:, None]
    stats = tl.log2(full) * LN2
    if NATURAL:
        stats += m
    else:
        stats += m * LN2
    at = (b * heads + h).to(tl.int64) * nq + i
    tl.store(lse + at, stats, mask=live)
    d = tl.arange(0, BDV)
    if SHARED:
        d -= first
    inside = live[:, None] & ((d >= 0) & (d < DV))[None, :]
    tl.store(out + at[:, None] * DV + d[None, :], acc.to(out.dtype.element_ty), mask=inside)
