"""What a mechanism promises holds, and what it does not declare it refuses."""

from __future__ import annotations

import dataclasses
import functools
import warnings

import pytest
import torch

from manyheads import ALiBi, Attn, Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.spec import CAPABILITIES, registry
from tests.conformance.harness import (
    ALWAYS,
    assert_conforms,
    assert_same,
    base,
    call,
    pairs,
    plainly,
    results,
    takes,
    with_options,
)


@pytest.fixture
def size(spec, seed, device):
    """A small size with the seed of this test."""
    return base(spec, seed=seed, device=device)


def promised(spec, invariance):
    """Skips the test when the mechanism does not promise this."""
    if invariance not in spec.invariances:
        pytest.skip(f"promises no {invariance}")


@pytest.mark.parametrize("causal", [False, True], ids=["noncausal", "causal"])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_packed_documents_equal_a_loop_over_them(spec, backend, causal, size):
    promised(spec, "packed")
    lengths = [5, 0, 41, 1, 23]
    mask = Document(lengths) & Causal() if causal else Document(lengths)
    case = spec.inputs(dataclasses.replace(size, batch=1, queries=sum(lengths)))
    own = "causal" if causal else None

    def loop(q, k, v, **options):
        documents = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
        some = [plainly(spec, backend)(*d, **options | {"mask": own}) for d in documents if d[0].shape[2]]
        if isinstance(some[0], Attn):
            return Attn(*(torch.cat(parts, dim=2) for parts in zip(*some, strict=True)))
        return torch.cat(some, dim=2)

    assert_same(spec, with_options(case, mask=mask), {"packed": plainly(spec, backend), "looped": loop})


@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_padded_keys_may_hold_anything(spec, backend, size, generator):
    promised(spec, "padding")
    case = spec.inputs(dataclasses.replace(size, batch=3, queries=40))
    real = torch.rand(3, 40, generator=generator) < 0.6
    real[1, 17:] = False
    real[2] = False
    real = real.to(size.device)
    hidden = ~real[:, None, :, None]
    k = case.k.masked_fill(hidden, float("nan"))
    v = case.v.masked_fill(hidden, float("inf"))
    padded = with_options(case._replace(k=k, v=v), key_padding=real)
    assert_conforms(spec, backend, padded)
    got = results(plainly(spec, backend), spec, padded)
    assert (got["out"][2] == 0).all()
    if spec.declares("backward"):
        assert (got["grad of k"].masked_select(hidden) == 0).all()
        assert (got["grad of v"].masked_select(hidden) == 0).all()


@pytest.mark.parametrize("axis", ["batch", "heads"])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_permuting_permutes_the_result(spec, backend, axis, size, generator):
    promised(spec, axis)
    case = spec.inputs(dataclasses.replace(size, batch=3, heads=4))
    dim = ("batch", "heads").index(axis)
    order = torch.randperm(case.q.shape[dim], generator=generator).to(size.device)

    def permuted(q, k, v, **options):
        got = plainly(spec, backend)(*(t.index_select(dim, order) for t in (q, k, v)), **options)
        back = order.argsort()
        if isinstance(got, Attn):
            return Attn(*(t.index_select(dim, back) for t in got))
        return got.index_select(dim, back)

    assert_same(spec, case, {"permuted": permuted})


@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_the_same_call_gives_the_same_bits(spec, backend, size):
    case = spec.inputs(dataclasses.replace(size, queries=150, dtype=torch.bfloat16))
    first, second = (results(plainly(spec, backend), spec, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_compiles_to_one_graph(spec, backend, size):
    causal = spec.declares("causal_self")
    case = spec.inputs(dataclasses.replace(size, queries=60, causal=causal))
    more = {} if backend is None else {"backend": backend}
    with torch.no_grad():
        call(spec, backend, case)  # skips here, not inside the compiler, where the backend refuses
    torch._dynamo.reset()

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(q, k, v, options):
        return spec.fn(q, k, v, **options, **more)

    lse = backend is None or backend in ALWAYS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(spec, case, {"compiled": lambda q, k, v, **options: compiled(q, k, v, options)}, lse=lse)


ASKS = {
    "noncausal_self": ({"causal": False}, {}),
    "causal_self": ({"causal": True}, {}),
    "noncausal_cross": ({"keys": 48, "causal": False}, {}),
    "causal_cross": ({"keys": 48, "causal": True}, {}),
    "gqa": ({"heads": 4, "kv_heads": 2}, {}),
    "value_width": ({"value_width": 24}, {}),
    "mask": ({}, {"mask": "causal & window(5)"}),
    "positions": ({}, {"positions": (torch.arange(33), torch.arange(33))}),
    "key_padding": ({}, {"key_padding": torch.ones(2, 33, dtype=torch.bool)}),
    "bias": ({}, {"bias": ALiBi(torch.ones(2))}),
    "softcap": ({}, {"softcap": 5.0}),
    "sink": ({}, {"sink": torch.zeros(2)}),
    "dropout": ({}, {"dropout_p": 0.5}),
    "lse": ({}, {"return_lse": True}),
}
"""From a capability to a call that needs it: changes of the size, and more keyword arguments."""


def undeclared():
    """Every capability that a mechanism could be asked for and does not declare."""
    for slug, spec in sorted(registry().items()):
        for capability, (_, options) in ASKS.items():
            if not spec.declares(capability) and all(takes(spec, name) for name in options):
                yield pytest.param(spec, capability, id=f"{slug}-{capability}")


@pytest.mark.parametrize(("spec", "capability"), undeclared())
def test_what_is_not_declared_is_refused(spec, capability, size):
    changes, options = ASKS[capability]
    case = spec.inputs(dataclasses.replace(size, **changes))
    with pytest.raises(UnsupportedError, match=f"{spec.slug} does not support {capability}"):
        spec.fn(case.q, case.k, case.v, **case.options | options)


@pytest.mark.parametrize("spec", [pytest.param(s, id=slug) for slug, s in sorted(registry().items())])
def test_gradients_are_refused_unless_declared(spec, size):
    if spec.declares("backward"):
        pytest.skip("declares gradients")
    case = spec.inputs(size)
    with pytest.raises(UnsupportedError, match=f"{spec.slug} does not support backward"):
        spec.fn(case.q.requires_grad_(), case.k, case.v, **case.options)


@pytest.mark.parametrize("spec", [pytest.param(s, id=slug) for slug, s in sorted(registry().items())])
def test_an_unknown_backend_suggests_the_nearest(spec, size):
    if not spec.backends:
        pytest.skip("takes no backend")
    case = spec.inputs(size)
    with pytest.raises(ValueError, match="did you mean 'blocked'"):
        spec.fn(case.q, case.k, case.v, **case.options, backend="bloked")


@pytest.mark.parametrize("spec", [pytest.param(s, id=slug) for slug, s in sorted(registry().items())])
def test_formulas_count_what_the_mechanism_does(spec, size):
    small, large = (spec.inputs(dataclasses.replace(size, batch=batch)) for batch in (1, 3))
    for formula in (spec.flops, spec.bytes):
        assert formula(small) > 0 and formula(large) == 3 * formula(small)


def test_every_way_of_asking_is_a_capability():
    assert set(ASKS) < set(CAPABILITIES)
    assert set(CAPABILITIES) - set(ASKS) == {"backward", "decode", "context_parallel"}
