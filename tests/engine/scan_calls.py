"""Small calls of the scan engine's kernels beside the definition, for the tests of this folder and of GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from manyheads.engine.scan import State, scan
from manyheads.testing import assert_within_budget

FULL, WIDE = torch.float32, torch.float64

KINDS = {
    "plain": {},
    "head": {"decay": "head"},
    "token": {"decay": "token"},
    "plain sum": {"normalise": "sum"},
    "token abs": {"decay": "token", "normalise": "abs"},
    "gate": {"gate": True},
    "head gate": {"decay": "head", "gate": True, "normalise": "sum"},
    "mlstm": {"decay": "token", "gate": True, "normalise": "max1"},
}


@dataclass
class Call:
    """Inputs in float64, and what a call of one kind takes besides."""

    qkv: list[Tensor]
    logs: dict[str, Tensor]
    state: list[Tensor | None]
    seeds: list[Tensor]
    normalise: str
    options: dict = field(default_factory=dict)

    def run(self, dtype, backend, device="cpu"):
        """Output, final state and every gradient by name; logs and states are at least float32."""
        wide = torch.promote_types(dtype, FULL)
        qkv = [t.to(device, dtype).requires_grad_() for t in self.qkv]
        logs = {n: t.to(device, wide).requires_grad_() for n, t in self.logs.items()}
        parts = [None if t is None else t.to(device, wide) for t in self.state]
        given = [t.requires_grad_() for t in parts[:2] if t is not None]
        state = None if parts[0] is None else State(*parts)
        out, last = scan(*qkv, **logs, state=state, normalise=self.normalise or False, scale=0.7, return_state=True,
                         backend=backend, **self.options)  # fmt: skip
        results = [t for t in (out, last.S, last.n) if t is not None]
        loss = sum((r * s.to(device, r.dtype)).sum() for r, s in zip(results, self.seeds, strict=False))
        leaves = {f"d{n}": t for n, t in zip("qkv", qkv, strict=True)} | {f"d{n}": t for n, t in logs.items()}
        leaves |= {f"dstate{i}": t for i, t in enumerate(given)}
        grads = torch.autograd.grad(loss, list(leaves.values()))
        found = {n: t.detach() for n, t in zip(("out", "S", "n"), results, strict=False)}
        return found | ({} if last.m is None else {"m": last.m}) | dict(zip(leaves, grads, strict=True))


def draw(kind, n=37, *, d=20, dv=7, heads=4, kv_heads=2, batch=1, state=True, seed=0, **options):
    """A call of one kind; with a divisor that might vanish, weights have one sign."""
    generator, kind = torch.Generator().manual_seed(seed), KINDS[kind]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=WIDE)

    q, k, v = normal(batch, heads, n, d), normal(batch, kv_heads, n, d), normal(batch, kv_heads, n, dv)
    logs = {}
    if "decay" in kind:
        logs["decay"] = -normal(*((heads,) if kind["decay"] == "head" else (batch, heads, n))).abs()
    if "gate" in kind:
        logs["gate"] = 2 * normal(batch, heads, n)
    norm = kind.get("normalise", "")
    if norm:
        q, k = q.abs(), k.abs() * (-1 if norm == "abs" else 1)
    given = [None, None, None]
    if state:
        sums = normal(batch, heads, d).abs() * (-1 if norm == "abs" else 1) if norm else None
        given = [normal(batch, heads, d, dv), sums, normal(batch, heads) if "gate" in kind else None]
    seeds = [normal(batch, heads, n, dv), normal(batch, heads, d, dv), normal(batch, heads, d)]
    return Call([q, k, v], logs, given, seeds, norm, options)


def agree(call, dtype, device="cpu"):
    """Kernels are within the budget of the definition; what half precision leaves wide, of one rounding."""
    given = [t.to(dtype).double() for t in (*call.qkv, call.seeds[0])]
    call = replace(call, qkv=given[:3], seeds=[given[3], *call.seeds[1:]])
    exact, plain = (call.run(kind, "reference", device) for kind in (WIDE, dtype))
    got = call.run(dtype, "triton", device)
    assert set(got) == set(exact)
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        coarse = exact[name].to(dtype) if dtype != FULL and value.dtype == FULL else plain[name]
        assert_within_budget(value, exact[name], coarse, what=name)
    return got
