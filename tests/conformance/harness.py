"""What the conformance tests share: which (mechanism, backend) pairs exist, and how one call is judged."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from manyheads.common.errors import UnsupportedError
from manyheads.spec import Case, Size, Spec, registry
from manyheads.testing import assert_within_budget

ALWAYS = ("reference", "blocked")
"""Backends that run anywhere: a refusal by one of these is a failure, not a reason to skip."""


def pairs() -> Iterator[Any]:
    """Every mechanism on each backend that it names, as test parameters."""
    for slug, spec in sorted(registry().items()):
        for backend in spec.backends or (None,):
            yield pytest.param(spec, backend, id=f"{slug}-{backend}" if backend else slug)


def takes(spec: Spec, name: str) -> bool:
    """Whether the mechanism has a parameter of this name."""
    return name in inspect.signature(spec.fn).parameters


def base(spec: Spec, **changes: Any) -> Size:
    """A small size that the mechanism declares it can do, causal where it can be nothing else."""
    causal = not spec.declares("noncausal_self")
    return dataclasses.replace(Size(causal=causal), **changes)


def with_options(case: Case, **options: Any) -> Case:
    """The same call with more keyword arguments."""
    return case._replace(options=case.options | options)


def call(spec: Spec, backend: str | None, case: Case, **options: Any) -> Any:
    """Calls the mechanism; skips the test where an optional backend refuses this call."""
    chosen = case.options | options | ({} if backend is None else {"backend": backend})
    try:
        return spec.fn(case.q, case.k, case.v, **chosen)
    except UnsupportedError as refusal:
        if backend is None or backend in ALWAYS or f"backend {backend!r}" not in str(refusal):
            raise
        pytest.skip(f"{backend} refuses: {refusal}")


def results(fn: Any, spec: Spec, case: Case, *, lse: bool = True) -> dict[str, Tensor]:
    """Output, lse and all gradients of one function on one call, as far as the mechanism declares them."""
    leaves = {name: getattr(case, name).detach().clone() for name in "qkv"}
    grads = spec.declares("backward")
    for leaf in leaves.values():
        leaf.requires_grad_(grads)
    lse = lse and spec.declares("lse")
    got = fn(*leaves.values(), **case.options, **({"return_lse": True} if lse else {}))
    out = {"out": got.out, "lse": got.lse} if lse else {"out": got}
    if grads:
        generator = torch.Generator().manual_seed(1)
        loss = out["out"].new_zeros((), dtype=torch.float64)
        for value in out.values():
            weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            loss = loss + (value.double().masked_fill(value.isinf(), 0.0) * weight).sum()
        found = torch.autograd.grad(loss, list(leaves.values()))
        out |= {f"grad of {name}": g for name, g in zip(leaves, found, strict=True)}
    return out


def as_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same numbers in another dtype, floating options included."""

    def convert(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    options = {name: convert(value) for name, value in case.options.items()}
    return Case(*(convert(t) for t in case[:3]), options)


def plainly(spec: Spec, backend: str | None) -> Any:
    """The mechanism on a backend as a function of tensors and options."""
    return lambda q, k, v, **options: call(spec, backend, Case(q, k, v, options))


def assert_same(
    spec: Spec, case: Case, ways: dict[str, Any], *, lse: bool = True, origin: Case | None = None
) -> None:
    """Holds each way of computing a call, in value, lse and gradients, to the budget of its reference.

    ``origin`` is the float64 draw that half-precision inputs were rounded from. The lse of half-precision inputs is
    judged against it: torch's fused CPU kernel approximates the exponential to some 5e-5 there, far below
    what the rounding of the inputs moves, and far above float32.
    """
    exact = results(spec.reference, spec, as_dtype(case, torch.float64), lse=lse)
    if origin is not None and "lse" in exact:
        exact["lse"] = results(spec.reference, spec, origin)["lse"]
    plain = results(spec.reference, spec, case, lse=lse)
    for name, way in ways.items():
        for part, value in results(way, spec, case, lse=lse).items():
            assert_within_budget(value, exact[part], plain[part], what=f"{spec.slug}, {name}: {part}")


def assert_conforms(spec: Spec, backend: str | None, case: Case, origin: Case | None = None) -> None:
    """Holds a backend to the budget of the reference; an optional one may have no differentiable lse."""
    lse = backend is None or backend in ALWAYS
    assert_same(spec, case, {backend or "alone": plainly(spec, backend)}, lse=lse, origin=origin)
