"""Makes the tables and pictures of docs/regression.md: real data, fixed seeds, nothing typed by hand.

Run it with ``python docs/regression.py`` (a minute); it needs scikit-learn for the data and matplotlib for pictures.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from manyheads import attention  # noqa: E402
from manyheads.common.features import orthogonal  # noqa: E402
from manyheads.mechanism.regression import (  # noqa: E402
    KERNELS,
    KernelRegressor,
    Regression,
    kernel_weights,
    local_linear_attention,
    local_polynomial,
    nadaraya_watson,
    regress,
    ridge_regression,
)

PAGE = ROOT / "docs" / "regression.md"
IMAGES = ROOT / "docs" / "images"
FOLDS, SEED = 5, 0
RIDGES = (0.1, 1.0, 10.0, 30.0, 100.0, 300.0)
Fit = Callable[[Tensor, Tensor, Tensor], Tensor]


class Row(NamedTuple):
    """One line of the table: errors as shares of the variance of the targets.

    Attributes:
        name: The estimator.
        chosen: What leaving one out chose on all samples, in words.
        alone: Error of leaving one out, or None where the order of the samples counts.
        held: Mean error on the held-out folds.
        spread: Standard deviation over the folds.
    """

    name: str
    chosen: str
    alone: float | None
    held: float
    spread: float


class Method(NamedTuple):
    """A way of fitting with a knob, which leaving one out turns.

    Attributes:
        name: The estimator.
        knob: What is chosen, in words with a place for the number.
        grid: Its values.
        fit: From the value to ``fit(x, y, rows) -> predictions``.
        ordered: Whether the order of the samples counts; the knob is then chosen on a held-back fifth.
    """

    name: str
    knob: str
    grid: tuple[float, ...]
    fit: Callable[[float], Fit]
    ordered: bool = False


def diabetes() -> tuple[Tensor, Tensor]:
    """The diabetes table of scikit-learn, 442 patients and 10 features, standardised, in an order drawn once."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.as_tensor(a, dtype=torch.float64) for a in load_diabetes(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))
    x, y = x[order], y[order]
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std(correction=0)


# --- the steps from Nadaraya-Watson ------------------------------------------------------------------------------


def kernels() -> Iterator[tuple[str, KernelRegressor]]:
    """Nadaraya-Watson with every kernel, bandwidths by leaving one out."""
    for name in KERNELS:
        yield f"Nadaraya-Watson, {name}", KernelRegressor(name, 1.0 if name == "constant" else "leave one out")
    yield "Nadaraya-Watson, gaussian, a bandwidth per feature", KernelRegressor(bandwidth="leave one out per feature")
    yield "local linear, gaussian", KernelRegressor(degree=1, ridge=1e-2)


def methods() -> tuple[Method, ...]:
    """What is no kernel smoother: fits whose state does not grow, and the layers named after them."""
    directions = orthogonal(128, 10, generator=torch.Generator().manual_seed(SEED)).double()

    def fourier(x: Tensor, width: float = 8.0) -> Tensor:
        """Random features whose products are a Gaussian kernel."""
        angles = x @ directions.T / width
        return torch.cat([angles.sin(), angles.cos()], -1) * directions.shape[0] ** -0.5

    def one_step(step: float) -> Fit:
        config = Regression("linear-attention")
        return lambda x, y, rows: step / len(x) * _read(config, x, y, rows)

    def streamed(name: str, **gates: float) -> Callable[[float], Fit]:
        return lambda beta: lambda x, y, rows: _read(Regression(name), x, y, rows, beta=beta, **gates)

    steps = tuple(2.0**-i for i in range(10))
    return (
        Method("ridge regression", "ridge {:g}", RIDGES, lambda r: lambda x, y, rows: _ridge(x, y, rows, r)),
        Method("ridge regression on 256 Fourier features", "ridge {:g}", tuple(r / 100 for r in RIDGES),
               lambda r: lambda x, y, rows: _ridge(fourier(x), y, fourier(rows), r)),
        Method("linear attention (one gradient step)", "step {:g}", steps, one_step),
        Method("delta rule", "beta {:.2g}", tuple(b / 16 for b in steps), streamed("delta"), ordered=True),
        Method("Longhorn (implicit step)", "beta {:.2g}", steps, streamed("longhorn"), ordered=True),
        Method("delta rule, momentum 0.9", "beta {:.2g}", tuple(b / 64 for b in steps),
               streamed("momentum-delta", momentum=0.9), ordered=True),
        Method("recursive least squares", "ridge {:g}", RIDGES,
               lambda r: lambda x, y, rows: _read(Regression("least-squares", ridge=r), _one(x), y, _one(rows))),
        Method("softmax attention, keys of length one", "scale {:g}", (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0),
               lambda s: lambda x, y, rows: _heads(attention, _unit(rows), _unit(x), y, scale=s)),
        Method("local linear attention, keys of length one", "scale {:g}", (0.5, 1.0, 2.0, 4.0, 8.0),
               lambda s: lambda x, y, rows: _heads(
                   local_linear_attention, _unit(rows), _unit(x), y, scale=s, ridge=0.01)),
    )  # fmt: skip


