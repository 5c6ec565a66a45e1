"""Scores of few bits in the tiled engine, and tiles that are decided before anything is averaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from manyheads import ALiBi, Causal, Document, Full, Window
from manyheads.common.errors import UnsupportedError
from manyheads.common.quantise import quantise, smoothed
from manyheads.engine.tiled import blocked, passes, products, reference, skipping, tiled
from manyheads.engine.tiled.op import _problem
from manyheads.mechanism import exact
from manyheads.testing import assert_within_budget


def sample(generator, dtype=torch.float64, *, queries=37, keys=53, width=20, value_width=9):
    """Grouped heads, keys that are shifted."""
    shapes = (6, queries, width), (2, keys, width), (2, keys, value_width)
    q, k, v = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype) for t in (q, k + 2, v)]


def run(tensors, mask, **options):
    """Output, lse and gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    got = tiled(*leaves, mask, return_lse=True, **options)
    grads = torch.autograd.grad(got.out.double().square().sum() + got.lse.double().sum(), leaves)
    return {"out": got.out, "lse": got.lse} | dict(zip("qkv", grads, strict=True))


OPTIONS = {
    "plain": {},
    "cap": {"softcap": 3.0},
    "skip": {"skip_threshold": 0.3, "tile": (16, 16)},
    "bias": {"bias": ALiBi(torch.linspace(0.1, 0.6, 6, dtype=torch.float64))},
    "sink": {"sink": torch.linspace(-1, 1, 6, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("qk", ["int8", "int4"])
def test_backends_agree_in_values_lse_and_gradients(qk, name, generator):
    tensors = sample(generator)
    got, want = (run(tensors, Causal(), qk=qk, backend=b, **OPTIONS[name]) for b in ("blocked", "reference"))
    for part, value in want.items():
        torch.testing.assert_close(got[part], value, rtol=1e-10, atol=1e-10, msg=lambda m, p=part: f"{p}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk", ["int8", "int4"])
def test_half_and_single_precision_stay_in_budget(qk, dtype, generator):
    tensors = sample(generator, dtype)
    got = run(tensors, Causal(), qk=qk, backend="blocked")
    plain = run(tensors, Causal(), qk=qk, backend="reference")
    wide = run([t.double() for t in tensors], Causal(), qk=qk, backend="reference")
    for part in wide:
        assert_within_budget(got[part], wide[part], plain[part], what=part)


@pytest.mark.parametrize(("qk", "bits"), [("int8", 8), ("int4", 4)])
def test_the_scores_are_products_of_the_rounded_tensors_with_smoothing_put_back(qk, bits, generator):
    q, k, v = sample(generator)
    parts = smoothed(q, k, queries=bits == 4)
    low = [quantise(t, bits).dequantise() for t in (parts.queries, parts.keys)]
    s = low[0] @ low[1].repeat_interleave(3, 1).mT + parts.row[..., None] + parts.column[:, :, None]
    got = tiled(q, k, v, Full(), qk=qk, return_lse=True)
    torch.testing.assert_close(got.lse, (s * 20**-0.5).logsumexp(-1), rtol=1e-10, atol=1e-10)
    dense = exact.reference(q, k, v, return_lse=True)
    off = (s - q @ k.repeat_interleave(3, 1).mT).abs().amax()
    assert 0 < (got.lse - dense.lse).abs().max() <= off * 20**-0.5


def test_eight_bits_err_less_than_four_and_a_shift_of_the_keys_costs_nothing(generator):
    q, k, v = sample(generator)
    errors = {}
    for shift in (0.0, 50.0):
        dense = exact.reference(q, k + shift, v)
        errors |= {(qk, shift): (tiled(q, k + shift, v, Full(), qk=qk) - dense).abs().max() for qk in ("int8", "int4")}
    assert errors["int8", 0.0] * 5 < errors["int4", 0.0]
    for qk in ("int8", "int4"):
        assert errors[qk, 50.0] < errors[qk, 0.0] * 1.01 + 1e-9


def test_gradients_pass_straight_through_the_rounding(generator):
    tensors = sample(generator)
    got = run(tensors, Full(), qk="int8")
    want = run(tensors, Full())
    for part in "qkv":
        assert 0 < (got[part] - want[part]).abs().max() < 0.2 * want[part].abs().max()


def test_what_cannot_is_refused_with_its_reason():
    q = torch.ones(1, 1, 4, 16)
    with pytest.raises(UnsupportedError, match="few bits"):
        tiled(q, q, q, Full(), qk="int8", backend="triton")
    with pytest.raises(ValueError, match="qk 'int9': did you mean 'int"):
        tiled(q, q, q, Full(), qk="int9")


# --- tiles decided first ------------------------------------------------------------------------------------------


def problem(q, k, v, mask, threshold, tile):
    """A call with a threshold as the backends see it."""
    rest = (None, 0.25, 0.0, 0.0, None, threshold, "softmax", "auto exact", tile, (0, 0), False, "blocked")
    return _problem(q, k, v, mask.text, list(mask.data), None, None, None, "", [], *rest)


def plainly_kept(p):
    """The tiles that the definition keeps, ``(B, H, Tq, Tk)``."""
    wide = replace(p, **{name: getattr(p, name).double() for name in "qkv"})
    allowed = p.layout.dense().expand(*p.q.shape[:2], -1, -1)
    bm, bn = p.layout.tile
    return (reference._kept_tiles(wide, reference.scores(wide), allowed) & allowed)[:, :, :, :], bm, bn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [Causal(), Full(), Causal() & Window(40), Document([60, 30, 77]) & Causal()], ids=str)
@pytest.mark.parametrize("threshold", [1e-6, 1e-2, 0.5, 0.95])
def test_tiles_decided_first_are_those_of_the_definition(threshold, mask, dtype, generator):
    q = torch.randn(2, 4, 167, 16, generator=generator) * 4
    k, v = (torch.randn(2, 2, 167, 16, generator=generator) for _ in range(2))
    p = problem(*(t.to(dtype) for t in (q, k, v)), mask, threshold, (32, 16))
    assert skipping.serves(p)
    want, bm, bn = plainly_kept(p)
    kept = skipping.kept_layout(p)
    torch.testing.assert_close(kept.dense().expand_as(want), want)
    gaps = skipping.gaps(p.q, p.k, p.layout, 0.25)
    counted = (gaps >= torch.tensor(threshold).double().log()).sum()
    assert kept.visited == int(counted) if dtype != torch.float64 else kept.visited >= int(counted) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_skipping_give_the_same(dtype, generator, monkeypatch):
    q = torch.randn(1, 4, 150, 16, generator=generator) * 4
    k, v = (torch.randn(1, 2, 150, 16, generator=generator) for _ in range(2))
    tensors = [t.to(dtype) for t in (q, k, v)]
    found = []
    for wins in (True, False):
        monkeypatch.setattr(products, "fused_wins", lambda _, wins=wins: wins)
        found.append(run(tensors, Causal(), skip_threshold=0.3, tile=(32, 16), backend="blocked"))
    wide = run([t.double() for t in tensors], Causal(), skip_threshold=0.3, tile=(32, 16), backend="reference")
    plain = run(tensors, Causal(), skip_threshold=0.3, tile=(32, 16), backend="reference")
    for got in found:
        torch.testing.assert_close(got["lse"], plain["lse"], rtol=1e-3, atol=1e-3)
        for part in ("out", "q", "k", "v"):
            assert_within_budget(got[part], wide[part], plain[part] if part == "out" else got[part], what=part)


def test_a_call_that_skips_nothing_is_one_call_of_the_fused_kernel(generator):
    q, k, v = (torch.randn(1, 2, 200, 16, generator=generator) for _ in range(3))
    for mask, length in ((Causal(), 200), (Full(), 200)):
        p = problem(q, k, v, mask, 1e-12, (64, 32))
        got = skipping.whole(skipping.narrowed(p))
        assert got is not None
        out, lse = passes.forward(replace(p, skip_threshold=0.0))
        torch.testing.assert_close(got[0], out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], lse, rtol=1e-5, atol=1e-5)
        assert got[0].shape[2] == length
    for other in (Causal() & Window(30), Causal() & Document([150, 50])):
        assert skipping.whole(skipping.narrowed(problem(q, k, v, other, 1e-12, (64, 32)))) is None
    assert blocked.forward(problem(q, k, v, Causal(), 1e-12, (64, 32)))[0].shape == q.shape
