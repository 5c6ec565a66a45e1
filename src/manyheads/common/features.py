"""Feature maps: small values that turn tokens into features whose products stand for a kernel.

A map is called on ``(..., D)`` and gives ``(..., M)``. Attention asks for :meth:`FeatureMap.scaled` instead, which may
keep a logarithm per token apart, so that features of any size stay representable. A new map is one frozen dataclass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from .directions import gaussian, orthogonal
from .errors import unknown
from .tracing import constant

__all__ = [
    "FeatureMap",
    "Pointwise",
    "Positive",
    "Powers",
    "Rectified",
    "Scaled",
    "Softmax",
    "Taylor",
    "Trigonometric",
    "gaussian",
    "orthogonal",
    "pair",
    "wide",
]


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """What every feature map can do; by itself it leaves tokens as they are.

    Attributes:
        positive: Whether products of features are never negative, so that they may be normalised by their sum.

    Example:
        >>> FeatureMap()(torch.ones(2, 3)).shape
        torch.Size([2, 3])
    """

    positive: ClassVar[bool] = False

    def __call__(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch M"]:
        """Features of tokens, in the dtype of ``x`` but at least float32."""
        features, log = self.scaled(x)
        return features if log is None else features * log.exp()[..., None]

    def scaled(self, x: Float[Tensor, "*batch D"]) -> tuple[Float[Tensor, "*batch M"], Float[Tensor, "*batch"] | None]:
        """Features divided by ``exp(log)`` of their token, and ``log``, or None for 0.

        The logarithm takes no gradient: no product of features times their ``exp(log)`` depends on it.
        """
        return wide(x), None

    def floored(self, x: Float[Tensor, "*batch D"]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """:meth:`scaled` with what a token adds to each of its features kept apart too, ``(...)``, or None for 0."""
        features, log = self.scaled(x)
        return features, None, log

    def times(self, factor: float) -> FeatureMap:
        """The map of ``factor * x``: where a scale of the scores goes."""
        return self if factor == 1.0 else Scaled(self, factor)


@dataclass(frozen=True, eq=False)
class Scaled(FeatureMap):
    """A map of tokens that are multiplied first.

    Args:
        inner: The map.
        factor: What multiplies.
    """

    inner: FeatureMap
    factor: float

    @property
    def positive(self) -> bool:  # type: ignore[override]
        """Whether products of features are never negative."""
        return self.inner.positive

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of the multiplied tokens."""
        return self.inner.scaled(wide(x) * self.factor)


@dataclass(frozen=True, eq=False)
class Pointwise(FeatureMap):
    """A positive function of every channel: ELU plus one, ReLU, exponential.

    Args:
        kind: ``"elu+1"``, ``"relu"`` or ``"exp"``.
        eps: Added to every feature, at least 0.

    Raises:
        ValueError: For an unknown kind or a negative ``eps``.

    Source:
        ELU plus one: Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236.

    Example:
        >>> Pointwise("elu+1")(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0.3679, 1.0000, 3.0000])
    """

    positive: ClassVar[bool] = True
    kind: Literal["elu+1", "relu", "exp"] = "elu+1"
    eps: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in _POINTWISE:
            raise unknown("pointwise feature map", self.kind, _POINTWISE)
        _not_negative("eps", self.eps)

    def scaled(self, x: Tensor) -> tuple[Tensor, None]:
        """The function of every channel."""
        out = _POINTWISE[self.kind](wide(x))
        return (out + self.eps if self.eps else out), None


@dataclass(frozen=True, eq=False)
class Softmax(FeatureMap):
    """A softmax over the channels of each token.

    Source:
        Shen et al., Efficient Attention, arXiv 1812.01243.

    Example:
        >>> Softmax()(torch.zeros(2)).tolist()
        [0.5, 0.5]
    """

    positive: ClassVar[bool] = True

    def scaled(self, x: Tensor) -> tuple[Tensor, None]:
        """The softmax."""
        return wide(x).softmax(-1), None


