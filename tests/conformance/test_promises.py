"""What a mechanism promises holds, and what it does not declare it refuses."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import warnings

import pytest
import torch

from manyheads import ALiBi, Attn, Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.spec import CAPABILITIES, Case, registry, sizes_of
from tests.conformance.harness import (
    ALWAYS,
    assert_conforms,
    assert_same,
    base,
    by_token,
    call,
    decoders,
    in_pieces,
    on_axis,
    pairs,
    piece,
    plainly,
    results,
    step,
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
    if not spec.declares("causal_self" if causal else "noncausal_self"):
        pytest.skip("declares no order of this kind")
    lengths = [5, 0, 41, 1, 23]
    mask = Document(lengths) & Causal() if causal else Document(lengths)
    case = spec.inputs(dataclasses.replace(size, batch=1, queries=sum(lengths), causal=causal))
    own = "causal" if causal else "full"

    def loop(q, k, v, **options):
        ends = list(itertools.accumulate(lengths, initial=0))
        whole = Case(q, k, v, options | {"mask": own})
        documents = [piece(spec, whole, *span) for span in itertools.pairwise(ends) if span[0] < span[1]]
        some = [call(spec, backend, document) for document in documents]
        if isinstance(some[0], Attn):
            return Attn(*(torch.cat(parts, dim=2) for parts in zip(*some, strict=True)))
        return torch.cat(some, dim=2)

    ways = {"packed": plainly(spec, backend), "looped": loop}
    assert_same(spec, with_options(case, mask=mask), ways, recurrent=by_token(spec, backend))


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
        options = on_axis(spec, options, ("B", "HG")[dim], lambda gate, at: gate.index_select(at, order))
        got = plainly(spec, backend)(*(t.index_select(dim, order) for t in (q, k, v)), **options)
        back = order.argsort()
        if isinstance(got, Attn):
            return Attn(*(t.index_select(dim, back) for t in got))
        return got.index_select(dim, back)

    assert_same(spec, case, {"permuted": permuted}, recurrent=by_token(spec, backend))


@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_pieces_that_carry_the_state_equal_one_call(spec, backend, size, seed):
    promised(spec, "split")
    tokens = 90
    case = spec.inputs(dataclasses.replace(size, queries=tokens, causal=True))
    draw = random.Random(seed)
    cut = draw.randint(2, tokens - 2)
    ways = {
        "a piece without tokens first": in_pieces(spec, backend, [0, cut]),
        "pieces of no and one token": in_pieces(spec, backend, [cut, cut, cut + 1]),
        "many pieces": in_pieces(spec, backend, sorted(draw.sample(range(1, tokens), 6))),
    }
    assert_same(spec, case, ways, recurrent=by_token(spec, backend))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("spec", decoders())
def test_steps_equal_one_call(spec, dtype, size, seed):
    tokens = 20
    case = spec.inputs(dataclasses.replace(size, queries=tokens, dtype=dtype, causal=True))
    backend = spec.backends[0] if spec.backends else None
    cut = random.Random(seed).randint(2, tokens - 2)
    ways = {
        "steps": in_pieces(spec, backend, [], stepped=True),
        "a call, then steps": in_pieces(spec, backend, [cut], stepped=True),
    }
    assert_same(spec, case, ways, recurrent=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("spec", decoders())
def test_steps_keep_shapes_and_dtypes(spec, dtype, size):
    heads = {"heads": 4, "kv_heads": 2} if spec.declares("gqa") else {}
    widths = {"value_width": 24} if spec.declares("value_width") else {}
    case = spec.inputs(dataclasses.replace(size, queries=4, dtype=dtype, causal=True, **heads, **widths))
    backend = spec.backends[0] if spec.backends else None
    with torch.no_grad():
        whole, state = call(spec, backend, case, return_state=True)
        out, after = step(spec, case, 3, state)
    assert out.shape == (*case.q.shape[:2], case.v.shape[3]) and out.dtype == whole.dtype == dtype
    assert type(after) is type(state)
    for part, old in zip(after, state, strict=True):
        if isinstance(part, torch.Tensor):
            assert part.dtype == old.dtype


@pytest.mark.parametrize("spec", [pytest.param(s, id=slug) for slug, s in sorted(registry().items()) if s.gates])
def test_gates_are_drawn_with_the_axes_that_they_declare(spec, size):
    heads = {"heads": 4, "kv_heads": 2} if spec.declares("gqa") else {}
    changed = dataclasses.replace(size, batch=3, queries=7, **heads)
    case = spec.inputs(changed)
    for name, letters in spec.gates.items():
        assert takes(spec, name), name
        assert case.options[name].shape == tuple(sizes_of(changed)[letter] for letter in letters), name


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
        ways = {"compiled": lambda q, k, v, **options: compiled(q, k, v, options)}
        assert_same(spec, case, ways, lse=lse, recurrent=by_token(spec, backend))


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
    if capability == "noncausal_cross" and not spec.declares("noncausal_self"):
        capability = "(noncausal_self|noncausal_cross|causal_cross)"  # the order alone is reason enough, or the lengths
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
