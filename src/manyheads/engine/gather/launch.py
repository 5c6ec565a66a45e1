"""The Triton backend: what it refuses, how lists are inverted, and the launches of a problem."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..configs import Config, choose
from ..gpu import architecture, interpreted, launch, padded, readable, refuse_inputs, row_products, tf32
from ..gpu import refuse as refuse
from .problem import Grads, Problem
from .rows import columns_inside

KERNELS = ("listed", "listed_rows", "listed_keys")


def refuse_call(q: Tensor, v: Tensor, ids: Tensor) -> list[str]:
    """Why the kernels cannot take some tensors; empty when they can."""
    reasons = refuse_inputs(q, v)
    if ids.shape[2] * ids.shape[3] >= 2**31:
        reasons.append(f"at most 2^31 ids a head, got {ids.shape[2]} x {ids.shape[3]}")
    return reasons


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-normaliser of a problem."""
    run = _Run(p)
    out = run.v.new_empty(*p.q.shape[:3], p.v.shape[3])
    lse = torch.empty(p.q.shape[:3], dtype=torch.float32, device=p.q.device)
    sink = run.nothing if p.sink is None else p.sink.to(torch.float32).contiguous()
    run.by_queries("listed", {"out": out, "lse": lse, "sink": sink, "SINK": p.sink is not None})
    return out.to(p.v.dtype), lse