@dataclass(frozen=True, eq=False)
class Positive(FeatureMap):
    r"""Positive random features of the softmax kernel (FAVOR+).

    $$\phi(x) = \frac{1}{\sqrt m}\bigl[e^{w_i \cdot x - |x|^2/2} + \epsilon\bigr]_{i=1..m}, \qquad
    E\,\phi(q)\cdot\phi(k) = e^{q \cdot k} + 2\epsilon + \epsilon^2$$

    Hyperbolic features take each $w_i$ and $-w_i$ and have less variance. The largest exponent of each token is kept
    apart as its logarithm, so nothing overflows. Unlike in the published code, ``eps`` is added before anything is
    subtracted: every exponential has mean 1 over $w$, and so what it adds does not depend on the other tokens.

    Args:
        projection: (m, D), rows normal; see :func:`orthogonal` and :func:`gaussian`.
        hyperbolic: Whether to use 2 m features, of both signs.
        eps: A floor for every weight, at least 0.
        factor: Multiplies x first.

    Raises:
        ValueError: For a projection that is not a matrix or a negative ``eps``.

    Source:
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794, lemma 1.

    Example:
        >>> x = torch.tensor([0.6, 0.8])
        >>> w = gaussian(100_000, 2, generator=torch.Generator().manual_seed(0))
        >>> bool((Positive(w)(x) @ Positive(w)(x) - math.e).abs() < 0.05)
        True
    """

    positive: ClassVar[bool] = True
    projection: Tensor
    hyperbolic: bool = False
    eps: float = 0.0
    factor: float = 1.0

    def __post_init__(self) -> None:
        _matrix(self.projection)
        _not_negative("eps", self.eps)

    def times(self, factor: float) -> FeatureMap:
        """The map of ``factor * x``; the factor goes into the projection."""
        return self if factor == 1.0 else Positive(self.projection, self.hyperbolic, self.eps, self.factor * factor)

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features up to 2, and a logarithm per token."""
        y, floor, log = self.floored(x)
        if floor is not None:
            y = y + floor[..., None] if y.requires_grad else y.add_(floor[..., None])
        return y, log

    def floored(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The exponentials, what ``eps`` adds to each, and a logarithm per token."""
        x = wide(x)
        y = _projected(x, self.projection, self.factor)
        half = torch.linalg.vector_norm(x, dim=-1).square() * (self.factor**2 / 2)
        if self.hyperbolic:
            y = torch.cat([y, -y], -1)
        top, known = y.detach().amax(-1), half.detach()
        log = top - known
        if self.eps:
            log = log.clamp(min=math.log(self.eps))
            top = torch.maximum(top, log + known)
        if half.requires_grad:
            top = top + (half - known)  # 0, with a gradient: subtracting large halves would cost digits
        y = y.sub_(top[..., None]).exp_()  # in place: neither step needs what it overwrites to differentiate
        floor = (-log).exp() * self.eps if self.eps else None
        return y, floor, log - 0.5 * math.log(y.shape[-1])


@dataclass(frozen=True, eq=False)
class Trigonometric(FeatureMap):
    r"""Trigonometric random features of the softmax kernel: unbiased, of any sign, noisy where the kernel is small.

    $$\phi(x) = \frac{e^{|x|^2/2}}{\sqrt m}\bigl[\sin w_i \cdot x,\; \cos w_i \cdot x\bigr]_{i=1..m}$$

    Args:
        projection: (m, D), rows normal.
        factor: Multiplies x first.

    Raises:
        ValueError: For a projection that is not a matrix.

    Source:
        Rahimi and Recht, Random Features for Large-Scale Kernel Machines, 2007.

    Example:
        >>> Trigonometric(torch.zeros(3, 2))(torch.zeros(2)).round(decimals=4)
        tensor([0.0000, 0.0000, 0.0000, 0.5774, 0.5774, 0.5774])
    """

    projection: Tensor
    factor: float = 1.0

    def __post_init__(self) -> None:
        _matrix(self.projection)

    def times(self, factor: float) -> FeatureMap:
        """The map of ``factor * x``; the factor goes into the projection."""
        return self if factor == 1.0 else Trigonometric(self.projection, self.factor * factor)

    def scaled(self, x: Tensor) -> tuple[Tensor, None]:
        """The features as they are: their sizes carry a gradient."""
        x = wide(x)
        y = _projected(x, self.projection, self.factor)
        size = (torch.linalg.vector_norm(x, dim=-1).square() * (self.factor**2 / 2)).exp()
        return torch.cat([y.sin(), y.cos()], -1) * (size * self.projection.shape[0] ** -0.5)[..., None], None


@dataclass(frozen=True, eq=False)
class Rectified(FeatureMap):
    r"""Generalised random features: a ReLU of projections, $\mathrm{relu}(W x)/\sqrt m + \epsilon$.

    Args:
        projection: (m, D); None for none, features then being channels.
        eps: A floor for every feature.
        factor: Multiplies x first.

    Raises:
        ValueError: For a projection that is not a matrix or a negative ``eps``.

    Source:
        Choromanski et al., arXiv 2009.14794, section 2.2 (Performer-ReLU).

    Example:
        >>> Rectified(torch.tensor([[1.0], [-1.0]]), eps=0.0)(torch.tensor([2.0]))
        tensor([1.4142, 0.0000])
    """

    positive: ClassVar[bool] = True
    projection: Tensor | None = None
    eps: float = 1e-3
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.projection is not None:
            _matrix(self.projection)
        _not_negative("eps", self.eps)

    def times(self, factor: float) -> FeatureMap:
        """The map of ``factor * x``; the factor goes into the projection."""
        return self if factor == 1.0 else Rectified(self.projection, self.eps, self.factor * factor)

    def scaled(self, x: Tensor) -> tuple[Tensor, None]:
        """The features."""
        x = wide(x)
        if self.projection is None:
            y = x * self.factor
        else:
            y = _projected(x, self.projection, self.factor * self.projection.shape[0] ** -0.5)
        y = F.relu(y, inplace=not y.requires_grad)
        return (y + self.eps if y.requires_grad else y.add_(self.eps)), None