def _heads(function: Callable[..., Tensor], q: Tensor, k: Tensor, y: Tensor, **options: float) -> Tensor:
    """A table as one head: rows are queries, samples keys, targets values."""
    return function(q[None, None], k[None, None], y[None, None, :, None], **options)[0, 0, :, 0]


def _one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _ridge(x: Tensor, y: Tensor, rows: Tensor, ridge: float) -> Tensor:
    return _heads(ridge_regression, _one(rows), _one(x), y, ridge=ridge)


def _read(config: Regression, x: Tensor, y: Tensor, rows: Tensor, **gates: float) -> Tensor:
    """Feeds the samples to a recurrent layer one after the other, then reads its map at the rows."""
    n = len(x)
    values = {name: torch.full((1, 1, n), value, dtype=x.dtype) for name, value in gates.items()}
    k, v = x[None, None], y[None, None, :, None]
    _, state = regress(k, k, v, config=config, return_state=True, **values)
    memory = state.S if hasattr(state, "m") else state.M
    return (rows @ memory[0, 0])[:, 0]


# --- the table --------------------------------------------------------------------------------------------------


def rows() -> Iterator[Row]:
    """Every line of the table, made now."""
    x, y = diabetes()
    for name, model in kernels():
        whole = model.fit(x, y)
        alone, found = whole.score_, whole.bandwidth_
        chosen = "" if name.endswith("constant") else _bandwidths(found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of empty windows, which predict the mean here: targets are centred
            yield Row(name, chosen, alone, *_held(lambda a, b, c, m=model: m.fit(a, b).predict(c), x, y))
    for method in methods():
        best, alone = _choose(method, x, y)
        held = _held(lambda a, b, c, m=method: m.fit(_choose(m, a, b)[0])(a, b, c), x, y)
        yield Row(method.name, method.knob.format(best), None if method.ordered else alone, *held)


def _bandwidths(found: Tensor) -> str:
    if not found.dim():
        return f"bandwidth {float(found):.2f}"
    return f"bandwidths {float(found.min()):.2g} to {float(found.max()):.2g}"


def _held(fit: Fit, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean and deviation over folds of the error on a fold of a fit to the others."""
    errors = []
    for fold in range(FOLDS):
        out = torch.arange(len(x)) % FOLDS == fold
        middle = y[~out].mean()
        errors.append(float((fit(x[~out], y[~out] - middle, x[out]) - (y[out] - middle)).square().mean()))
    found = torch.tensor(errors)
    return float(found.mean()), float(found.std())


def _choose(method: Method, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The knob with the least error, and that error."""
    tried = [(_alone(method, value, x, y), value) for value in method.grid]
    error, value = min(tried)
    return value, error


def _alone(method: Method, value: float, x: Tensor, y: Tensor) -> float:
    """Error of leaving one out; ten at a time where the fit has no shortcut, a last fifth where order counts."""
    fit = method.fit(value)
    if method.ordered:
        cut = len(x) * 4 // 5
        return float((fit(x[:cut], y[:cut], x[cut:]) - y[cut:]).square().nan_to_num(math.inf).mean())
    errors = torch.empty_like(y)
    parts = 44
    for part in range(parts):
        out = torch.arange(len(x)) % parts == part
        errors[out] = (fit(x[~out], y[~out], x[out]) - y[out]).square()
    return float(errors.mean())


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| estimator | chosen on all samples | left out | held out, 5 folds |", "|---|---|---|---|"]
    for row in found:
        alone = "" if row.alone is None else f"{row.alone:.3f}"
        lines.append(f"| {row.name} | {row.chosen} | {alone} | {row.held:.3f} ± {row.spread:.3f} |")
    return "\n".join(lines)


def written(found: list[Row], text: str) -> str:
    """The page with its table renewed."""
    begin, end = "<!-- generated: errors -->", "<!-- end of generated -->"
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{table(found)}\n{end}{rest.partition(end)[2]}"


# --- the pictures -----------------------------------------------------------------------------------------------


def wave() -> tuple[Tensor, Tensor, Tensor]:
    """A noisy wave on a line that is seen more densely on the left, and the places to read fits at."""
    generator = torch.Generator().manual_seed(SEED)
    x = (torch.rand(60, 1, generator=generator, dtype=torch.float64).square() * 5).sort(0).values
    y = torch.sin(2 * x[:, 0]) + x[:, 0] / 2 + 0.25 * torch.randn(60, generator=generator, dtype=torch.float64)
    return x, y, torch.linspace(-0.3, 5.3, 225, dtype=torch.float64)[:, None]


def pictures(folder: Path) -> list[Path]:
    """Draws all pictures.

    Args:
        folder: Where to.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams |= {"svg.hashsalt": "manyheads", "font.size": 8, "axes.spines.top": False,
                            "axes.spines.right": False, "legend.frameon": False, "savefig.dpi": 110}  # fmt: skip
    folder.mkdir(exist_ok=True)
    return [_fits(folder / "regression-fits.svg"), _weights(folder / "regression-weights.png"),
            _bandwidth_curves(folder / "regression-bandwidths.svg")]  # fmt: skip


def _fits(path: Path) -> Path:
    from matplotlib import pyplot as plt

    x, y, at = wave()
    h = 0.3
    lines = {
        "kernels, bandwidth 0.3": {
            name: _heads(nadaraya_watson, at, x, y, kernel=name, bandwidth=h)
            for name in ("boxcar", "triangular", "epanechnikov", "gaussian")
        },
        "bandwidths of the Gaussian": {
            f"h = {h:g}": _heads(nadaraya_watson, at, x, y, bandwidth=h) for h in (0.02, 0.3, 3.0)
        },
        "degrees, gaussian, bandwidth 0.3": {
            f"degree {p}": _heads(local_polynomial, at, x, y, degree=p, kernel="gaussian", bandwidth=h, ridge=1e-3)
            for p in (0, 1, 2)
        },
        "one map for all tokens": {
            "ridge regression": _ridge(x, y, at, 0.1),
            "linear attention, best step": _best_step(x, y, at),
            "delta rule": _read(Regression("delta"), _unit(_one(x)), y, _unit(_one(at)), beta=0.3),
        },
    }
    figure, axes = plt.subplots(2, 2, figsize=(8, 5), sharex=True, sharey=True, layout="constrained")
    for axis, (title, curves) in zip(axes.flat, lines.items(), strict=True):
        axis.plot(x[:, 0].numpy(), y.numpy(), ".", color="0.6", markersize=4)
        for name, curve in curves.items():
            axis.plot(at[:, 0].numpy(), curve.numpy(), label=name, linewidth=1.2)
        axis.set(title=title, ylim=(-1.2, 4.0))
        axis.legend(loc="upper left")
    return _saved(figure, path)


def _best_step(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Linear attention, times the one number that fits the samples best."""
    seen, there = (_read(Regression("linear-attention"), _one(x), y, _one(t)) for t in (x, at))
    return (seen @ y) / (seen @ seen) * there


def _weights(path: Path) -> Path:
    from matplotlib import pyplot as plt

    x, y, at = wave()
    figure, axes = plt.subplots(2, 4, figsize=(8, 4), layout="constrained", sharey=True)
    shown = {name: kernel_weights(at[None, None], x[None, None], kernel=name, bandwidth=0.3).out[0, 0]
             for name in KERNELS}  # fmt: skip
    eye = torch.eye(len(x), dtype=x.dtype)
    for p in (1, 2):  # what a linear estimator makes of unit vectors is its weights, which may be negative here
        shown[f"local, degree {p}"] = local_polynomial(
            at[None, None], x[None, None], eye[None, None], degree=p, kernel="gaussian", bandwidth=0.3, ridge=1e-3
        )[0, 0]
    for axis, (name, weights) in zip(axes.flat, shown.items(), strict=True):
        top = float(weights.abs().quantile(0.995))
        axis.imshow(weights.numpy(), aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest",
                    extent=(0, len(x), float(at[-1]), float(at[0])))  # fmt: skip
        axis.set(title=name)
    for axis in axes[-1]:
        axis.set(xlabel="sample")
    for axis in axes[:, 0]:
        axis.set(ylabel="query")
    return _saved(figure, path)


def _bandwidth_curves(path: Path) -> Path:
    from matplotlib import pyplot as plt

    x, y = diabetes()
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    grid = torch.logspace(-0.5, 1.2, 36, dtype=torch.float64)
    for name, degree in itertools.chain(((name, 0) for name in KERNELS if name != "constant"), [("gaussian", 1)]):
        errors = []
        for h in grid.tolist():
            errors.append(KernelRegressor(name, h, degree, ridge=1e-2).fit(x, y).score_)
        axis.plot(grid.numpy(), errors, label=f"local linear, {name}" if degree else name, linewidth=1.2)
    axis.set(xscale="log", xlabel="bandwidth", ylabel="error of leaving one out", ylim=(0.45, 1.3))
    axis.legend(ncols=2, loc="upper right")
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return path


def main() -> None:
    """Writes the table into the page, and the pictures."""
    found = []
    for row in rows():
        print(table([row]).splitlines()[-1], flush=True)
        found.append(row)
    PAGE.write_text(written(found, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for path in pictures(IMAGES):
        print(path.relative_to(ROOT), f"{path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
