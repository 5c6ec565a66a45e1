"""Attention as regression on a real table: which patients a prediction looks at, and what the steps beyond it gain."""

from __future__ import annotations

import torch

from manyheads.mechanism.regression import KernelRegressor, ridge_regression


def table() -> tuple[torch.Tensor, torch.Tensor]:
    """The diabetes table that scikit-learn carries; without scikit-learn, a made-up one of the same size."""
    try:
        from sklearn.datasets import load_diabetes
    except ImportError:
        x = torch.randn(442, 10, dtype=torch.float64)
        return x, 150 + 40 * x[:, 0] + 20 * torch.sin(x[:, 1]) + 40 * torch.randn(442, dtype=torch.float64)
    x, y = (torch.as_tensor(a, dtype=torch.float64) for a in load_diabetes(return_X_y=True))
    return (x - x.mean(0)) / x.std(0), y


def main() -> None:
    """Fits on 340 patients, predicts the other 102, and looks at the weights of one prediction."""
    torch.manual_seed(0)
    x, y = table()
    order = torch.randperm(len(x))
    train, test = order[:340], order[340:]
    middle = y[train].mean()

    def error(prediction: torch.Tensor) -> float:
        return float((prediction - y[test]).square().mean() / (y[test] - middle).square().mean())

    # Nadaraya-Watson: an average with weights that fall with distance; the bandwidth is chosen by leaving one out
    averaged = KernelRegressor("gaussian").fit(x[train], y[train])
    print("errors as shares of the error of the mean")
    print(f"average:      bandwidth {averaged.bandwidth_:.2f}, error {error(averaged.predict(x[test])):.3f}")

    # the same weights, but around every patient a line instead of a constant
    line = KernelRegressor("gaussian", degree=1, ridge=0.01).fit(x[train], y[train])
    print(f"local linear: bandwidth {line.bandwidth_:.2f}, error {error(line.predict(x[test])):.3f}")

    # one line for all: keys are patients, values their targets
    q, k, v = x[test][None, None], x[train][None, None], (y[train] - middle)[None, None, :, None]
    print(f"one line:     error {error(ridge_regression(q, k, v, ridge=30.0)[0, 0, :, 0] + middle):.3f}")

    weights = averaged.weights(x[test][:1])[0]
    led = weights.topk(3).indices.tolist()
    print(f"the first of them is an average over {int((weights > 1e-3).sum())} patients, led by {led}")


if __name__ == "__main__":
    main()
