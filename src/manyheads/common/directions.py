"""Random directions for feature maps: independent ones, and blocks of orthogonal ones."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import unknown

Norms = Literal["chi", "constant"]


def gaussian(
    features: int,
    width: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "features width"]:
    """Draws independent normal rows.

    Args:
        features: Rows m.
        width: Channels D.
        generator: Source of randomness on the CPU; torch's default when missing.
        dtype: Dtype of the result.
        device: Where to put the result.

    Returns:
        (m, D).

    Raises:
        ValueError: For numbers below 1.

    Example:
        >>> gaussian(5, 3).shape
        torch.Size([5, 3])
    """
    _sizes(features, width)
    return torch.randn(features, width, generator=generator, dtype=torch.float64).to(device, dtype)


def orthogonal(
    features: int,
    width: int,
    *,
    norms: Norms = "chi",
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "features width"]:
    r"""Draws rows that are orthogonal within every block of ``width``, each by itself distributed as a normal vector.

    Blocks come from the QR decomposition of normal matrices. The signs that the decomposition fixes are drawn back,
    without which every row would lie in one half of the space and the estimates would be biased.

    Args:
        features: Rows m.
        width: Channels D.
        norms: ``"chi"`` draws each row's length as that of a normal vector; ``"constant"`` takes the square root of D.
        generator: Source of randomness on the CPU; torch's default when missing.
        dtype: Dtype of the result.
        device: Where to put the result.

    Returns:
        (m, D).

    Raises:
        ValueError: For numbers below 1 or unknown norms.

    Example:
        >>> w = orthogonal(4, 4, norms="constant", dtype=torch.float64)
        >>> torch.allclose(w @ w.T, 4 * torch.eye(4, dtype=torch.float64))
        True
    """
    _sizes(features, width)
    if norms not in ("chi", "constant"):
        raise unknown("norms", norms, ("chi", "constant"))
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    blocks = -(-features // width)
    q, r = torch.linalg.qr(draw(blocks, width, width))
    rows = (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]).mT.flatten(0, 1)[:features]
    length = draw(features, width).norm(dim=1) if norms == "chi" else torch.full((features,), width**0.5).double()
    return (rows * length[:, None]).to(device, dtype)


def _sizes(features: int, width: int) -> None:
    if features < 1 or width < 1:
        raise ValueError(f"features: expected at least one row and one channel, got {features} and {width}")
