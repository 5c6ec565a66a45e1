"""Boxes of a neighbourhood: they hold every pair once, and give what tiles and the plain definition give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyheads as mh
from manyheads import Neighborhood, attention
from manyheads.engine.tiled import boxes, boxing, tiled
from manyheads.engine.tiled.op import op
from manyheads.engine.tiled.problem import AUTO
from manyheads.mechanism import exact
from manyheads.testing import assert_within_budget, nan_poisoned, sample_qkv
from tests.mask import cases

MASKS = [
    Neighborhood(60, 7, dilation=3),
    Neighborhood(61, 8, stride=3, causal=True),
    Neighborhood((11, 13), (5, 4)),
    Neighborhood((12, 14), (6, 4), stride=(6, 2)),
    Neighborhood((13, 10), (4, 3), dilation=(3, 2)),
    Neighborhood((10, 12), (4, 5), causal=(True, False)),
    Neighborhood((5, 7, 6), (3, 4, 2), stride=(1, 2, 2), dilation=(1, 1, 3), causal=(True, False, False)),
]


@pytest.fixture(params=[True, False], ids=["fused", "passes"])
def way(request, monkeypatch):
    """Both ways of computing a box, whichever the machine prefers."""
    monkeypatch.setattr(boxes, "_fused_wins", lambda dtype: request.param)


@pytest.fixture
def in_boxes(monkeypatch):
    """Puts every neighbourhood in boxes of a given size, or of the engine's choice."""

    def force(mask, box=None):
        plan = boxing.make_plan(mask, boxing.cheapest_box(mask, 2)[1] if box is None else box)
        monkeypatch.setattr(boxing, "plan_for", lambda text, q, k, v: plan if text == mask.text else None)
        return plan

    return force


