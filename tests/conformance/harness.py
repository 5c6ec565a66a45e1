"""What the conformance tests share: which (mechanism, backend) pairs exist, and how one call is judged."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
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


def decoders() -> list[Any]:
    """Every mechanism that can take one token after the other."""
    return [pytest.param(spec, id=slug) for slug, spec in sorted(registry().items()) if spec.declares("decode")]


def selectors() -> list[Any]:
    """Every mechanism that selects by content."""
    return [pytest.param(spec, id=slug) for slug, spec in sorted(registry().items()) if spec.selection is not None]


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


def gates_of(spec: Spec, case: Case) -> dict[str, Tensor]:
    """The tensors of a call that the mechanism declares as gates."""
    return {name: case.options[name] for name in spec.gates if isinstance(case.options.get(name), Tensor)}


def on_axis(spec: Spec, options: dict[str, Any], letters: str, change: Any) -> dict[str, Any]:
    """The same keyword arguments, each gate that has one of some axes changed by ``change(gate, dim)``."""
    changed = dict(options)
    for name, axes in spec.gates.items():
        for letter in set(letters) & set(axes):
            if isinstance(options.get(name), Tensor):
                changed[name] = change(options[name], axes.index(letter))
    return changed


def piece(spec: Spec, case: Case, start: int, stop: int) -> Case:
    """The call on some of its tokens."""
    q, k, v = (t[:, :, start:stop] for t in case[:3])
    options = on_axis(spec, case.options, "NQ", lambda gate, dim: gate.narrow(dim, start, stop - start))
    return Case(q, k, v, options)


def in_pieces(spec: Spec, backend: str | None, cuts: list[int], *, stepped: bool = False) -> Any:
    """The mechanism called on one piece of the tokens after the other, carrying the state.

    Args:
        spec: The mechanism.
        backend: Its backend.
        cuts: Where pieces end, ascending; the last piece goes to the end.
        stepped: Do the tokens of the last piece one by one, through ``spec.step``.
    """

    def whole(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        case, state, parts = Case(q, k, v, options), None, []
        borders = [0, *cuts, q.shape[2]]
        if stepped:
            borders.pop()
        for start, stop in itertools.pairwise(borders):
            part = piece(spec, case, start, stop)
            out, state = call(spec, backend, part, state=state, return_state=True)
            parts.append(out)
        for t in range(borders[-1], q.shape[2]):
            out, state = step(spec, case, t, state)
            parts.append(out[:, :, None])
        return torch.cat(parts, dim=2)

    return whole


def step(spec: Spec, case: Case, t: int, state: Any) -> Any:
    """One token of a call through ``spec.step``, with those options that it takes."""
    assert spec.step is not None
    known = inspect.signature(spec.step).parameters
    options = on_axis(spec, case.options, "NQ", lambda gate, dim: gate.select(dim, t))
    options = {name: value for name, value in options.items() if name in known}
    return spec.step(*(x[:, :, t] for x in case[:3]), state, **options)


def results(fn: Any, spec: Spec, case: Case, *, lse: bool = True) -> dict[str, Tensor]:
    """Output, lse and all gradients of one function on one call, as far as the mechanism declares them."""
    leaves = {name: getattr(case, name).detach() for name in "qkv"}
    grads = spec.declares("backward")
    floating = {name: gate for name, gate in gates_of(spec, case).items() if gate.is_floating_point()}
    leaves |= {name: gate.detach() for name, gate in floating.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(grads)
    lse = lse and spec.declares("lse")
    options = case.options | {name: leaves[name] for name in floating}
    got = fn(*(leaves[name] for name in "qkv"), **options, **({"return_lse": True} if lse else {}))
    out = {"out": got.out, "lse": got.lse} if lse else {"out": got}
    if grads:
        generator = torch.Generator().manual_seed(1)
        loss = out["out"].new_zeros((), dtype=torch.float64)
        for value in out.values():
            weight = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            loss = loss + (value.double().masked_fill(value.isinf(), 0.0) * weight).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        out |= {f"grad of {name}": g for name, g in zip(leaves, found, strict=True)}
    return out


def chosen_by(spec: Spec, case: Case) -> dict[str, Any]:
    """What a mechanism selects in a call, as the argument that its reference takes; empty when it selects nothing.

    Two keys whose scores differ by a rounding may be chosen either way: a reference in another precision that chose
    again would judge such a near-tie as an error.
    """
    if spec.selection is None:
        return {}
    with torch.no_grad():
        return {"chosen": spec.selection(*case[:3], **case.options)}


def as_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same numbers in another dtype, floating options included."""

    def convert(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    options = {name: convert(value) for name, value in case.options.items()}
    return Case(*(convert(t) for t in case[:3]), options)


def plainly(spec: Spec, backend: str | None) -> Any:
    """The mechanism on a backend as a function of tensors and options."""
    return lambda q, k, v, **options: call(spec, backend, Case(q, k, v, options))


def by_token(spec: Spec, backend: str | None) -> bool:
    """Whether a backend adds up one token after the other."""
    return spec.step is not None and backend in (None, "reference")


def assert_same(
    spec: Spec,
    case: Case,
    ways: dict[str, Any],
    *,
    lse: bool = True,
    origin: Case | None = None,
    recurrent: bool = False,
) -> None:
    """Holds each way of computing a call, in value, lse and gradients, to the budget of its reference.

    A ``recurrent`` way adds up token by token, and its rounding grows with their number while that of the products in
    the reference does not. It is held to equality in float64 instead; in half precision, where rounding the results
    hides that growth, to the budget of what is in half precision. Chunked forms do both, products inside a chunk and
    sums between chunks: where they miss the budget of the reference, the errors of the two add up to theirs.

    The reference takes what the mechanism selects in this call, if it selects; see :func:`chosen_by`.

    ``origin`` is the float64 draw that half-precision inputs were rounded from. The lse of half-precision inputs is
    judged against it: torch's fused CPU kernel approximates the exponential to some 5e-5 there, far below
    what the rounding of the inputs moves, and far above float32.
    """
    dtype = case.q.dtype
    reference = functools.partial(spec.reference, **chosen_by(spec, case))
    exact = results(reference, spec, as_dtype(case, torch.float64), lse=lse)
    if recurrent and dtype.itemsize > 2:
        for name, way in ways.items():
            for part, value in results(way, spec, as_dtype(case, torch.float64), lse=lse).items():
                close = {"rtol": 1e-10, "atol": 1e-10 * float(exact[part].detach().abs().nan_to_num(posinf=0.0).max())}
                torch.testing.assert_close(value, exact[part], **close, msg=lambda m, n=name, p=part: f"{n}: {p}: {m}")
        return
    if origin is not None and "lse" in exact:
        exact["lse"] = results(reference, spec, origin)["lse"]
    plain = results(reference, spec, case, lse=lse)
    for name, way in ways.items():
        for part, value in results(way, spec, case, lse=lse).items():
            if recurrent and value.dtype != dtype:
                continue
            what = f"{spec.slug}, {name}: {part}"
            try:
                assert_within_budget(value, exact[part], plain[part], what=what)
            except AssertionError:
                if recurrent or spec.step is None or "reference" not in spec.backends:
                    raise
                token_by_token = results(plainly(spec, "reference"), spec, case, lse=lse)
                both = (plain[part] - exact[part]).abs() + (token_by_token[part] - exact[part]).abs()
                assert_within_budget(value, exact[part], exact[part] + both, what=what)


def assert_conforms(spec: Spec, backend: str | None, case: Case, origin: Case | None = None) -> None:
    """Holds a backend to the budget of the reference; an optional one may have no differentiable lse."""
    lse = backend is None or backend in ALWAYS
    ways, recurrent = {backend or "alone": plainly(spec, backend)}, by_token(spec, backend)
    assert_same(spec, case, ways, lse=lse, origin=origin, recurrent=recurrent)
