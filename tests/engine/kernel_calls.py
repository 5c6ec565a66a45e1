"""Small calls of the tiled engine's kernels beside the definition, for the tests of this folder."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.engine.configs import WIDTHS, Config, using
from manyheads.engine.tiled import launch, tiled
from manyheads.engine.tiled.configs import KERNELS, KINDS
from manyheads.testing import assert_within_budget


class Inputs(NamedTuple):
    """Queries, keys, values, and what the gradients of output and lse are seeded with, in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    gl: Tensor


def draw(generator, nq=37, nk=53, heads=2, kv_heads=1, d=16, dv=None, batch=1, deviation=1.0):
    """Normal inputs whose logits have a given deviation."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dv = d if dv is None else dv
    q = normal(batch, heads, nq, d) * deviation
    k, v = normal(batch, kv_heads, nk, d), normal(batch, kv_heads, nk, dv)
    return Inputs(q, k, v, normal(batch, heads, nq, dv), normal(batch, heads, nq))


def outcome(inputs, mask, dtype, backend, device="cpu", leaves=None, build=dict, lse=True, **options):
    """Output, lse and the gradients of everything; ``build`` makes keyword arguments from the leaves by name."""
    q, k, v, g, gl = (t.to(device) for t in inputs)
    own = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    wide = torch.promote_types(dtype, torch.float32)
    more = {name: t.to(device, wide).requires_grad_() for name, t in (leaves or {}).items()}
    result = tiled(*own, mask, return_lse=lse, backend=backend, **build(**more), **options)
    out, stats = result if lse else (result, None)
    found = {"out": out.detach()}
    loss = (out * g.to(out.dtype)).sum()
    if lse:
        found["lse"] = stats.detach()
        loss = loss + torch.where(stats == -math.inf, 0.0, stats * gl.to(stats.dtype)).sum()
    every = [*own, *more.values()]
    grads = torch.autograd.grad(loss, every)
    names = ["dq", "dk", "dv", *(f"d{name}" for name in more)]
    return found | dict(zip(names, grads, strict=True))


def agree(inputs, mask, dtype, device="cpu", coarse=None, **options):
    """Asserts that the kernels are within the budget of the definition; with ``coarse``, of one in that dtype."""
    exact = outcome(inputs, mask, torch.float64, "reference", device, **options)
    plain = outcome(inputs, mask, coarse or dtype, "reference", device, **options)
    got = outcome(inputs, mask, dtype, "triton", device, **options)
    for name, value in got.items():
        assert_within_budget(value, exact[name], plain[name], what=name)
    return got


@contextlib.contextmanager
def tiles(bm, bn, device="cpu", **switches):
    """All kernels in tiles of one size."""
    config = Config(bm, bn, 4, 1, **switches)
    arch = launch.architecture(torch.device(device))
    every = {(k, arch, w, size, kind): config for k in KERNELS for w in WIDTHS for size in (2, 4) for kind in KINDS}
    with using(every):
        yield