def results(q, k, v, **options):
    """Output, lse and the gradients of both under fixed weights."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    got = attention(*leaves, return_lse=True, **options)
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum() for t in got
    )
    return (*got, *torch.autograd.grad(loss, leaves))


@given(cases.neighborhoods(), st.data())
def test_kinds_hold_every_query_and_every_visible_pair_once(case, data):
    mask, _ = case
    box = tuple(data.draw(st.integers(1, length)) for length in mask.grid)
    tokens = math.prod(mask.grid)
    found = np.zeros((tokens, tokens), dtype=int)
    asked = np.zeros(tokens, dtype=int)
    plan = boxing.make_plan(mask, box)
    for kind in plan.kinds:
        queries, keys = kind.tokens()
        np.add.at(asked, queries.ravel(), 1)
        seen = np.ones((queries.shape[1], keys.shape[1]), dtype=int) if kind.seen is None else kind.seen.numpy()
        for q, k in zip(queries, keys, strict=True):
            found[np.ix_(q, k)] += seen
    assert (asked == 1).all()
    assert (found == mask.dense(tokens)[0, 0].numpy()).all()
    assert plan.pairs == sum(kind.boxes * kind.queries.tokens * kind.keys.tokens for kind in plan.kinds)


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: m.text)
def test_values_and_gradients_are_those_of_the_definition(mask, way, in_boxes):
    in_boxes(mask)
    q, k, v = sample_qkv(2, 3, math.prod(mask.grid), kv_heads=1, width=6, value_width=4, dtype=torch.float64)
    for got, wanted in zip(
        results(q, k, v, mask=mask), results(q, k, v, mask=mask, backend="reference"), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("box", [(1, 1), (2, 5), (13, 12)])
def test_any_box_gives_the_same(box, in_boxes):
    mask = Neighborhood((13, 12), (5, 4), causal=(False, True))
    in_boxes(mask, box)
    q, k, v = sample_qkv(1, 2, 156, width=8, dtype=torch.float64)
    want = exact.reference(q, k, v, mask=mask)
    torch.testing.assert_close(attention(q, k, v, mask=mask), want, rtol=1e-9, atol=1e-10)


def test_parts_of_a_call_change_nothing(in_boxes, monkeypatch):
    mask = Neighborhood((12, 12), 5)
    in_boxes(mask, (3, 4))
    q, k, v = sample_qkv(3, 4, 144, kv_heads=2, width=8, dtype=torch.float64)
    whole = results(q, k, v, mask=mask)
    monkeypatch.setattr(boxes, "_ELEMENTS", 900)
    monkeypatch.setattr(boxes, "_SCORES", 700)
    for got, wanted in zip(results(q, k, v, mask=mask), whole, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("deviation", [1.0, 8.0])
def test_accuracy_is_that_of_the_plain_formula(dtype, deviation, way, in_boxes):
    mask = Neighborhood((14, 15), (5, 6))
    in_boxes(mask)
    q, k, v = sample_qkv(1, 2, 210, width=16, deviation=deviation, dtype=dtype)
    wide = results(*(t.double() for t in (q, k, v)), mask=mask, backend="reference")
    plain = results(q, k, v, mask=mask, backend="reference")
    got = results(q, k, v, mask=mask)
    for name, a, r, s in zip(("out", "lse", "dq", "dk", "dv"), got, wide, plain, strict=True):
        if name == "lse" and dtype.itemsize == 2:
            continue  # judged against the inputs before rounding, in the conformance suite
        assert_within_budget(a, r, s, what=name)


def test_strided_inputs_and_scales_without_a_sign(in_boxes, way):
    mask = Neighborhood((9, 8), 3, dilation=(2, 1))
    in_boxes(mask)
    q, k, v = (torch.randn(2, 72, 2, 8, dtype=torch.float64).transpose(1, 2) for _ in range(3))
    for scale in (0.0, -0.3):
        want = exact.reference(q, k, v, mask=mask, scale=scale)
        torch.testing.assert_close(attention(q, k, v, mask=mask, scale=scale), want, rtol=1e-9, atol=1e-10)


def test_nothing_is_read_before_it_is_written(in_boxes, way):
    mask = Neighborhood((9, 8), (3, 4), causal=(True, False))
    in_boxes(mask)
    q, k, v = sample_qkv(1, 2, 72, width=8)
    with nan_poisoned():
        assert all(t.isfinite().all() for t in results(q, k, v, mask=mask))


def test_the_engine_takes_boxes_for_images_and_says_so():
    mask = Neighborhood((48, 48), 7)
    q = torch.randn(1, 2, 48 * 48, 8)
    note = next(n for n in mh.explain(q, q, q, mask=mask).notes if "boxes of" in n)
    assert "queries against boxes of up to" in note
    assert boxing.plan_for(mask.text, q, q, q) is not None


def test_what_boxes_do_not_know_goes_to_tiles():
    mask = Neighborhood((48, 48), 7)
    q = torch.randn(1, 2, 48 * 48, 8)
    bias = mh.ALiBi(torch.zeros(2))
    plain = attention(q, q, q, mask=mask)
    for options in ({"bias": bias}, {"sink": torch.full((2,), -1e4)}, {"softcap": 1e6}):
        torch.testing.assert_close(attention(q, q, q, mask=mask, **options), plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tiled(q, q, q, mask, tile=(64, 64)), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention(q, q, q, mask=mask & mask), plain, rtol=1e-4, atol=1e-5)


def test_lines_and_small_grids_stay_in_tiles():
    for mask in (Neighborhood(256, 64), Neighborhood((14, 14), 7)):
        q = torch.randn(1, 2, math.prod(mask.grid), 8)
        assert boxing.plan_for(mask.text, q, q, q) is None
    q = torch.randn(1, 2, 48 * 48, 8)
    assert boxing.plan_for(Neighborhood((48, 47), 7).text, q, q, q) is None
    assert boxing.plan_for("causal", q, q, q) is None


def test_compiled_calls_are_the_same():
    mask = Neighborhood((40, 40), 7)
    q = torch.randn(1, 1, 1600, 8)
    compiled = torch.compile(lambda q: attention(q, q, q, mask=mask), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), attention(q, q, q, mask=mask))


def test_the_operator_keeps_its_promises_on_boxes():
    mask = Neighborhood((40, 40), 7)
    q, k, v = (t.requires_grad_() for t in sample_qkv(1, 2, 1600, width=8))
    rest = ("", [], None, 8**-0.5, 0.0, 0.0, None, 0.0, "softmax", AUTO, (0, 0), (0, 0), False, "blocked")
    torch.library.opcheck(op, (q, k, v, mask.text, [], None, None, None, *rest))
