"""Small calls of the gather engine beside the definition, for the tests of this folder and of GPUs."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.engine.gather import gather
from manyheads.testing import assert_within_budget, sample_qkv

FULL, WIDE, HALF, BRAIN = torch.float32, torch.float64, torch.float16, torch.bfloat16


class Call(NamedTuple):
    """Inputs in float64, ids, and what the gradients of output and lse are seeded with."""

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    sink: Tensor | None
    g: Tensor
    gl: Tensor
    options: dict

    def run(self, dtype, backend="blocked", device="cpu", **changes):
        """Output, lse and every gradient by name."""
        call = self._replace(**changes)
        leaves = {f"d{n}": t.to(device, dtype).requires_grad_() for n, t in zip("qkv", call[:3], strict=True)}
        sink = None
        if call.sink is not None:
            sink = leaves["dsink"] = call.sink.to(device, torch.promote_types(dtype, FULL)).requires_grad_()
        given = [leaves[n] for n in ("dq", "dk", "dv")]
        found = gather(*given, call.ids.to(device), sink=sink, return_lse=True, backend=backend, **call.options)
        stats = torch.where(found.lse == -math.inf, 0.0, found.lse * call.gl.to(device, found.lse.dtype))
        loss = (found.out * call.g.to(device, found.out.dtype)).sum() + stats.sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"out": found.out.detach(), "lse": found.lse.detach()} | dict(zip(leaves, grads, strict=True))


def some_ids(generator, batch, heads, queries, keys, count, padding=0.3):
    """Different keys in any order, padding anywhere, and one query without any."""
    ids = torch.rand(batch, heads, queries, max(keys, count), generator=generator).argsort(-1)[..., :count]
    ids = ids.masked_fill((torch.rand(ids.shape, generator=generator) < padding) | (ids >= keys), -1)
    if padding:
        ids[:, :, queries // 2] = -1
    return ids


def draw(queries=37, keys=53, count=11, *, heads=4, kv_heads=2, ids_heads=None, batch=1, ids_batch=None, d=16, dv=None,
         sink=False, padding=0.3, deviation=1.0, seed=0, **options):  # fmt: skip
    """A call; ids for each key head and batch entry unless said otherwise."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = sample_qkv(batch, heads, queries, kv_heads=kv_heads, keys=keys, width=d, value_width=dv, dtype=WIDE,
                         deviation=deviation, seed=seed)  # fmt: skip
    ids = some_ids(generator, ids_batch or batch, ids_heads or kv_heads, queries, keys, count, padding)
    seeds = (*q.shape[:3], v.shape[3]), q.shape[:3]
    g, gl = (torch.randn(*shape, generator=generator, dtype=WIDE) for shape in seeds)
    logits = torch.randn(heads, generator=generator, dtype=WIDE) if sink else None
    return Call(q, k, v, ids, logits, g, gl, options)


def agree(call, dtype, backend="blocked", device="cpu"):
    """Asserts that a backend is within the budget of the definition."""
    exact, plain = (call.run(kind, "reference", device) for kind in (WIDE, dtype))
    got = call.run(dtype, backend, device)
    for name, value in got.items():
        assert value.dtype == plain[name].dtype, name
        assert_within_budget(value, exact[name], plain[name], what=name)
    return got
