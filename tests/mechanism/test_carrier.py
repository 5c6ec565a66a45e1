"""Masks of recurrent mechanisms: which are understood, what they mean, which are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from manyheads import Causal, Document, PerHead, Window
from manyheads.common.errors import UnsupportedError
from manyheads.engine.scan import scan
from manyheads.mask import Earlier, Full
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Spec, qkv


def declared(*supports):
    """A declaration with some capabilities."""
    return Spec("made-up", fn=scan, reference=scan, paper="none", inputs=qkv(), supports=supports)


BOTH = declared("causal_self", "noncausal_self")
q = torch.zeros(2, 3, 7, 4)


@pytest.mark.parametrize("default", ["causal", "full"])
def test_no_mask_means_the_default(default):
    assert order(BOTH, None, q, default=default) == (default == "causal", None)


@pytest.mark.parametrize(
    ("mask", "causal"),
    [("causal", True), (Causal(), True), ("full", False), (Full(), False), (Causal() & Full(), True)],
)
def test_one_sequence(mask, causal):
    assert order(BOTH, mask, q) == (causal, None)


@pytest.mark.parametrize(
    ("mask", "causal"),
    [
        (Document([3, 0, 4]), False),
        (Document([3, 0, 4]) & Causal(), True),
        (Causal() & Document([3, 0, 4]), True),
        ("causal & document([3, 0, 4])", True),
        (Document([[1, 6], [7, 0]]) & Causal(), True),
    ],
)
def test_packed_documents_give_their_lengths(mask, causal):
    found, lens = order(BOTH, mask, q)
    wanted = [[1, 6], [7, 0]] if lens.dim() == 2 else [3, 0, 4]
    assert found is causal and lens.tolist() == wanted


@pytest.mark.parametrize(
    "mask",
    [
        "causal & window(3)",
        Window(3),
        ~Causal(),
        Document([3, 4]) | Causal(),
        Document([3, 4]) | Earlier([3, 4]),
        Document([3, 4]) & Document([4, 3]) & Causal(),
        Document([3, 4], [5, 6]) & Causal(),
        PerHead([Causal(), Causal(), Full()]),
        torch.ones(7, 7, dtype=torch.bool),
    ],
)
def test_every_other_mask_is_refused(mask):
    with pytest.raises(UnsupportedError, match="made-up does not support mask"):
        order(BOTH, mask, q)


@pytest.mark.parametrize(("one", "other"), [("causal", "full"), ("full", "causal")])
def test_an_order_that_is_not_declared_is_refused(one, other):
    names = {"causal": "causal_self", "full": "noncausal_self"}
    spec = declared(names[one])
    assert order(spec, one, q) == (one == "causal", None)
    with pytest.raises(UnsupportedError, match=f"does not support {names[other]}"):
        order(spec, other, q)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Document([3, 3]), r"mask: documents must sum to the N=7 tokens of q, got \[?6"),
        (Document([[3, 4]] * 2 + [[2, 5]]), "mask: its batch size is 3; q has 2"),
        ("causl", "causl"),
    ],
)
def test_what_does_not_fit_says_so(mask, message):
    with pytest.raises(ValueError, match=message):
        order(BOTH, mask, q)


def test_what_is_no_mask_is_a_type_error():
    with pytest.raises(TypeError, match="mask: expected a Mask, text"):
        order(BOTH, 3, q)


@pytest.mark.parametrize("mask", [None, "full", "document([3, 0, 4])", Document([3, 4]) & Causal()])
def test_visible_pairs_are_what_the_order_says(mask):
    seen = visible(mask, q)[0, 0]
    causal, lens = order(BOTH, mask, q)
    at = torch.arange(7)
    same = torch.ones(7, 7, dtype=torch.bool)
    if lens is not None:
        own = torch.arange(len(lens)).repeat_interleave(lens)
        same = own[:, None] == own[None]
    assert torch.equal(seen, same & (at[:, None] >= at[None]) if causal else same)


def test_a_compiler_takes_packed_documents_and_new_lengths_compile_nothing():
    graphs = []

    def counted(graph, example):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, example)

    def fn(x, mask):
        causal, lens = order(BOTH, mask, x)
        assert causal
        return scan(x, x, x, lens=lens)

    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, backend=counted)
    x = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    for lens in [[3, 4], [1, 6], [5, 2]]:
        mask = Document(lens) & Causal()
        torch.testing.assert_close(compiled(x, mask), fn(x, mask))
    assert len(graphs) == 1


def test_an_undeclared_capability_names_who_has_it():
    with pytest.raises(UnsupportedError, match="supported by: .*exact"):
        order(dataclasses.replace(BOTH), "window(3)", q)