@dataclass(frozen=True, eq=False)
class Powers(FeatureMap):
    r"""Symmetric powers, whose products are powers of the dot product: $\phi(q) \cdot \phi(k) = (q \cdot k)^n$.

    The tensor power of order n with equal entries merged: $\binom{D + n - 1}{n}$ features instead of $D^n$.

    Args:
        order: The power n, at least 0.

    Raises:
        ValueError: For a negative order.

    Example:
        >>> q, k = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
        >>> Powers(2)(q)
        tensor([1.0000, 2.8284, 4.0000])
        >>> round(float(Powers(3)(q) @ Powers(3)(k)), 3) == float((q @ k) ** 3)
        True
    """

    order: int = 2

    def __post_init__(self) -> None:
        _not_negative("order", self.order)

    def width(self, channels: int) -> int:
        """Number of features of so many channels."""
        return math.comb(channels + self.order - 1, self.order) if self.order else 1

    def scaled(self, x: Tensor) -> tuple[Tensor, None]:
        """The merged products of channels."""
        x = wide(x)
        if self.order == 0:
            return torch.ones_like(x[..., :1]), None
        if self.order == 1:
            return x, None
        index, weight = _multisets(x.shape[-1], self.order)
        index, out = index.to(x.device), weight.to(x)
        for column in index.unbind(1):
            out = out * x.index_select(-1, column)
        return out, None


@dataclass(frozen=True, eq=False)
class Taylor(FeatureMap):
    r"""Orders of the exponential series: $\phi(q) \cdot \phi(k) = \sum_{n \in \mathrm{orders}} (q \cdot k)^n / n!$.

    Args:
        orders: The orders n, each at least 0 and named once.

    Raises:
        ValueError: For no orders, negative ones, or one named twice.

    Source:
        Mongaras and Larson, On the Expressiveness of Softmax Attention, arXiv 2507.23632.

    Example:
        >>> one = torch.ones(1)
        >>> float(Taylor((0, 1, 2))(one) @ Taylor((0, 1, 2))(one))
        2.5
    """

    orders: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if not self.orders or min(self.orders) < 0 or len(set(self.orders)) < len(self.orders):
            raise ValueError(f"orders: expected distinct numbers from 0, got {self.orders}")

    def width(self, channels: int) -> int:
        """Number of features of so many channels."""
        return sum(Powers(n).width(channels) for n in self.orders)

    def scaled(self, x: Tensor) -> tuple[Tensor, None]:
        """The powers of all orders, one after the other."""
        return torch.cat([Powers(n)(x) * math.factorial(n) ** -0.5 for n in self.orders], -1), None


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A tensor in the dtype of sums: float64 as it is, everything else float32."""
    return x if x.dtype == torch.float64 else x.float()


def pair(features: FeatureMap | tuple[FeatureMap, FeatureMap]) -> tuple[FeatureMap, FeatureMap]:
    """The maps of queries and keys; one map serves both.

    Raises:
        TypeError: For anything else.

    Example:
        >>> pair(Softmax())[0].positive
        True
    """
    maps = features if isinstance(features, tuple) else (features, features)
    if len(maps) != 2 or not all(isinstance(m, FeatureMap) for m in maps):
        raise TypeError(f"features: expected a FeatureMap or a pair of them, got {features!r}")
    return maps


_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "elu+1": lambda x: F.elu(x) + 1.0,
    "relu": torch.relu,
    "exp": torch.exp,
}


def _projected(x: Tensor, projection: Tensor, factor: float) -> Tensor:
    """A fresh ``x @ (factor * projection)^T``."""
    if x.shape[-1] != projection.shape[1]:
        raise ValueError(f"projection: expected shape (m, D={x.shape[-1]}), got {tuple(projection.shape)}")
    return x @ (projection.to(x) * factor).mT


def _matrix(projection: Tensor) -> None:
    if projection.dim() != 2 or not projection.shape[0] or not projection.is_floating_point():
        found = f"{projection.dtype} of shape {tuple(projection.shape)}"
        raise ValueError(f"projection: expected a floating (m, D) with m >= 1, got {found}")


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name}: expected a number from 0, got {value}")


@constant
def _multisets(channels: int, order: int) -> tuple[Integer[Tensor, "M n"], Float[Tensor, " M"]]:
    return _counted(channels, order)


@functools.cache
def _counted(channels: int, order: int) -> tuple[Tensor, Tensor]:
    """All sorted choices of channels, and the square root of how many entries of the tensor power each stands for."""
    with torch.inference_mode(False):
        index = torch.combinations(torch.arange(channels), order, with_replacement=True).view(-1, order)
        run = torch.ones(len(index), dtype=torch.float64)
        repeats = torch.ones(len(index), dtype=torch.float64)  # product of factorials of multiplicities
        for at in range(1, order):
            run = torch.where(index[:, at] == index[:, at - 1], run + 1, 1.0)
            repeats = repeats * run
        return index, (math.factorial(order) / repeats).sqrt()