def backward(p: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Grads:
    """Gradients of a problem: queries by themselves, keys and values by the inverted lists, without atomics."""
    run = _Run(p, dout)
    clean = lse.masked_fill(lse == -math.inf, math.inf)
    delta = _delta(p, run, out, clean)
    if dlse is not None:
        delta = delta - dlse.to(delta.dtype)
    delta = delta.masked_fill(lse == -math.inf, 0.0)  # whatever came in for rows without ids
    dsink = None
    if p.sink is not None:
        dsink = -(torch.exp(p.sink.double()[:, None] - clean) * delta).sum((0, 2)).to(p.sink.dtype)
    dq, dk, dv = (torch.empty(t.shape, dtype=run.q.dtype, device=t.device) for t in (p.q, p.k, p.v))
    given = {"lse": clean, "delta": delta}
    run.by_queries("listed_rows", given | {"dq": dq, "WHAT": 0})
    run.by_keys(given | {"dk": dk, "dv": dv})
    dq, dk, dv = (g.to(p.q.dtype) for g in (dq, dk, dv))
    return Grads(dq, dk, dv, dsink)


def _delta(p: Problem, run: _Run, out: Tensor, lse: Tensor) -> Tensor:
    """``sum_j w_ij (dout_i . v_j)``: ``dout . out``, or over the scores where the rounding of ``out`` would show."""
    if out.dtype.itemsize == 2 and p.sink is not None:  # whose gradient adds whole rows up
        delta = torch.empty_like(lse)
        run.by_queries("listed_rows", {"lse": lse, "delta": delta, "dq": run.nothing, "WHAT": 1})
        return delta
    assert run.dout is not None
    return row_products(run.dout, readable(out).contiguous()) if out.numel() else torch.zeros_like(lse)


def inverted(ids: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """Which queries list each key.

    Args:
        ids: ``(B, H, Nq, K)``.
        keys: Number of keys.

    Returns:
        int32 ``(B, H, Nq * K)``: queries, sorted by the key that they list, then as they come; and int32
        ``(B, H, keys + 1)``: where those of each key begin.

    Example:
        >>> queries, starts = inverted(torch.tensor([[[[2, 0], [-1, 2]]]]), 3)
        >>> queries[0, 0, :3].tolist(), starts.tolist()
        ([0, 0, 1], [[[0, 1, 1, 3]]])
    """
    flat = ids.flatten(2)
    found = torch.where((flat >= 0) & (flat < keys), flat, keys).sort(dim=-1, stable=True)
    borders = torch.arange(keys + 1, device=ids.device, dtype=flat.dtype).expand(*flat.shape[:2], -1).contiguous()
    starts = torch.searchsorted(found.values, borders)
    return (found.indices // max(1, ids.shape[3])).to(torch.int32), starts.to(torch.int32)


class _Run:
    """The launches of one problem, and what they share."""

    def __init__(self, p: Problem, dout: Tensor | None = None) -> None:
        self.p = p
        self.q, self.k, self.v = (readable(t) for t in (p.q, p.k, p.v))
        self.dout = None if dout is None else readable(dout)
        self.ids = p.ids.to(torch.int32).contiguous()
        self.nothing = torch.empty(1, device=p.q.device)  # stands for what is not there; never read
        d, dv = p.q.shape[3], p.v.shape[3]
        inside = columns_inside(p)
        # one load instead of two, unless products would grow by more than that saves
        self.shared = inside is not None and padded(d) <= 2 * padded(dv)
        self.arguments: dict[str, Any] = {
            "q": self.q, "k": self.k, "v": self.v, "ids": self.ids, "ids_b": self._step(0), "ids_h": self._step(1),
            "nq": p.q.shape[2], "nk": p.k.shape[2], "width": p.ids.shape[3], "heads": p.q.shape[1],
            "group": p.group, "units": p.units, "share": p.units // max(1, p.k.shape[1]),
            "first": inside if self.shared else 0, "scale": float(p.scale), "softcap": float(p.softcap),
            "D": d, "BD": padded(d), "DV": dv, "BDV": padded(d if self.shared else dv), "SHARED": self.shared,
            "SOFTCAP": p.softcap > 0, "PRECISION": "tf32" if tf32(p.q) else "ieee",
        }  # fmt: skip
        tensors = [("sq", self.q), ("sk", self.k), ("sv", self.v)]
        if self.dout is not None:
            self.arguments["dout"] = self.dout
            tensors.append(("sd", self.dout))
        for name, t in tensors:
            self.arguments |= {f"{name}{axis}": step for axis, step in zip("bhn", t.stride()[:3], strict=True)}

    def _step(self, dim: int) -> int:
        """Ids between batch entries or units; 0 where all share them."""
        return self.ids.stride(dim) if self.ids.shape[dim] > 1 else 0

    def by_queries(self, kernel: str, given: dict[str, Any]) -> None:
        """Launches a kernel whose programs own a query of some heads."""
        p, config = self.p, _config(kernel, self.p)
        rows = min(config.bm, padded(p.group))
        tiles = -(-p.group // rows)
        programs = p.q.shape[0] * p.units * tiles * p.q.shape[2]
        if programs:
            fixed = {"tiles": tiles, "ROWS": rows, "BN": config.bn}
            launch(getattr(_kernels(), kernel), (programs,), self.arguments | fixed | given, config)

    def by_keys(self, given: dict[str, Any]) -> None:
        """Launches the kernel whose programs own a key."""
        p, config = self.p, _config("listed_keys", self.p)
        b, hkv, nk, _ = p.k.shape
        if not b * hkv * nk:
            return
        queries, starts = inverted(self.ids, nk)
        steps = [starts.stride(i) if starts.shape[i] > 1 else 0 for i in (0, 1)]
        fixed = {"queries": queries, "starts": starts, "starts_b": steps[0], "starts_h": steps[1], "ROWS": config.bm}
        fixed["BDV"] = padded(p.v.shape[3])
        launch(_kernels().listed_keys, (b * hkv * nk,), self.arguments | fixed | given, config)


@functools.cache
def _kernels() -> Any:
    from . import kernels

    return kernels


def _config(kernel: str, p: Problem) -> Config:
    if interpreted() and kernel == "listed_rows":
        # numpy rounds products of different shapes differently; in one shape, weights agree with their lse as on a GPU
        kernel = "listed"
    width = max(p.q.shape[3], p.v.shape[3])
    return choose(kernel, architecture(p.q.device), width, p.q.element_size(), "lists")
