"""Local polynomial regression: what each degree reproduces, and where it becomes softmax attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from manyheads import Causal, Document, attention
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.regression import KERNELS, local_linear_attention, local_polynomial, nadaraya_watson
from manyheads.mechanism.regression.polynomial import reference


@pytest.fixture
def generator():
    """The same draw every day: how well systems are conditioned depends on it."""
    return torch.Generator().manual_seed(11)


def draw(generator, nq=9, nk=30, d=2, dv=3, heads=(4, 2)):
    shapes = ((2, heads[0], nq, d), (2, heads[1], nk, d), (2, heads[1], nk, dv))
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def polynomial_of(degree, k, generator):
    """Values that are a polynomial of the keys."""
    d = k.shape[-1]
    out = torch.randn(3, generator=generator, dtype=torch.float64).expand(*k.shape[:-1], 3)
    if degree > 0:
        out = out + k @ torch.randn(d, 3, generator=generator, dtype=torch.float64)
    if degree > 1:
        squares = (k[..., :, None] * k[..., None, :]).flatten(-2)
        out = out + squares @ torch.randn(d * d, 3, generator=generator, dtype=torch.float64)
    return out


@pytest.mark.parametrize("kernel", ["exponential", "gaussian", "epanechnikov"])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_it_is_the_normal_equations_in_value_and_gradient(degree, kernel, generator):
    q, k, v = draw(generator)
    options = {"degree": degree, "kernel": kernel, "bandwidth": 3.0, "ridge": 0.05, "mask": "~window(4)"}
    leaves = [[t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2)]
    got, want = local_polynomial(*leaves[0], **options), reference(*leaves[1], **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(r.square().sum(), x) for r, x in zip((got, want), leaves, strict=True)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("mask", [None, "causal", "causal & window(6)"])
def test_degree_zero_is_softmax_attention(mask, generator):
    q, k, v = draw(generator, nq=30)
    got = local_polynomial(q, k, v, degree=0, mask=mask)
    torch.testing.assert_close(got, attention(q, k, v, mask=mask))


@pytest.mark.parametrize("degree", [1, 2])
def test_degree_one_with_a_strong_ridge_is_softmax_attention(degree, generator):
    q, k, v = draw(generator, nq=30)
    plain = attention(q, k, v, mask="causal")
    gaps = [(local_polynomial(q, k, v, degree=degree, ridge=r, mask="causal") - plain).abs().max() for r in (1e6, 1e12)]
    assert gaps[0] < 1e-3 and gaps[1] < 1e-9


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_polynomials_are_reproduced_up_to_the_degree(degree, kernel, generator):
    q, k, _ = draw(generator, nk=60)
    keys = k.repeat_interleave(2, 1)  # every query head its own values
    exact, above = (polynomial_of(p, keys, generator) for p in (degree, degree + 1)) if degree < 2 else (
        polynomial_of(2, keys, generator), keys[..., :1] ** 3)  # fmt: skip
    want = [self_at(keys, values, q) for values in (exact, above)]
    found = [
        local_polynomial(q, keys, values, degree=degree, kernel=kernel, bandwidth=4.0, ridge=0.0)
        for values in (exact, above)
    ]
    torch.testing.assert_close(found[0], want[0], rtol=1e-7, atol=1e-7)
    assert (found[1] - want[1]).abs().max() > 1e-2


def self_at(keys, values, q):
    """The polynomial that values are of keys, at the queries, by an exact fit of degree 3."""

    def design(x):
        a, b = x.unbind(-1)
        return torch.stack([a**i * b**j for i in range(4) for j in range(4 - i)], -1)

    return design(q) @ torch.linalg.lstsq(design(keys), values).solution


def test_degree_one_is_local_linear_attention(generator):
    q, k, v = draw(generator, nq=30, d=5)
    for mask in (None, "causal"):
        got = local_polynomial(q, k, v, degree=1, ridge=0.2, mask=mask)
        torch.testing.assert_close(got, local_linear_attention(q, k, v, ridge=0.2, mask=mask), rtol=1e-6, atol=1e-6)


def test_shifting_queries_and_keys_shifts_nothing(generator):
    q, k, v = draw(generator, nk=60)
    options = {"degree": 2, "kernel": "gaussian", "bandwidth": 2.0, "ridge": 1e-4}
    far = local_polynomial(q + 100.0, k + 100.0, v, **options)
    torch.testing.assert_close(far, local_polynomial(q, k, v, **options), rtol=1e-6, atol=1e-6)


def test_rotating_queries_and_keys_changes_nothing(generator):
    q, k, v = draw(generator, d=3)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    for kernel in ("gaussian", "exponential"):
        options = {"degree": 2, "kernel": kernel, "ridge": 0.3}
        turned = local_polynomial(q @ turn, k @ turn, v, **options)
        torch.testing.assert_close(turned, local_polynomial(q, k, v, **options))


@pytest.mark.parametrize("degree", [1, 2])
def test_gradients_match_finite_differences(degree, generator):
    inputs = [t[:1].requires_grad_() for t in draw(generator, nq=4, nk=12, heads=(2, 1))]
    assert torch.autograd.gradcheck(
        lambda q, k, v: local_polynomial(q, k, v, degree=degree, ridge=0.1, mask="~window(2)"), inputs
    )


def test_packed_documents_and_empty_windows(generator):
    q, k, v = draw(generator, nq=30)
    options = {"degree": 2, "ridge": 0.1}
    packed = local_polynomial(q, k, v, mask=Document([12, 18]) & Causal(), **options)
    alone = [local_polynomial(*(t[:, :, part] for t in (q, k, v)), mask="causal", **options)
             for part in (slice(0, 12), slice(12, 30))]  # fmt: skip
    torch.testing.assert_close(packed, torch.cat(alone, 2))
    q = q.clone().requires_grad_()
    q2 = q + torch.where(torch.arange(30) == 4, 1e3, 0.0)[:, None]
    out = local_polynomial(q2, k, v, degree=1, kernel="boxcar", bandwidth=30.0, ridge=0.0)
    assert (out[:, :, 4] == 0).all() and out.isfinite().all()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def test_scikit_learn_fits_the_same_line(generator):
    linear = pytest.importorskip("sklearn.linear_model")
    q, k, v = draw(generator, heads=(1, 1), nk=50)
    got = local_polynomial(q[:1], k[:1], v[:1], degree=1, kernel="gaussian", bandwidth=1.3, ridge=0.0)[0, 0]
    for row, out in zip(q[0, 0].numpy(), got.numpy(), strict=True):
        x = k[0, 0].numpy()
        weights = np.exp(-0.5 * ((x - row) ** 2).sum(1) / 1.3**2)
        np.testing.assert_allclose(linear.LinearRegression().fit(x, v[0, 0].numpy(), weights).predict([row])[0], out)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"degree": 3}, ValueError, "degree: expected 0, 1 or 2, got 3"),
        ({"degree": True}, ValueError, "degree: expected 0, 1 or 2"),
        ({"degree": "linear"}, ValueError, "degree: expected 0, 1 or 2"),
        ({"ridge": -1.0}, ValueError, "ridge: expected a number of at least 0"),
        ({"ridge": math.nan}, ValueError, "ridge: expected a number of at least 0"),
        ({"ridge": 0.0, "mask": "causal"}, ValueError, "ridge: the keys near .* queries do not determine"),
        ({"kernel": "gaussain"}, ValueError, "did you mean 'gaussian'"),
    ],
)
def test_wrong_input_is_named(options, error, match, generator):
    with pytest.raises(error, match=match):
        local_polynomial(*draw(generator, nq=30), **options)


def test_a_ridge_of_zero_with_keys_on_a_line_is_refused(generator):
    q, k, v = draw(generator)
    k[..., 1] = 2.0 * k[..., 0]
    with pytest.raises(ValueError, match="do not determine a polynomial"):
        local_polynomial(q, k, v, ridge=0.0)
    assert local_polynomial(q, k, v, ridge=1e-6).isfinite().all()


def test_too_many_features_are_refused_with_advice():
    q = torch.zeros(1, 8, 4096, 64)
    with pytest.raises(UnsupportedError, match="degree 2 of D=64 channels makes 2144 features"):
        local_polynomial(q, q, q, degree=2)


def test_degree_zero_takes_the_bandwidth_of_a_head(generator):
    q, k, v = draw(generator)
    h = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    got = local_polynomial(q, k, v, degree=0, kernel="gaussian", bandwidth=h)
    torch.testing.assert_close(got, nadaraya_watson(q, k, v, bandwidth=h))
