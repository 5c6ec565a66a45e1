"""Kernel regression on tables: the choice of bandwidths, predictions, weights, and empty windows."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from manyheads.mechanism.regression import KERNELS, KernelRegressor


@pytest.fixture
def generator():
    """The same table every day: the best bandwidth depends on it."""
    return torch.Generator().manual_seed(3)


def table(generator, n=80, d=2):
    x = torch.rand(n, d, generator=generator, dtype=torch.float64) * 4
    y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    return x, y


@pytest.mark.parametrize("degree", [0, 1])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_score_is_that_of_predicting_every_sample_from_the_others(kernel, degree, generator):
    x, y = table(generator, 30)
    options = {"kernel": kernel, "bandwidth": 3.0, "degree": degree, "ridge": 1e-3}
    model = KernelRegressor(**options).fit(x, y)
    others = torch.stack([
        KernelRegressor(**options).fit(x[keep], y[keep]).predict(x[i : i + 1])[0]
        for i in range(30)
        if (keep := torch.arange(30) != i) is not None
    ])  # fmt: skip
    torch.testing.assert_close(model.leave_one_out(), others)
    assert model.score_ == pytest.approx(float((others - y).square().mean()))


@pytest.mark.parametrize("kernel", ["gaussian", "boxcar", "epanechnikov", "triangular"])
def test_the_chosen_bandwidth_beats_its_neighbours(kernel, generator):
    x, y = table(generator)
    best = KernelRegressor(kernel).fit(x, y)
    for factor in (0.25, 0.5, 0.8, 1.25, 2.0, 8.0):
        other = KernelRegressor(kernel, float(best.bandwidth_) * factor).fit(x, y)
        assert best.score_ <= other.score_ + 1e-12


def test_a_feature_that_says_nothing_gets_a_wide_bandwidth(generator):
    x, y = table(generator)
    one, each = (KernelRegressor(bandwidth=how).fit(x, y) for how in ("leave one out", "leave one out per feature"))
    assert each.score_ < 0.5 * one.score_
    assert each.bandwidth_[1] > 10 * each.bandwidth_[0]


def test_weights_make_the_prediction(generator):
    x, y = table(generator)
    rows = torch.rand(5, 2, generator=generator, dtype=torch.float64) * 4
    for kernel in KERNELS:
        model = KernelRegressor(kernel).fit(x, y)
        weights = model.weights(rows)
        torch.testing.assert_close(weights.sum(-1), torch.ones(5, dtype=torch.float64))
        torch.testing.assert_close(weights @ y, model.predict(rows))


def test_several_targets_are_several_tables(generator):
    x, y = table(generator)
    both = KernelRegressor(bandwidth=0.5).fit(x, torch.stack([y, 2 * y], 1))
    torch.testing.assert_close(both.predict(x)[:, 1], 2 * KernelRegressor(bandwidth=0.5).fit(x, y).predict(x))


def test_arrays_are_tables_too(generator):
    x, y = table(generator)
    a = KernelRegressor(bandwidth=0.5).fit(x.numpy(), y.numpy()).predict(x.numpy().astype(np.float32))
    torch.testing.assert_close(a, KernelRegressor(bandwidth=0.5).fit(x, y).predict(x), rtol=1e-4, atol=1e-4)


def test_rows_out_of_reach_are_zero_counted_and_reported(generator):
    x, y = table(generator)
    model = KernelRegressor("boxcar", 0.5).fit(x, y + 10.0)
    rows = torch.cat([x[:3], x[:2] + 100.0])
    with pytest.warns(UserWarning, match="2 of 5 rows have no sample within the bandwidth"):
        out = model.predict(rows)
    assert model.empty_ == 2 and (out[3:] == 0).all() and (out[:3] > 5).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(x)
    assert model.empty_ == 0


def test_real_data_is_predicted_as_well_as_by_the_radius_neighbours_of_scikit_learn():
    datasets, neighbors = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.neighbors")
    x, y = datasets.load_diabetes(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    train, test = slice(0, 300), slice(300, None)
    model = KernelRegressor("epanechnikov", 4.0).fit(x[train], y[train])
    h = float(model.bandwidth_)
    peer = neighbors.RadiusNeighborsRegressor(h, weights=lambda d: np.array([1 - (u / h) ** 2 for u in d], object))
    reach = (np.linalg.norm(x[test][:, None] - x[None, train], axis=-1) < h).any(1)
    ours = model.predict(x[test][reach]).numpy()
    np.testing.assert_allclose(ours, peer.fit(x[train], y[train]).predict(x[test][reach]).astype(float), rtol=1e-8)
    gap = (ours - y[test][reach]) ** 2
    assert gap.mean() < 0.7 * y[test].var()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: KernelRegressor("box"), "unknown kernel 'box': did you mean 'boxcar'"),
        (lambda: KernelRegressor(bandwidth=-1.0), "bandwidth: expected a positive number"),
        (lambda: KernelRegressor(bandwidth="loo"), "bandwidth: expected a number, 'leave one out'"),
        (lambda: KernelRegressor("boxcar", "leave one out per feature"), "the boxcar has no gradient"),
        (lambda: KernelRegressor(degree=3), "degree: expected 0, 1 or 2"),
        (lambda: KernelRegressor().predict(torch.ones(2, 2)), "fit: call it before"),
        (lambda: KernelRegressor().fit(torch.ones(3), torch.ones(3)), "x: expected 2 dimensions"),
        (lambda: KernelRegressor().fit(torch.ones(3, 1), torch.ones(2)), r"y: expected shape \(n,\)"),
        (lambda: KernelRegressor().fit(torch.ones(2, 1), torch.ones(2)), "needs at least 3 samples"),
        (lambda: KernelRegressor().fit(torch.ones(5, 1), torch.ones(5)), "all samples are the same"),
        (lambda: KernelRegressor().fit(torch.full((5, 1), torch.nan), torch.ones(5)), "x: expected finite numbers"),
        (lambda: KernelRegressor(bandwidth=1.0).fit(torch.eye(3), torch.ones(3)).predict(torch.eye(2)), "3 features"),
    ],
)
def test_wrong_input_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
