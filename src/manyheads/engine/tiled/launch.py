"""The Triton backend: what it refuses, which configuration it takes, and the launches of a problem."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UnsupportedError
from ...mask.layout import TileLayout
from ..configs import Config, choose
from ..gpu import architecture, interpreted, launch, padded, readable, refuse_inputs, row_products, tf32
from ..gpu import refuse as refuse
from . import configs, entries, slots
from .bias import Block, Term
from .order import by_keys as keys_outermost
from .problem import Grads, Problem
from .rows import Rows, by_keys, by_queries, fitting, packs, work_of

_STRIP_BYTES = 256 << 20  # score gradients that are held at once for the gradients of a bias


def refuse_call(q: Tensor, v: Tensor, terms: Any = (), weight: str = "softmax") -> list[str]:
    """Why the kernels cannot take some tensors or a weight; empty when they can."""
    reasons = [f"no kernel has the weight {weight!r}; use backend='blocked'"] if weight == "cone" else []
    return reasons + refuse_inputs(q, v) + slots.refuse(terms)


def kind_of(bias: Iterable[str], softcap: float, dropout_p: float, skip_threshold: float, weight: str) -> str:
    """The kind of configuration that a call takes.

    Args:
        bias: Kinds of the bias's terms.
        softcap, dropout_p, skip_threshold: 0 for none.
        weight: Name of the weight.
    """
    kinds = set(bias)
    pair = bool(kinds & {"pair", "per_key"})
    used = ("alibi" in kinds or softcap > 0, "relative" in kinds, "per_block" in kinds, dropout_p > 0)
    features = sum(used) + (skip_threshold > 0) + (weight != "softmax")
    return configs.kind_of(not (pair or features), features, pair)


def tile_of(q: Tensor, v: Tensor, kind: str, backward: bool, skips: bool = False) -> tuple[int, int]:
    """The tile in which a mask should be laid out for a call; where tiles are skipped, one for all kernels."""
    if skips:
        rows = [_config(kernel, q, v, kind) for kernel in configs.KERNELS]
        return min(c.bm for c in rows), min(c.bn for c in rows)
    config = _config("rows_backward" if backward else "forward", q, v, kind)
    return config.bm, config.bn


def describe(q: Tensor, v: Tensor, kind: str) -> str:
    """The configurations of a call in words, for ``explain``."""
    parts = []
    for kernel in configs.KERNELS:
        c = _config(kernel, q, v, kind)
        parts.append(f"{kernel} {c.bm} x {c.bn}, {c.warps} warps, {c.stages} stages ({c.source})")
    return f"{kind} kernels for {architecture(q.device)}: " + "; ".join(parts)


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser of a problem."""
    b, h, nq, _ = p.q.shape
    _check_origin(p)
    out = p.v.new_empty(b, h, nq, p.v.shape[3], dtype=p.result(p.v.dtype))
    lse = torch.empty(b, h, nq, dtype=torch.float32, device=p.q.device)
    if not out.numel() or not p.k.shape[2]:
        return out.zero_(), _empty_lse(p, lse)
    if keys_outermost(p, "triton"):
        return entries.forward(p, lambda kernel: _config(kernel, p.q, p.v, "plain"))
    call = _Call(p, "forward", p.layout)
    values = out if p.wide or p.v.dtype == call.v.dtype else torch.empty_like(out, dtype=call.v.dtype)
    config = call.config
    turn = _programs(p.q.device, config) if config.persistent else 0
    work = call.work(turn)
    sink = call.nothing if p.sink is None else p.sink.to(torch.float32).contiguous()
    # what is skipped depends on scores only, so there the sink comes after them
    late = p.sink is not None and p.skip_threshold > 0
    given = {"out": values, "lse": lse, "sink": sink, "work": work, "total": len(work)}
    given["SINK"] = p.sink is not None and not late
    # the interpreter knows no assembly
    exp = 0 if interpreted() and config.exp > 1 else config.exp
    # skipping compares with the true maximum
    rescale = 0 if p.skip_threshold else config.rescale
    given |= {"EXP": exp, "RESCALE": rescale, "PERSISTENT": config.persistent > 0}
    call.launch(_kernels().forward, min(turn or len(work), len(work)), given)
    if late:
        wider = torch.logaddexp(lse, sink[:, None])
        values *= torch.exp(lse - wider.masked_fill(wider == -math.inf, 0.0))[..., None]
        lse = wider
    return out.copy_(values) if values is not out else out, lse


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of a problem: queries by query tiles, keys and values by key tiles, without atomics."""
    _check_origin(p)
    dq, dk, dv = (torch.empty(t.shape, dtype=p.result(t.dtype), device=t.device) for t in (p.q, p.k, p.v))
    if not p.q.shape[:3].numel() or not p.k.shape[2] or not p.k.shape[:2].numel():
        return _no_grads(p)
    dout = dout if dout.stride(3) == 1 else dout.contiguous()
    rows = _Call(p, "rows_backward", p.layout, dout)
    delta = _delta(p, rows, out, lse, dlse)
    lse = lse.masked_fill(lse == -math.inf, math.inf) if p.weight.normalised else torch.zeros_like(lse)
    dsink = None
    if p.sink is not None:
        share = torch.exp(p.sink.double()[:, None] - lse)
        dsink = -(share * delta).sum((0, 2)).to(p.sink.dtype)
    if keys_outermost(p, "triton"):
        assert rows.dout is not None
        found = entries.backward(p, lse, delta, rows.dout, lambda kernel: _config(kernel, p.q, p.v, "plain"))
        return Grads(*found, dsink)
    given: dict[str, Any] = {"lse": lse, "delta": delta}
    skipped = rows.nothing
    if p.skip_threshold:
        skipped = torch.zeros(*p.q.shape[:2], *rows.layout.grid, dtype=torch.uint8, device=p.q.device)
    kept = p.wide or rows.q.dtype == p.q.dtype
    got = [g if kept else torch.empty_like(g, dtype=rows.q.dtype) for g in (dq, dk, dv)]
    rows.rows_pass(0, given | {"dq": got[0], "skipped": skipped})
    keys = _Call(p, "keys_backward", rows.layout if p.skip_threshold else p.layout, dout)
    work = keys.work()
    keys.launch(
        _kernels().keys_backward,
        len(work),
        given | {"dk": got[1], "dv": got[2], "skipped": skipped, "work": work, "total": len(work)},
    )
    dq, dk, dv = (g if g is t else t.copy_(g) for g, t in zip(got, (dq, dk, dv), strict=True))
    return Grads(dq, dk, dv, dsink, _term_grads(p, rows, given))


def _delta(p: Problem, rows: _Call, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """``sum_j w_ij (dout_i . v_j)`` less the gradient of ``lse``.

    It equals ``dout . out``; where whole rows of it are summed (gradients of a bias or a sink) the rounding of a
    half-precision output would show, so there it is summed over the scores themselves.
    """
    if not p.weight.normalised:
        return torch.zeros_like(lse)
    if out.dtype.itemsize == 2 and p.weight.softmax and (p.sink is not None or (p.terms and p.bias_grads)):
        delta = torch.zeros_like(lse)
        clean = lse.masked_fill(lse == -math.inf, math.inf)
        rows.rows_pass(1, {"lse": clean, "delta": delta, "dq": rows.nothing, "skipped": rows.nothing})
    else:
        dout = rows.dout
        assert dout is not None
        delta = row_products(dout, readable(out).contiguous())
    if dlse is not None:
        delta = delta - dlse.to(delta.dtype)
    return delta.masked_fill(lse == -math.inf, 0.0)  # whatever came in for rows that see nothing


def _term_grads(p: Problem, rows: _Call, given: dict[str, Any]) -> list[Tensor]:
    """Gradients of the biases from strips of score gradients, by the terms' own rule."""
    totals = [torch.zeros_like(t.tensor, dtype=t.total(torch.float32)) for t in p.terms]
    if p.terms and p.bias_grads:
        (b, h, nq, _), nk, bm = p.q.shape, p.k.shape[2], rows.layout.tile[0]
        tiles = max(1, _STRIP_BYTES // (4 * b * h * nk * bm))
        cols = torch.arange(nk, device=p.q.device)
        for start in range(0, rows.layout.grid[0], tiles):
            row0, row1 = start * bm, min((start + tiles) * bm, nq)
            ds = torch.zeros(b, h, row1 - row0, nk, dtype=torch.float32, device=p.q.device)
            strip = {"ds": ds, "row0": row0, "strip": row1 - row0, "dq": rows.nothing, "skipped": rows.nothing}
            rows.rows_pass(2, given | strip, slice(start, start + tiles))
            at = Block(slice(0, b), slice(0, h), slice(row0, row1), cols, p.q_pos[:, row0:row1], p.k_pos)
            for term, total in zip(p.terms, totals, strict=True):
                term.accumulate(total, ds, at)
    return [total.to(p.term_result(t)) for total, t in zip(totals, p.terms, strict=True)]


class _Call:
    """One kernel on one problem: its configuration, its layout, and the arguments that all kernels share."""

    def __init__(self, p: Problem, kernel: str, layout: TileLayout, dout: Tensor | None = None) -> None:
        self.p, self.name = p, kernel
        kind = kind_of((t.kind for t in p.terms), p.softcap, p.dropout_p, p.skip_threshold, p.weight.name)
        self.config = _config(kernel, p.q, p.v, kind)
        self.layout = fitting(layout, (self.config.bm, self.config.bn), p.own_tiles, p.skip_threshold > 0)
        device = p.q.device
        keys = kernel == "keys_backward"
        self.rows: Rows = (by_keys if keys else by_queries)(self.layout, device)
        # heads of a pack would be skipped together
        self.pack = 1 if p.skip_threshold else packs(self.layout, p.group)
        self.q, self.k, self.v = (readable(t) for t in (p.q, p.k, p.v))
        self.dout = None if dout is None else readable(dout)
        self.slots = slots.slots_of([_replaced(t) for t in p.terms] if interpreted() else p.terms)
        self.nothing = torch.empty(1, device=device)  # stands for what is not there; never read

    def work(self, turn: int = 0) -> Tensor:
        """The rows of tiles in the order in which programs take them."""
        b, h = self.p.q.shape[:2]
        keys = self.name == "keys_backward"
        heads = h // (self.p.group if keys else self.pack)
        size = (self.q.shape[3] + self.v.shape[3]) * self.q.element_size()
        # heads of one group share keys and values
        near = size * (self.p.q.shape[2] * self.p.group if keys else self.p.k.shape[2] * self.pack // self.p.group)
        return work_of(self.layout, heads, b, near, self.p.q.device, keys=keys, turn=turn)

    def rows_pass(self, what: int, given: dict[str, Any], some: slice | None = None) -> None:
        """Runs ``rows_backward`` for one of its results, over all rows of tiles or over some."""
        work = self.work()
        if some is not None:
            tiles = self.layout.grid[0]
            rows = torch.arange(tiles, dtype=torch.int32, device=work.device)[some]
            every = torch.arange(len(work) // tiles, dtype=torch.int32, device=work.device)
            work = (every[:, None] * tiles + rows).flatten()
        given = {"ds": self.nothing, "row0": 0, "strip": 0} | given
        self.launch(_kernels().rows_backward, len(work), given | {"work": work, "total": len(work), "WHAT": what})

    def launch(self, kernel: Any, programs: int, given: dict[str, Any]) -> None:
        """Calls a kernel with what it shares with the others and what is its own."""
        arguments = self._shared() | given
        launch(kernel, (programs,), arguments, self.config)

    def _shared(self) -> dict[str, Any]:
        p, rows = self.p, self.rows
        bm, bn = self.layout.tile
        d, dv = p.q.shape[3], p.v.shape[3]
        fast = p.weight.softmax and p.scale > 0 and not (p.terms or p.softcap)
        arguments: dict[str, Any] = {"q": self.q, "k": self.k, "v": self.v}
        tensors = [("sq", self.q), ("sk", self.k), ("sv", self.v)]
        if self.dout is not None:
            arguments["dout"] = self.dout
            tensors.append(("sd", self.dout))
        for name, t in tensors:
            arguments |= {f"{name}{axis}": step for axis, step in zip("bhn", t.stride()[:3], strict=True)}
        arguments |= {
            "rows": rows.rows, "first": rows.first, "count": rows.count, "mask_id": rows.mask_id, "bits": rows.bits,
            "index": rows.index, "index_b": rows.steps[0], "index_h": rows.steps[1], "width": rows.width,
            "IDS": rows.width > 0, "IDS_MASKED": rows.masked,
        }  # fmt: skip
        arguments |= _positions(p, self.nothing) | self.slots.arguments(self.nothing, p.scale, p.softcap)
        arguments |= {
            "nq": p.q.shape[2], "nk": p.k.shape[2], "heads": p.q.shape[1], "group": p.group, "scale": float(p.scale),
            "softcap": float(p.softcap), "dropped": int(p.dropout_p * 2**31),
            "seed": ((p.seed ^ (p.seed >> 32)) & 0x7FFFFFFF) + p.origin[0], "keep_scale": 1.0 / (1.0 - p.dropout_p),
            "floor": math.log(p.skip_threshold) if p.skip_threshold else 0.0,
        }  # fmt: skip
        return arguments | {
            "D": d, "BD": padded(d), "DV": dv, "BDV": padded(dv), "BM": bm, "BN": bn, "PACK": self.pack,
            "ROWS": padded(bm * self.pack), "COLS": padded(bm * self.pack), "FAST": fast, "WEIGHT": p.weight.name,
            "SOFTCAP": p.softcap > 0, "DROPOUT": p.dropout_p > 0, "SKIP": p.skip_threshold > 0,
            "PRECISION": "tf32" if tf32(p.q) else "ieee",
        }  # fmt: skip


def _positions(p: Problem, nothing: Tensor) -> dict[str, Any]:
    """Logical positions as int32, where something reads them."""
    if not (p.terms or p.dropout_p):
        return {"q_pos": nothing, "k_pos": nothing, "q_pos_b": 0, "k_pos_b": 0}
    found: dict[str, Any] = {}
    for name, pos in (("q_pos", p.q_pos), ("k_pos", p.k_pos)):
        found[name] = pos.to(p.q.device, torch.int32).contiguous()
        found[f"{name}_b"] = 0 if pos.shape[0] == 1 else pos.shape[1]
    return found


def _replaced(term: Term) -> Term:
    return replace(term, tensor=readable(term.tensor))  # type: ignore[type-var]


def _check_origin(p: Problem) -> None:
    if p.dropout_p and p.origin[1]:
        raise UnsupportedError(
            f"backend 'triton': its dropout counts heads from 0, and this call begins at head {p.origin[1]} of a "
            "larger one; use backend='blocked'"
        )


def _empty_lse(p: Problem, lse: Tensor) -> Tensor:
    """What rows without keys have: nothing, or the sink alone."""
    if p.sink is None:
        return lse.fill_(-math.inf)
    return lse.copy_(p.sink.to(lse.dtype)[None, :, None].expand_as(lse))


def _no_grads(p: Problem) -> Grads:
    zero = [torch.zeros_like(t, dtype=p.result(t.dtype)) for t in (p.q, p.k, p.v)]
    sink = None if p.sink is None else torch.zeros_like(p.sink)
    terms = [torch.zeros_like(t.tensor, dtype=p.term_result(t)) for t in p.terms]
    return Grads(zero[0], zero[1], zero[2], sink, terms)


@functools.cache
def _kernels() -> Any:
    from . import kernels

    return kernels


def _config(kernel: str, q: Tensor, v: Tensor, kind: str) -> Config:
    if interpreted():
        # numpy rounds products of different shapes differently; in one shape, weights agree with their lse as on a GPU
        kernel = "forward"
    return choose(kernel, architecture(q.device), max(q.shape[3], v.shape[3]), q.element_size(), kind)


def _programs(device: torch.device, config: Config) -> int:
    """Programs of a persistent launch."""
    if device.type == "cpu":
        return 4 * config.persistent
    return torch.cuda.get_device_properties(device).multi_processor_count * config.persistent
