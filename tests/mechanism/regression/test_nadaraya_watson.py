"""Nadaraya-Watson regression: its limits, its gradients, and other people's code for the same thing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from manyheads import Causal, Document, Window, attention, nn
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.regression import KERNELS, NadarayaWatson, kernel_weights, nadaraya_watson
from manyheads.mechanism.regression.nadaraya_watson import reference

EDGED = [name for name, kernel in KERNELS.items() if kernel.edge]
SMOOTH = ["gaussian", "epanechnikov", "triangular", "exponential"]


@pytest.fixture
def generator():
    """The same draw every day: some checks read counts at edges."""
    return torch.Generator().manual_seed(7)


def draw(generator, nq=11, nk=17, d=3, dv=2, heads=(4, 2), dtype=torch.float64):
    shapes = ((2, heads[0], nq, d), (2, heads[1], nk, d), (2, heads[1], nk, dv))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("mask", [None, "causal & window(9)"])
@pytest.mark.parametrize("bandwidth", ["number", "scalar", "head", "feature"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_and_shape_of_bandwidth_is_the_definition(kernel, bandwidth, mask, generator):
    q, k, v = draw(generator)
    shape = {"number": None, "scalar": (), "head": (4,), "feature": (4, 3)}[bandwidth]
    h = 1.7 if shape is None else 1.0 + torch.rand(shape, generator=generator, dtype=torch.float64)
    options = {"kernel": kernel, "bandwidth": h, "mask": mask, "return_lse": True}
    leaves = [[t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2)]
    got, want = nadaraya_watson(*leaves[0], **options), reference(*leaves[1], **options)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(r.out.square().sum(), x, materialize_grads=True, allow_unused=True)
             for r, x in zip((got, want), leaves, strict=True)]  # fmt: skip
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kernel", KERNELS)
def test_single_precision_is_near_double(kernel, generator):
    q, k, v = draw(generator, nq=60, nk=70)
    # no key within rounding of the edge
    h = torch.linspace(1.3, 1.6, 4, dtype=torch.float64)
    exact = nadaraya_watson(q, k, v, kernel=kernel, bandwidth=h)
    near = nadaraya_watson(*(t.float() for t in (q, k, v)), kernel=kernel, bandwidth=h.float())
    assert near.dtype == torch.float32
    torch.testing.assert_close(near.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "exponential"])
def test_an_infinite_bandwidth_is_the_mean(kernel, generator):
    q, k, v = draw(generator)
    for h in (1e6, math.inf, torch.full((4,), 1e6, dtype=torch.float64)):
        out = nadaraya_watson(q, k, v, kernel=kernel, bandwidth=h)
        mean = v.mean(2, keepdim=True).repeat_interleave(2, 1)
        torch.testing.assert_close(out, mean.expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vanishing_bandwidth_of_the_gaussian_is_the_nearest_neighbour(dtype, generator):
    q, k, v = draw(generator, heads=(2, 2))
    nearest = torch.cdist(q, k).argmin(-1, keepdim=True)
    out = nadaraya_watson(*(t.to(dtype) for t in (q, k, v)), bandwidth=1e-3)
    torch.testing.assert_close(out.double(), v.take_along_dim(nearest, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", [None, "causal", "window(3)"])
def test_the_constant_kernel_pools_by_the_mean(mask, generator):
    q, k, v = draw(generator, nq=17)
    got = nadaraya_watson(q, k, v, kernel="constant", mask=mask, return_lse=True)
    want = attention(q, k, v, mask=mask, scale=0.0, return_lse=True)
    torch.testing.assert_close(tuple(got), tuple(want))


@pytest.mark.parametrize("h", [0.4, 1.0, 3.0])
def test_the_gaussian_with_keys_of_length_one_is_softmax_attention(h, generator):
    q, k, v = draw(generator)
    q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    torch.testing.assert_close(nadaraya_watson(q, k, v, bandwidth=h), attention(q, k, v, scale=h**-2))


def test_the_exponential_kernel_is_softmax_attention_by_default(generator):
    q, k, v = draw(generator)
    got = nadaraya_watson(q, k, v, kernel="exponential", mask="window(5)", return_lse=True)
    torch.testing.assert_close(tuple(got), tuple(attention(q, k, v, mask="window(5)", return_lse=True)))


def test_the_boxcar_counts_its_neighbours(generator):
    q, k, v = draw(generator, heads=(2, 2))
    got = nadaraya_watson(q, k, v, kernel="boxcar", bandwidth=1.5, return_lse=True)
    near = torch.cdist(q, k) <= 1.5
    torch.testing.assert_close(got.lse.exp(), near.sum(-1).double())
    torch.testing.assert_close(got.out, (near.double() @ v) / near.sum(-1, keepdim=True).clamp_min(1))


@pytest.mark.parametrize("h", [1.0, 2.0, 3.0, 7.0])
def test_the_boxcar_includes_its_edge(h):
    at = torch.arange(30.0).view(1, 1, 30, 1)
    counts = nadaraya_watson(at, at, at, kernel="boxcar", bandwidth=h, return_lse=True).lse.exp().round()
    inside = (at[0, 0] - at[0, 0].T).abs() <= h
    assert counts[0, 0].tolist() == inside.sum(-1).tolist()


@pytest.mark.parametrize("kernel", EDGED)
def test_an_empty_window_is_zero_and_counted_and_has_no_gradient(kernel, generator):
    q, k, v = draw(generator)
    q[:, :, 3] += 1e3
    leaves = [t.requires_grad_() for t in (q, k, v)]
    got = nadaraya_watson(*leaves, kernel=kernel, bandwidth=2.0, return_lse=True)
    empty = got.lse == -math.inf
    assert empty[:, :, 3].all() and not empty.all()
    assert (got.out[empty] == 0).all()
    grads = torch.autograd.grad(got.out.sum(), leaves)
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, 3] == 0).all()


def test_a_row_without_keys_is_zero_under_every_kernel(generator):
    q, k, v = draw(generator, nk=11)
    for kernel in KERNELS:
        got = nadaraya_watson(q, k, v, kernel=kernel, mask="causal & ~window(4)", return_lse=True)
        assert (got.out[:, :, :4] == 0).all() and (got.lse[:, :, :4] == -math.inf).all()


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_queries_and_no_keys_are_legal(kernel, sizes, generator):
    q, k, v = draw(generator, *sizes)
    got = nadaraya_watson(q, k, v, kernel=kernel, bandwidth=torch.ones(4), return_lse=True)
    assert got.out.shape == (2, 4, sizes[0], 2) and (got.out == 0).all() and (got.lse == -math.inf).all()


@pytest.mark.parametrize("kernel", SMOOTH)
def test_gradients_reach_the_bandwidth(kernel, generator):
    q, k, v = draw(generator, nq=5, nk=7)
    for shape in ((), (4,), (4, 3)):
        h = (5.0 + torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        inputs = [t.requires_grad_() for t in (q, k, v)]
        assert torch.autograd.gradcheck(
            lambda q, k, v, h: tuple(nadaraya_watson(q, k, v, kernel=kernel, bandwidth=h, return_lse=True)),
            (*inputs, h),
        )


@pytest.mark.parametrize("kernel", EDGED)
def test_the_boxcar_alone_of_the_kernels_with_an_edge_has_no_slope(kernel, generator):
    q, k, v = draw(generator)
    h = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(nadaraya_watson(q, k, v, kernel=kernel, bandwidth=h).square().sum(), h)
    assert (grad == 0) == (kernel == "boxcar")


@pytest.mark.parametrize("kernel", KERNELS)
def test_leaving_one_out_is_a_loop_that_leaves_one_out(kernel, generator):
    _, k, v = draw(generator, heads=(2, 2))
    got = nadaraya_watson(k, k, v, kernel=kernel, bandwidth=1.8, leave_one_out=True)
    for i in range(k.shape[2]):
        others = [j for j in range(k.shape[2]) if j != i]
        want = nadaraya_watson(k[:, :, [i]], k[:, :, others], v[:, :, others], kernel=kernel, bandwidth=1.8)
        torch.testing.assert_close(got[:, :, [i]], want)


def test_leaving_one_out_combines_with_any_mask(generator):
    q, k, v = draw(generator, nq=17)
    for mask in ("causal", Causal() & Window(5), torch.arange(17)[:, None] >= torch.arange(17)):
        got = kernel_weights(q, k, mask=mask, leave_one_out=True).out
        assert (got.diagonal(dim1=-2, dim2=-1) == 0).all() and (got.triu(1) == 0).all()
        out = nadaraya_watson(q, k, v, mask=mask, leave_one_out=True)
        torch.testing.assert_close(out, got @ v.repeat_interleave(2, 1))


def test_features_far_from_zero_lose_no_digits(generator):
    q, k, v = draw(generator)
    exact = {name: nadaraya_watson(q, k, v, kernel=name, bandwidth=1.45) for name in KERNELS}
    far = [(t + 3000.0).float() for t in (q, k)]
    for name in ("gaussian", "epanechnikov", "triangular"):
        moved = nadaraya_watson(*far, v.float(), kernel=name, bandwidth=1.45)
        torch.testing.assert_close(moved.double(), exact[name], rtol=0, atol=5e-3)


def test_padded_keys_may_hold_anything(generator):
    q, k, v = draw(generator)
    real = torch.ones(2, 17, dtype=torch.bool)
    real[0, 11:] = False
    for name in KERNELS:
        want = nadaraya_watson(q[:1], k[:1, :, :11], v[:1, :, :11], kernel=name)
        bad = k.masked_fill(~real[:, None, :, None], math.nan), v.masked_fill(~real[:, None, :, None], math.inf)
        torch.testing.assert_close(nadaraya_watson(q, *bad, kernel=name, key_padding=real)[:1], want)


@pytest.mark.parametrize("kernel", EDGED)
def test_packed_documents_stay_apart(kernel, generator):
    q, k, v = draw(generator, nq=17)
    packed = nadaraya_watson(q, k, v, kernel=kernel, bandwidth=1.5, mask=Document([7, 10]))
    alone = [nadaraya_watson(*(t[:, :, part] for t in (q, k, v)), kernel=kernel, bandwidth=1.5)
             for part in (slice(0, 7), slice(7, 17))]  # fmt: skip
    torch.testing.assert_close(packed, torch.cat(alone, 2))


def test_the_layer_learns_its_bandwidth(generator):
    x = torch.rand(1, 1, 200, 1, generator=generator) * 6
    y = torch.sin(3 * x) + 0.1 * torch.randn(x.shape, generator=generator)
    core = NadarayaWatson(1, bandwidth=3.0)
    optimiser = torch.optim.Adam(core.parameters(), lr=0.1)

    def loss():
        return (core(x, x, y, leave_one_out=True) - y).square().mean()

    before = loss().item()
    for _ in range(60):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert loss().item() < 0.1 * before
    assert 0.02 < core.bandwidth.item() < 0.3  # far too wide at first, and not the nearest neighbour


def test_the_layer_is_a_core_of_attention(generator):
    layer = nn.Attention(8, 2, batch_first=True, core=NadarayaWatson(2, 4))
    x = torch.randn(2, 5, 8, generator=generator)
    layer(x, mask="causal", need_weights=False)[0].sum().backward()
    assert layer.core.log_bandwidth.grad.shape == (2, 4) and layer.core.log_bandwidth.grad.abs().sum() > 0


def test_scikit_learn_agrees(generator):
    neighbors = pytest.importorskip("sklearn.neighbors")
    q, k, v = draw(generator, heads=(1, 1), nq=40, nk=60)
    x, rows, y = k[0, 0].numpy(), q[0, 0].numpy(), v[0, 0].numpy()
    h = 1.9
    shapes = {
        "boxcar": lambda u: np.ones_like(u),
        "epanechnikov": lambda u: 1 - u**2,
        "triangular": lambda u: 1 - u,
        "gaussian": lambda u: np.exp(-0.5 * u**2),
    }
    for name, shape in shapes.items():
        got = nadaraya_watson(q[:1], k[:1], v[:1], kernel=name, bandwidth=h)[0, 0].numpy()

        def weigh(d, shape=shape):
            return np.array([shape(u / h) for u in d], dtype=object) if d.dtype == object else shape(d / h)

        if name == "gaussian":
            model = neighbors.KNeighborsRegressor(len(x), weights=weigh)
        else:
            model = neighbors.RadiusNeighborsRegressor(h, weights=weigh)
        near = np.linalg.norm(rows[:, None] - x[None], axis=-1).min(-1) < h
        assert near.sum() > 30
        np.testing.assert_allclose(got[near], model.fit(x, y).predict(rows[near]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", "triangular", "boxcar"])
def test_the_sum_of_weights_is_a_density(kernel, generator):
    neighbors = pytest.importorskip("sklearn.neighbors")
    q, k, v = draw(generator, heads=(1, 1), nq=30, nk=60)
    name = {"triangular": "linear", "boxcar": "tophat"}.get(kernel, kernel)
    model = neighbors.KernelDensity(kernel=name, bandwidth=2.5).fit(k[0, 0].numpy())
    ours = nadaraya_watson(q[:1], k[:1], v[:1], kernel=kernel, bandwidth=2.5, return_lse=True).lse[0, 0].numpy()
    theirs = model.score_samples(q[0, 0].numpy())
    finite = np.isfinite(ours)
    constant = (ours - theirs)[finite]
    np.testing.assert_allclose(constant, constant[0], rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kernel": "gausian"}, ValueError, "unknown kernel 'gausian': did you mean 'gaussian'"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth: expected a positive number"),
        ({"bandwidth": -1.0}, ValueError, "bandwidth: expected a positive number"),
        ({"bandwidth": math.nan}, ValueError, "bandwidth: expected a positive number"),
        ({"bandwidth": 1e-200}, ValueError, "whose inverse square is finite"),
        ({"bandwidth": torch.tensor([1.0, 1.0, -1.0, 1.0])}, ValueError, "expected positive numbers, got -1"),
        ({"bandwidth": torch.ones(3)}, ValueError, r"bandwidth: expected shape \(\), \(Hq=4,\)"),
        ({"bandwidth": torch.ones(4).long()}, TypeError, "bandwidth: expected a floating tensor"),
        ({"backend": "bloked"}, ValueError, "did you mean 'blocked'"),
        ({"leave_one_out": True}, ValueError, "leave_one_out: 11 queries are not the 17 samples"),
    ],
)
def test_wrong_input_is_named(options, error, match, generator):
    with pytest.raises(error, match=match):
        nadaraya_watson(*draw(generator), **options)


@pytest.mark.parametrize("kernel", ["gaussian", "epanechnikov", "constant", "exponential"])
def test_four_kernels_run_on_triton(kernel, generator):
    pytest.importorskip("triton")
    inputs = draw(generator)
    results = {}
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "blocked")):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        h = torch.full((4,), 2.5, dtype=dtype, requires_grad=kernel != "constant")
        out = nadaraya_watson(*leaves, kernel=kernel, bandwidth=h, mask="causal", backend=backend)
        grads = torch.autograd.grad(out.square().sum(), [*leaves, h] if h.requires_grad else leaves)
        results[backend] = [t.double() for t in (out, *grads)]
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", ["triangular", "boxcar"])
def test_two_kernels_are_refused_on_triton_with_a_reason(kernel, generator):
    pytest.importorskip("triton")
    q, k, v = draw(generator, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="float64 has no matrix instruction; use backend='blocked'"):
        nadaraya_watson(q, k, v, kernel=kernel, backend="triton")


def test_a_layer_refuses_what_it_cannot_learn():
    with pytest.raises(ValueError, match="unknown kernel"):
        NadarayaWatson(2, kernel="box")
    with pytest.raises(ValueError, match="bandwidth: expected a positive finite number"):
        NadarayaWatson(2, bandwidth=0.0)
