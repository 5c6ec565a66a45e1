"""Chosen key tiles on a CPU, row batch by row batch: equal to the definition, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads.engine.tiled import chosen, tiled
from manyheads.mask import Causal, TileLayout, Window
from manyheads.testing import assert_within_budget


def problem(shape, lists, tile, keep, mask, dtype=torch.float64, value_width=None):
    """Random tensors and a layout of ``keep`` random key tiles a row."""
    batch, heads, kv_heads, n = shape
    generator = torch.Generator().manual_seed(n)
    ids = torch.rand(batch, lists, -(-n // tile[0]), -(-n // tile[1]), generator=generator).argsort(-1)[..., :keep]
    layout = TileLayout.from_ids(ids, nq=n, nk=n, tile=tile, mask=mask, heads=heads)
    sizes = (heads, 16), (kv_heads, 16), (kv_heads, value_width or 16)
    tensors = [torch.randn(batch, h, n, d, generator=generator, dtype=dtype).requires_grad_() for h, d in sizes]
    return tensors, layout


def results(tensors, layout, backend, **options):
    """Output, lse, and gradients of both."""
    found = tiled(*tensors, layout, return_lse=True, backend=backend, **options)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in found]
    loss = sum((t.double().masked_fill(t.isinf(), 0.0) * w).sum() for t, w in zip(found, weights, strict=True))
    return [*found, *torch.autograd.grad(loss, tensors)]


CASES = {
    "groups share": ((2, 6, 2, 192), 2, (32, 32), 3, Causal()),
    "each head its own, ragged end": ((1, 6, 2, 203), 6, (64, 32), 2, Causal()),
    "one choice for all heads, ragged, both ways": ((2, 6, 3, 130), 1, (32, 64), 2, None),
    "two masked tiles a row": ((1, 4, 2, 300), 2, (32, 32), 5, Window(40)),
    "rows of every kind": ((1, 4, 4, 257), 4, (64, 64), 2, Causal() & Window(150)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value_width", [16, 24])
def test_values_and_gradients_are_those_of_the_definition(case, value_width):
    tensors, layout = problem(*CASES[case], value_width=value_width)
    assert chosen.rows_of(layout, *CASES[case][0][:3]) is not None
    for got, want in zip(
        results(tensors, layout, "blocked"), results(tensors, layout, "reference"), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_stays_within_its_budget(dtype):
    tensors, layout = problem((1, 4, 2, 320), 2, (64, 64), 3, Causal(), dtype)
    exact = results([t.detach().double().requires_grad_() for t in tensors], layout, "reference")
    plain = results(tensors, layout, "reference")
    got = results(tensors, layout, "blocked")
    for name, a, r, s in zip(("out", "dq", "dk", "dv"), *([x[0], *x[2:]] for x in (got, exact, plain)), strict=True):
        assert_within_budget(a, r, s, what=name)


def test_rows_without_tiles_and_a_sink():
    tensors, layout = problem((1, 2, 2, 128), 2, (32, 32), 1, Causal())
    empty = layout.dense().any(-1).logical_not()
    assert empty.any() and not empty.all()
    found = tiled(*tensors, layout, return_lse=True, backend="blocked")
    assert found.out[empty].abs().max() == 0 and (found.lse[empty] == -math.inf).all()
    sink = torch.randn(2, dtype=torch.float64)
    for got, want in zip(
        results(tensors, layout, "blocked", sink=sink), results(tensors, layout, "reference", sink=sink), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_what_lies_beyond_the_chosen_tiles_is_never_read():
    tensors, layout = problem((1, 4, 2, 130), 2, (32, 32), 2, None, torch.float32)
    q, k, v = (t.detach().clone() for t in tensors)
    want = tiled(q, k, v, layout, backend="blocked")
    unseen = ~layout.dense()[0, ::2].any(1)
    assert unseen.any()
    k[0][unseen], v[0][unseen] = math.nan, math.inf
    assert torch.equal(tiled(q, k, v, layout, backend="blocked"), want)


def test_small_tiles_and_tables_of_masks_are_left_to_others():
    _, small = problem((1, 2, 1, 64), 1, (1, 16), 2, Causal())
    assert chosen.rows_of(small, 1, 2, 1) is None
    _, runs = problem((1, 2, 1, 64), 1, (32, 32), 1, Causal())
    assert chosen.rows_of(runs.to_runs(), 1, 2, 1) is None


def test_nothing_to_choose_from():
    q, k = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 64, 16)
    nothing = TileLayout.from_ids(torch.zeros(1, 2, 1, 0, dtype=torch.int64), nq=40, nk=64, tile=64)
    assert tiled(q, k, k, nothing, backend="blocked").abs().max() == 0
