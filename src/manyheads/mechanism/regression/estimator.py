"""Kernel regression on tables: fit, predict, look at the weights; bandwidths by leaving one sample out."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from .nadaraya_watson import kernel_named, kernel_weights, nadaraya_watson
from .polynomial import local_polynomial

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
Choice = Literal["leave one out", "leave one out per feature"]


class KernelRegressor:
    r"""Nadaraya-Watson, local linear or local quadratic regression of a table.

    The prediction at x is the value there of the polynomial of the given degree that fits the samples best under
    weights that fall with their distance: attention with one head, samples for keys, targets for values.

    Args:
        kernel: One of :data:`~manyheads.mechanism.regression.KERNELS`.
        bandwidth: A number in units of the features, or how to choose it: ``"leave one out"`` takes the one that
            predicts every sample best from the others, ``"leave one out per feature"`` refines that to one per feature
            by gradients (not for the boxcar, which has none).
        degree: 0, 1 or 2.
        ridge: Of degrees above 0, relative to weights that sum to one.

    Attributes:
        bandwidth_: After :meth:`fit`, the bandwidth: a tensor ``()`` or ``(features,)``.
        score_: Mean squared error of leaving one out, at that bandwidth.
        empty_: How many queries of the last prediction had no sample within reach. They are predicted as 0.

    Raises:
        ValueError: A kernel, bandwidth or degree that does not exist.

    Conventions:
        Everything is float64. Bring features to one scale first. Predictions come as tensors.

    Source:
        Nadaraya, On estimating regression, 1964; Watson, Smooth regression analysis, 1964; cross-validation after
        Stone, 1974.

    Example:
        >>> x = torch.linspace(0, 1, 9)[:, None]
        >>> model = KernelRegressor(bandwidth=0.05).fit(x, x[:, 0] ** 2)
        >>> model.predict(torch.tensor([[0.5]])).round(decimals=2).tolist()
        [0.25]
        >>> model.weights(torch.tensor([[0.5]])).argmax().item()
        4
    """

    bandwidth_: Tensor
    score_: float
    empty_: int = 0
    _x: Tensor
    _y: Tensor

    def __init__(
        self,
        kernel: str = "gaussian",
        bandwidth: float | Choice = "leave one out",
        degree: int = 0,
        ridge: float = 1e-6,
    ) -> None:
        self.kernel = kernel_named(kernel).name
        if degree not in (0, 1, 2):
            raise ValueError(f"degree: expected 0, 1 or 2, got {degree!r}")
        if isinstance(bandwidth, str):
            if bandwidth not in ("leave one out", "leave one out per feature"):
                raise ValueError(
                    f"bandwidth: expected a number, 'leave one out' or 'leave one out per feature', got {bandwidth!r}"
                )
            if kernel == "boxcar" and bandwidth.endswith("feature"):
                raise ValueError("bandwidth: the boxcar has no gradient to choose one per feature by")
        elif not 0.0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth: expected a positive number, got {bandwidth}")
        self.bandwidth, self.degree, self.ridge = bandwidth, degree, ridge

    def fit(self, x: Any, y: Any) -> KernelRegressor:
        """Keeps the samples and chooses the bandwidth.

        Args:
            x: Features (n, d), a tensor or array, finite.
            y: Targets (n,) or (n, t).

        Returns:
            Itself.

        Raises:
            ValueError: Shapes that do not fit, numbers that are not finite, or too few samples to leave one out.
        """
        self._x, self._y = _table("x", x, 2), _table("y", y)
        if self._y.dim() not in (1, 2) or len(self._y) != len(self._x):
            raise ValueError(f"y: expected shape (n,) or (n, t) with n={len(self._x)}, got {tuple(self._y.shape)}")
        if isinstance(self.bandwidth, str):
            if len(self._x) < 3:
                raise ValueError(f"x: leaving one out needs at least 3 samples, got {len(self._x)}")
            self.bandwidth_ = self._search()
            if self.bandwidth == "leave one out per feature":
                self.bandwidth_ = self._refine(self.bandwidth_)
        else:
            self.bandwidth_ = torch.tensor(self.bandwidth, dtype=torch.float64)
        self.score_ = float(self._loss(self.bandwidth_)) if len(self._x) > 1 else math.nan
        return self

    def predict(self, x: Any) -> Tensor:
        """Evaluates the fit.

        Args:
            x: (m, d).

        Returns:
            (m,) or (m, t). A row with no sample within reach is 0, counted in ``empty_``, and warned of.

        Raises:
            ValueError: Another number of features.
        """
        x = self._rows(x)
        out = self._estimate(x, self._targets(), self.bandwidth_)
        mass = self._mass(x)
        self.empty_ = int((mass == 0).sum())
        if self.empty_:
            warnings.warn(
                f"{self.empty_} of {len(x)} rows have no sample within the bandwidth and are predicted as 0; "
                "use a larger bandwidth, or a kernel without an edge",
                stacklevel=2,
            )
        return out[:, 0] if self._y.dim() == 1 else out

    def leave_one_out(self) -> Tensor:
        """Predicts every sample from the others: (n,) or (n, t)."""
        out = self._estimate(self._x, self._targets(), self.bandwidth_, alone=True)
        return out[:, 0] if self._y.dim() == 1 else out

    def weights(self, x: Any) -> Tensor:
        """The weight of every sample at each row, (m, n): rows sum to one, or are zero; degree 0 averages with them."""
        q, k = self._rows(x)[None, None], self._x[None, None]
        return kernel_weights(q, k, kernel=self.kernel, bandwidth=self._shaped(self.bandwidth_)).out[0, 0]

    def _mass(self, x: Tensor) -> Tensor:
        one = torch.ones_like(self._x[:, :1])[None, None]
        got = nadaraya_watson(x[None, None], self._x[None, None], one, kernel=self.kernel,
                              bandwidth=self._shaped(self.bandwidth_))  # fmt: skip
        assert isinstance(got, Tensor)
        return got[0, 0, :, 0]

    def _estimate(self, x: Tensor, y: Tensor, bandwidth: Tensor, alone: bool = False) -> Tensor:
        return local_polynomial(
            x[None, None], self._x[None, None], y[None, None], degree=self.degree, kernel=self.kernel,
            bandwidth=self._shaped(bandwidth), ridge=self.ridge, leave_one_out=alone,
        )[0, 0]  # fmt: skip

    def _loss(self, bandwidth: Tensor) -> Tensor:
        """Mean squared error of leaving one out; an empty window predicts the mean."""
        y = self._targets()
        middle = y.mean(0)
        return (self._estimate(self._x, y - middle, bandwidth, alone=True) - (y - middle)).square().mean()

    def _search(self) -> Tensor:
        """The best of a grid from a thousandth of the widest distance to four of it, then golden section around it."""
        apart = torch.pdist(self._x)
        apart = apart[apart > 0]
        if not len(apart):
            raise ValueError("x: all samples are the same; there is no bandwidth to choose")
        far = math.log(float(apart.max()))
        logs = torch.linspace(far + math.log(1e-3), far + math.log(4.0), 28, dtype=torch.float64)
        with torch.no_grad():
            losses = [self._tried(h) for h in logs.exp()]
            at = min(range(len(losses)), key=losses.__getitem__)
            low, high = float(logs[max(at - 1, 0)]), float(logs[min(at + 1, len(logs) - 1)])
            best = (losses[at], float(logs[at]))
            for _ in range(16):
                left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
                a, b = ((self._tried(torch.tensor(x, dtype=torch.float64).exp()), x) for x in (left, right))
                best = min(best, a, b)
                low, high = (low, right) if a[0] <= b[0] else (left, high)
        return torch.tensor(best[1], dtype=torch.float64).exp()

    def _tried(self, bandwidth: Tensor) -> float:
        try:
            return float(self._loss(bandwidth))
        except ValueError:  # with so few samples in reach, no polynomial is determined
            return math.inf

    def _refine(self, start: Tensor) -> Tensor:
        """One bandwidth per feature, by L-BFGS on the logarithms."""
        log = start.log().expand(self._x.shape[1]).clone().requires_grad_()
        optimiser = torch.optim.LBFGS([log], max_iter=60, line_search_fn="strong_wolfe")
        # beyond these a feature counts for nothing, or for everything
        reach = float(start.log()) - 4.0, float(start.log()) + 6.0

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self._loss(log.clamp(*reach).exp())
            loss.backward()
            return loss

        optimiser.step(closure)
        found = log.detach().clamp(*reach).exp()
        return found if float(self._loss(found)) <= float(self._loss(start)) else start.expand_as(found).clone()

    def _shaped(self, bandwidth: Tensor) -> Tensor:
        return bandwidth[None] if bandwidth.dim() else bandwidth

    def _targets(self) -> Tensor:
        return self._y[:, None] if self._y.dim() == 1 else self._y

    def _rows(self, x: Any) -> Tensor:
        if not hasattr(self, "_x"):
            raise ValueError("fit: call it before the fit is used")
        x = _table("x", x, 2)
        if x.shape[1] != self._x.shape[1]:
            raise ValueError(f"x: expected {self._x.shape[1]} features, got {x.shape[1]}")
        return x


def _table(name: str, given: Any, dims: int | None = None) -> Tensor:
    """A tensor in float64 from a tensor or an array."""
    t = torch.as_tensor(given).to(torch.float64)
    if dims is not None and t.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions (samples, features), got shape {tuple(t.shape)}")
    if not bool(t.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got {int((~t.isfinite()).sum())} that are not")
    return t
