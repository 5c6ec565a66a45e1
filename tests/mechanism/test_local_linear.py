"""Local linear attention: the numbered checks of its card, and what surrounds them."""

from __future__ import annotations

import math

import pytest
import torch

import manyheads as mh
from manyheads import Causal, Document
from manyheads.engine.solve import Solver
from manyheads.mechanism.regression import interpolate, local_linear_attention
from manyheads.mechanism.regression.local_linear import reference
from manyheads.mechanism.regression.parallax import weights
from manyheads.spec import Size, find
from manyheads.testing import sample_qkv

WIDE = torch.float64
WAYS = {
    "direct": {"solver": "direct"},
    "cg": {"solver": Solver("cg", tol=1e-12, steps=400)},
    "reference": {"backend": "reference"},
}


def inputs(n=29, heads=4, kv=2, d=6, dv=5, batch=2, keys=None, seed=0):
    """Queries, keys and values in float64."""
    return sample_qkv(batch, heads, n, kv_heads=kv, keys=keys, width=d, value_width=dv, dtype=WIDE, seed=seed)


def centred(q, k, v, ridge, mask, unnormalised=False):
    """Means and covariances under the weights, and a dense solve; one key head for each query head."""
    p, lse = weights(q, k, mask=mask)
    if unnormalised:
        p = p * lse.exp()[..., None]
    total = p.sum(-1, keepdim=True)
    centre, mean = p @ k / total, p @ v / total
    z, y = k[:, :, None] - centre[:, :, :, None], v[:, :, None] - mean[:, :, :, None]
    own = torch.einsum("bhij,bhijd,bhije->bhide", p, z, z) + ridge * torch.eye(q.shape[3], dtype=WIDE)
    cross = torch.einsum("bhij,bhijd,bhije->bhide", p, z, y)
    return mean + torch.einsum("bhide,bhid->bhie", cross, torch.linalg.solve(own, q - centre))


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_strong_ridge_is_softmax_attention(options):
    q, k, v = inputs()
    got = local_linear_attention(q, k, v, ridge=1e10, mask="causal", **options)
    torch.testing.assert_close(got, mh.attention(q, k, v, mask="causal"), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_affine_values_are_reproduced_where_softmax_fails(options):
    q, k, _ = inputs(kv=4)
    slope, shift = torch.randn(6, 5, dtype=WIDE), torch.randn(5, dtype=WIDE)
    got = local_linear_attention(q, k, k @ slope + shift, ridge=1e-9, **options)
    want = q @ slope + shift
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (mh.attention(q, k, k @ slope + shift) - want).abs().mean() > 0.5


@pytest.mark.parametrize("mask", ["full", "causal", "causal & window(9)"])
@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_plain_centred_direct_and_iterative_solves_agree(options, mask):
    q, k, v = inputs(kv=4)
    want = reference(q, k, v, ridge=0.05, mask=mask)
    torch.testing.assert_close(centred(q, k, v, 0.05, mask), want, rtol=1e-9, atol=1e-9)
    got = local_linear_attention(q, k, v, ridge=0.05, mask=mask, **options)
    assert (got - want).abs().max() < 1e-6


def test_as_many_steps_as_channels_are_enough():
    q, k, v = inputs(n=40, d=5)
    exact = Solver("cg", tol=1e-9, steps=5, unconverged="raise")
    got = local_linear_attention(q, k, v, ridge=0.3, solver=exact)
    torch.testing.assert_close(got, reference(q, k, v, ridge=0.3), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_weights_sum_to_one(options):
    q, k, _ = inputs()
    one_hot = torch.eye(29, dtype=WIDE).expand(2, 2, 29, 29)
    tilted = local_linear_attention(q, k, one_hot, ridge=0.1, mask="causal", **options)
    torch.testing.assert_close(tilted.sum(-1), torch.ones(2, 4, 29, dtype=WIDE))
    assert (tilted < 0).any() and (tilted.triu(1) == 0).all()


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_a_constant_added_to_values_is_added_to_outputs(options):
    q, k, v = inputs()
    first, second = (
        local_linear_attention(q, k, t, ridge=0.1, mask="causal", **options) for t in (v, v + 7.0)
    )
    torch.testing.assert_close(second, first + 7.0)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_gradients_match_finite_differences(options):
    q, k, v = (t.requires_grad_() for t in inputs(n=9, heads=2, kv=1, d=3, dv=2, batch=1))
    ridge = torch.tensor([0.2, 0.7], dtype=WIDE, requires_grad=True)

    def run(q, k, v, ridge):
        return local_linear_attention(q, k, v, ridge=ridge, mask="causal", **options)

    assert torch.autograd.gradcheck(run, (q, k, v, ridge))


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_one_key_returns_its_value(options):
    q, k, v = inputs(keys=1)
    got = local_linear_attention(q, k, v, ridge=0.1, **options)
    torch.testing.assert_close(got, v.repeat_interleave(2, dim=1).expand_as(got))


# --- around the checks --------------------------------------------------------------------------------------------


def test_the_ridge_is_relative_to_weights_that_sum_to_one():
    q, k, v = inputs(kv=4)
    _, lse = weights(q, k, mask="causal")
    paper = centred(q, k, v, 0.2 * lse.exp()[..., None, None], "causal", unnormalised=True)
    torch.testing.assert_close(local_linear_attention(q, k, v, ridge=0.2, mask="causal"), paper)


def test_no_slope_is_softmax_attention_and_the_local_one_is_local_linear_attention():
    q, k, v = inputs(kv=4)
    plain = interpolate(q, k, v, torch.zeros(6, 5, dtype=WIDE), mask="causal")
    torch.testing.assert_close(plain, mh.attention(q, k, v, mask="causal"))
    p, _ = weights(q, k, mask="causal")
    z = k[:, :, None] - (p @ k)[:, :, :, None]
    own = torch.einsum("bhij,bhijd,bhije->bhide", p, z, z) + 0.1 * torch.eye(6, dtype=WIDE)
    slope = torch.linalg.solve(own, torch.einsum("bhij,bhijd,bhje->bhide", p, z, v))
    want = local_linear_attention(q, k, v, ridge=0.1, mask="causal")
    torch.testing.assert_close(interpolate(q, k, v, slope, mask="causal"), want)


def test_a_slope_shared_by_all_queries_is_attention_to_the_rest():
    q, k, v = inputs()
    slope = torch.randn(6, 5, dtype=WIDE)
    want = mh.attention(q, k, v - k @ slope, mask="causal & ~window(2)")
    want = want + (q @ slope) * (torch.arange(29)[:, None] >= 2)
    torch.testing.assert_close(interpolate(q, k, v, slope, mask="causal & ~window(2)"), want)
    with pytest.raises(ValueError, match=r"slope: expected \(D, Dv\) = \(6, 5\)"):
        interpolate(q, k, v, slope.T)


def test_decoding_is_a_call_with_few_queries():
    q, k, v = inputs()
    whole = local_linear_attention(q, k, v, ridge=0.1, mask="causal")
    for first in (28, 20):
        last = local_linear_attention(q[:, :, first:], k, v, ridge=0.1, mask="causal")
        torch.testing.assert_close(last, whole[:, :, first:])


def test_packed_documents_equal_a_loop_and_carry_gradients():
    q, k, v = (t.requires_grad_() for t in inputs(batch=1))
    packed = local_linear_attention(q, k, v, ridge=0.1, mask=Document([12, 17]) & Causal())
    parts = [
        local_linear_attention(*(t[:, :, a:b] for t in (q, k, v)), ridge=0.1, mask="causal")
        for a, b in ((0, 12), (12, 29))
    ]
    looped = torch.cat(parts, dim=2)
    torch.testing.assert_close(packed, looped)
    got, want = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (packed, looped))
    torch.testing.assert_close(got, want)


def test_a_piecewise_linear_function_is_fitted_better_than_by_averages():
    generator = torch.Generator().manual_seed(3)
    k = torch.rand(1, 1, 256, 2, generator=generator, dtype=WIDE) * 2 - 1
    q = torch.rand(1, 1, 64, 2, generator=generator, dtype=WIDE) * 2 - 1

    def truth(x):
        return torch.where(x[..., :1] > 0, 3 * x[..., :1] - x[..., 1:], x[..., 1:] * 2)

    def lengthened(x):  # on a sphere dot products are distances
        return torch.cat([x, (2 - x.square().sum(-1, keepdim=True)).sqrt()], dim=-1)

    options = {"scale": 20.0}
    fitted = local_linear_attention(lengthened(q), lengthened(k), truth(k), ridge=1e-4, **options)
    averaged = mh.attention(lengthened(q), lengthened(k), truth(k), **options)
    inside = q[..., 0].abs() > 0.5  # a few bandwidths from the border between the two pieces
    errors = [float((t - truth(q))[inside].square().mean()) for t in (fitted, averaged)]
    assert errors[0] < 0.1 * errors[1]


def test_large_logits_neither_overflow_nor_lose_the_ridge():
    q, k, v = inputs()
    got = local_linear_attention(100 * q, 100 * k, v, ridge=0.1, mask="causal")
    want = reference(100 * q, 100 * k, v, ridge=0.1, mask="causal")
    assert got.isfinite().all()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_operations_are_counted_pair_by_pair():
    spec = find("lla")
    case = spec.inputs(Size(batch=3, heads=4, queries=10, width=8, value_width=6))
    pairs, rows = 3 * 4 * 100, 3 * 4 * 10
    assert spec.flops(case) == pairs * (8 * 8 + 2 * 6 + 8 * 9) + rows * 8**3 // 3


def test_the_ridge_of_every_head_is_its_own():
    q, k, v = inputs()
    ridges = torch.tensor([1e-3, 0.1, 1.0, 1e9], dtype=WIDE)
    got = local_linear_attention(q, k, v, ridge=ridges, mask="causal")
    for h, ridge in enumerate(ridges.tolist()):
        alone = local_linear_attention(
            q[:, h : h + 1], k[:, h // 2, None], v[:, h // 2, None], ridge=ridge, mask="causal"
        )
        torch.testing.assert_close(got[:, h : h + 1], alone, rtol=1e-7, atol=1e-7)
    assert math.isclose(float((got[:, 3] - mh.attention(q, k, v, mask="causal")[:, 3]).abs().max()), 0, abs_tol=1e-6)
