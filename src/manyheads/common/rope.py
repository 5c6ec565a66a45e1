"""Rotary position embedding by logical positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Integer
from torch import Tensor


@dataclass(frozen=True)
class RoPE:
    r"""Rotates pairs of channels by an angle proportional to the position of the token.

    Pair $m$ of width $R$ at position $p$ turns by $\theta = p \cdot base^{-2m/R} / factor$:

    $$(x_a, x_b) \mapsto (x_a\cos\theta - x_b\sin\theta,\; x_a\sin\theta + x_b\cos\theta)$$

    so that the product of a rotated query and a rotated key depends only on the difference of positions.

    Args:
        base: Base of the frequencies, > 1.
        width: Number of leading channels R that turn, even; default all.
        interleaved: Pairs are neighbouring channels (2m, 2m+1) if true (GPT-J), else (m, m + R/2) (Llama).
        factor: Divides every position (linear interpolation of positions), > 0.

    Raises:
        ValueError: A base of at most 1, an odd or non-positive width, a non-positive factor.

    Conventions:
        Positions are logical: the same numbers that decide masks, whatever the order of storage. Angles are
        computed in float64 and the rotation in float32 (float64 for float64 input), so that positions beyond
        a million keep their angle.

    Source:
        Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv 2104.09864.

    Example:
        >>> x = torch.tensor([1.0, 0.0]).expand(1, 1, 3, 2)
        >>> RoPE()(x, torch.arange(3))[0, 0, :, 0]        # the cosine of 0, 1, 2
        tensor([ 1.0000,  0.5403, -0.4161])
    """

    base: float = 10000.0
    width: int | None = None
    interleaved: bool = False
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise ValueError(f"base: expected a number above 1, got {self.base}")
        if self.width is not None and (self.width < 2 or self.width % 2):
            raise ValueError(f"width: expected an even number of at least 2, got {self.width}")
        if not self.factor > 0:
            raise ValueError(f"factor: expected a number above 0, got {self.factor}")

    def __call__(self, x: Float[Tensor, "B H N D"], positions: Integer[Tensor, "... N"]) -> Float[Tensor, "B H N D"]:
        """Rotates queries or keys.

        Args:
            x: (B, H, N, D), floating, D at least the rotated width.
            positions: Integer logical positions (N,) or (B, N).

        Returns:
            The rotated tensor, shape and dtype of ``x``.

        Raises:
            ValueError: Positions of another length, or a width beyond D.
            TypeError: Positions that are not integers.
        """
        rotated = x.shape[-1] if self.width is None else self.width
        if rotated > x.shape[-1] or rotated % 2:
            raise ValueError(f"x: expected an even head width of at least {rotated}, got {x.shape[-1]}")
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise TypeError(f"positions: expected integers, got {positions.dtype}")
        if positions.shape not in ((x.shape[2],), (x.shape[0], x.shape[2])):
            raise ValueError(
                f"positions: expected (N,) or (B, N) = {(x.shape[0], x.shape[2])}, got {tuple(positions.shape)}"
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        cos, sin = (t.to(dtype) for t in self._table(positions.to(x.device), rotated))
        turning, rest = x[..., :rotated].to(dtype), x[..., rotated:]
        if self.interleaved:
            a, b = turning[..., ::2], turning[..., 1::2]
            turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
        else:
            a, b = turning.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return torch.cat((turned.to(x.dtype), rest), dim=-1)

    def _table(self, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle, (1 or B, 1, N, width / 2), float64."""
        pair = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
        angle = positions.to(torch.float64)[..., None] * (self.base ** (-pair / width) / self.factor)
        angle = angle[None, None] if positions.ndim == 1 else angle[:, None]
        return angle.cos(), angle.sin()
