"""The least-squares layer: recursion, closed form and chunks agree; what is singular is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.regression import LeastSquaresState, least_squares, ridge_regression
from manyheads.mechanism.regression.least_squares import reference, step


def draw(generator, n=50, d=5, dv=3, heads=(4, 2), dtype=torch.float64):
    shapes = ((2, heads[0], n, d), (2, heads[1], n, d), (2, heads[1], n, dv))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def decays(generator, kind, n=50):
    if kind is None:
        return None
    shape = (2,) if kind == "head" else (2, 2, n)
    return -0.05 * torch.rand(shape, generator=generator, dtype=torch.float64)


def recursive(q, k, v, decay=None, **options):
    """The recursion, token by token."""
    state, rows = None, []
    for t in range(q.shape[2]):
        gate = decay if decay is None or decay.dim() == 1 else decay[:, :, t]
        row, state = step(q[:, :, t], k[:, :, t], v[:, :, t], state, decay=gate, **options)
        rows.append(row)
    return torch.stack(rows, 2), state


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("kind", [None, "head", "token"])
def test_recursive_and_closed_form_agree(kind, ridge, generator):
    q, k, v = draw(generator)
    decay = decays(generator, kind)
    want = reference(q, k, v, decay=decay, ridge=ridge)
    torch.testing.assert_close(recursive(q, k, v, decay, ridge=ridge)[0], want, rtol=1e-6, atol=1e-6)
    for chunk in (1, 7, 64):
        got = least_squares(q, k, v, decay=decay, ridge=ridge, chunk=chunk)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_closed_form_of_one_head_written_out(generator):
    q, k, v = draw(generator, heads=(1, 1))
    gamma, ridge, t = 0.97, 0.3, 40
    decay = torch.tensor([math.log(gamma)], dtype=torch.float64)
    got = least_squares(q, k, v, decay=decay, ridge=ridge)[0, 0, t - 1]
    keys, values = k[0, 0, :t], v[0, 0, :t]
    weigh = torch.diag(gamma ** torch.arange(t - 1, -1, -1, dtype=torch.float64))
    system = keys.T @ weigh @ keys + ridge * gamma**t * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(got, values.T @ weigh @ keys @ torch.linalg.inv(system) @ q[0, 0, t - 1])


@pytest.mark.parametrize("kind", [None, "head", "token"])
def test_the_state_of_the_chunks_is_that_of_the_recursion(kind, generator):
    q, k, v = draw(generator)
    decay = decays(generator, kind)
    _, chunks = least_squares(q, k, v, decay=decay, ridge=0.1, return_state=True, chunk=16)
    _, tokens = recursive(q, k, v, decay, ridge=0.1)
    torch.testing.assert_close(tuple(chunks), tuple(tokens), rtol=1e-7, atol=1e-8)


def test_thousands_of_tokens_in_chunks_equal_the_recursion(generator):
    q, k, v = draw(generator, n=3000, d=8, heads=(1, 1))
    decay = torch.full((1,), -0.001, dtype=torch.float64)
    got = least_squares(q, k, v, decay=decay, ridge=0.1)
    want, _ = recursive(q, k, v, decay, ridge=0.1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_gradients_match_finite_differences(generator):
    inputs = [t.requires_grad_() for t in draw(generator, n=7, d=3, dv=2)]
    decay = decays(generator, "token", 7).requires_grad_()
    ridge = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, decay, ridge: least_squares(q, k, v, decay=decay, ridge=ridge, chunk=3), (*inputs, decay, ridge)
    )


def test_gradients_of_every_chunking_are_those_of_the_recursion(generator):
    leaves = [t.requires_grad_() for t in draw(generator, n=20)]
    decay = decays(generator, "token", 20).requires_grad_()
    want = torch.autograd.grad(recursive(*leaves, decay, ridge=0.5)[0].square().sum(), [*leaves, decay])
    got = torch.autograd.grad(least_squares(*leaves, decay=decay, ridge=0.5, chunk=6).square().sum(), [*leaves, decay])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


def test_documents_start_anew_but_for_the_state_of_the_first(generator):
    q, k, v = draw(generator)
    mask = Document([20, 0, 1, 29]) & Causal()
    _, state = least_squares(q, k, v, ridge=0.2, return_state=True)
    got, end = least_squares(q, k, v, ridge=0.2, mask=mask, state=state, return_state=True, chunk=8)
    parts = [(slice(0, 20), state), (slice(20, 21), None), (slice(21, 50), None)]
    alone = [least_squares(*(t[:, :, part] for t in (q, k, v)), ridge=0.2, state=own, return_state=True)
             for part, own in parts]  # fmt: skip
    torch.testing.assert_close(got, torch.cat([out for out, _ in alone], 2))
    torch.testing.assert_close(tuple(end), tuple(alone[-1][1]))


def test_documents_of_every_row_are_its_own(generator):
    q, k, v = draw(generator)
    mask = Document([[20, 30], [50, 0]]) & Causal()
    got = least_squares(q, k, v, mask=mask)
    torch.testing.assert_close(got[1], least_squares(q, k, v)[1])
    torch.testing.assert_close(got[0, :, 20:], least_squares(*(t[:1, :, 20:] for t in (q, k, v)))[0])


def test_heads_permute(generator):
    q, k, v = draw(generator, heads=(4, 4))
    decay = -0.05 * torch.rand(2, 4, 50, generator=generator, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    want = least_squares(q, k, v, decay=decay)[:, order]
    torch.testing.assert_close(least_squares(q[:, order], k[:, order], v[:, order], decay=decay[:, order]), want)


def test_single_precision_solves_in_double(generator):
    q, k, v = draw(generator, dtype=torch.float32)
    k[:, :, 25:] = k[:, :, :25]  # repeated keys
    exact = least_squares(q.double(), k.double(), v.double(), ridge=1e-6)
    got = least_squares(q, k, v, ridge=1e-6)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact.float())


def test_scikit_learn_fits_the_same_ridge_regression(generator):
    models = pytest.importorskip("sklearn.kernel_ridge"), pytest.importorskip("sklearn.linear_model")
    q, k, v = draw(generator, heads=(1, 1))
    x, y, rows = (t[0, 0].numpy() for t in (k, v, q))
    got = ridge_regression(q[:1], k[:1], v[:1], ridge=0.7)[0, 0].numpy()
    np.testing.assert_allclose(got, models[0].KernelRidge(alpha=0.7, kernel="linear").fit(x, y).predict(rows))
    np.testing.assert_allclose(got, models[1].Ridge(alpha=0.7, fit_intercept=False).fit(x, y).predict(rows))
    last = least_squares(q[:1], k[:1], v[:1], ridge=0.7)[0, 0, -1].numpy()
    np.testing.assert_allclose(last, got[-1])


def test_ridge_regression_sees_no_padding(generator):
    q, k, v = draw(generator)
    real = torch.rand(2, 50, generator=generator) < 0.7
    hidden = ~real[:, None, :, None]
    got = ridge_regression(q, k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.inf), key_padding=real)
    for b in range(2):
        alone = ridge_regression(q[b : b + 1], k[b : b + 1, :, real[b]], v[b : b + 1, :, real[b]])
        torch.testing.assert_close(got[b : b + 1], alone)


def test_a_ridge_of_zero_needs_keys_that_span(generator):
    q, k, v = draw(generator)
    torch.testing.assert_close(
        ridge_regression(q, k, v, ridge=0.0),
        q @ torch.linalg.lstsq(k, v).solution.repeat_interleave(2, 1),
    )
    with pytest.raises(ValueError, match="ridge: the least-squares system is singular"):
        ridge_regression(q, k[:, :, :3], v[:, :, :3], ridge=0.0)
    k[..., 4] = k[..., 1] - k[..., 2]
    with pytest.raises(ValueError, match="ridge: the least-squares system is singular"):
        ridge_regression(q, k, v, ridge=0.0)


def test_a_decay_that_forgets_what_spans_the_channels_is_refused(generator):
    q, k, v = draw(generator, n=400)
    k[:, :, 5:] = k[:, :, 5:, :1]  # one direction only, but for the first tokens
    decay = torch.full((2,), -0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="singular to working precision; use a larger ridge, or a weaker decay"):
        least_squares(q, k, v, decay=decay)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ridge": 0.0}, ValueError, "ridge: the first tokens alone never determine a fit"),
        ({"ridge": -1.0}, ValueError, "ridge: expected a number of at least 0"),
        ({"ridge": torch.zeros(2)}, ValueError, "ridge: expected positive numbers"),
        ({"ridge": torch.ones(3)}, ValueError, r"ridge: expected a number or shape \(Hkv=2,\)"),
        ({"decay": torch.tensor([0.1, -0.1])}, ValueError, "decay: expected finite log decays of at most 0"),
        ({"decay": torch.tensor([-math.inf, 0.0])}, ValueError, "decay: expected finite log decays"),
        ({"decay": torch.zeros(4)}, ValueError, r"decay: expected shape \(Hkv=2,\)"),
        ({"decay": torch.zeros(2).long()}, TypeError, "decay: expected a floating tensor"),
        ({"chunk": 0}, ValueError, "chunk: expected a positive number"),
        ({"state": 3}, TypeError, "state: expected a LeastSquaresState"),
        ({"state": LeastSquaresState(torch.ones(2, 2, 4, 4), torch.ones(2, 2, 5, 3))}, ValueError, "state: P must be"),
        ({"mask": "window(4)"}, UnsupportedError, "least-squares does not support mask"),
        ({"mask": "full"}, UnsupportedError, "least-squares does not support noncausal_self"),
        ({"mask": Document([20, 20]) & Causal()}, ValueError, "mask: documents must sum to the N=50"),
    ],
)
def test_wrong_input_is_named(options, error, match, generator):
    with pytest.raises(error, match=match):
        least_squares(*draw(generator), **options)


def test_a_step_names_wrong_input(generator):
    q, k, v = draw(generator)
    with pytest.raises(ValueError, match="q: expected 3 dimensions"):
        step(q, k, v)
    with pytest.raises(ValueError, match="decay: expected finite log decays"):
        step(q[:, :, 0], k[:, :, 0], v[:, :, 0], decay=torch.ones(2, 2))
