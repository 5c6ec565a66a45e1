"""How a network knows the order of its tokens, as values; rotations are ``manyheads.common.rope.RoPE``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manyheads.common.rope import RoPE
from manyheads.mask import Document, Mask


@dataclass(frozen=True)
class NoPE:
    """No positions: a causal network still knows order through its masks and recurrences."""


@dataclass(frozen=True)
class Slopes:
    """A penalty on distance for each head (ALiBi), with the slopes of a geometric sequence.

    Head h of H gets the slope ``2 ** (-8 (h + 1) / H)``; where H is no power of two, the slopes of the next smaller
    one come first, then every second one of the next larger, as the authors have it.

    Source:
        Press et al., Train Short, Test Long, arXiv 2108.12409, section 3.
    """

    def of(self, heads: int) -> Tensor:
        """The slopes ``(heads,)``, float32.

        Example:
            >>> Slopes().of(2)
            tensor([0.0625, 0.0039])
        """
        whole = 1 << (heads.bit_length() - 1)
        found = [2.0 ** (-8 * (h + 1) / whole) for h in range(whole)]
        found += [2.0 ** (-4 * (h + 1) / whole) for h in range(0, 2 * (heads - whole), 2)]
        return torch.tensor(found)


@dataclass(frozen=True)
class Learned:
    """A learned vector for each position, added to the embedding.

    Attributes:
        length: Positions there are; longer input is an error.
    """

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length: expected a positive number of positions, got {self.length}")


@dataclass(frozen=True)
class Sinusoidal:
    """Sines and cosines of the position, added to the embedding.

    Attributes:
        base: Base of the wavelengths, > 1.

    Source:
        Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.5.
    """

    base: float = 10000.0

    def __post_init__(self) -> None:
        if not self.base > 1:
            raise ValueError(f"base: expected a number above 1, got {self.base}")


Position = RoPE | NoPE | Slopes | Learned | Sinusoidal


class Added(nn.Module):
    """What positions add to embeddings: something for ``Learned`` and ``Sinusoidal``, nothing for the others.

    Args:
        position: The value.
        width: Channels.
    """

    def __init__(self, position: Position, width: int) -> None:
        super().__init__()
        self.position, self.width = position, width
        if isinstance(position, Learned):
            self.table = nn.Parameter(torch.empty(position.length, width))
            nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        """Adds to each token what its position is worth.

        Args:
            x: ``(B, N, C)``.
            at: Positions ``(N,)`` or ``(B, N)``, integers.

        Raises:
            ValueError: A position beyond a learned table.
        """
        if isinstance(self.position, Learned):
            if at.numel() and int(at.max()) >= self.position.length:
                raise ValueError(f"position: {int(at.max())} is beyond the learned length {self.position.length}")
            return x + self.table[at]
        if isinstance(self.position, Sinusoidal):
            pair = torch.arange(0, self.width, 2, device=x.device, dtype=torch.float64)
            angle = at[..., None].double() * self.position.base ** (-pair / self.width)
            waves = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., : self.width]
            return x + waves.to(x.dtype)
        return x


def within_documents(mask: Mask | None, length: int) -> Tensor:
    """The position of each token in its document, ``(N,)`` or ``(B, N)``; without documents 0, 1, 2 and so on.

    Args:
        mask: A mask, with or without a ``Document`` in it.
        length: Tokens.

    Example:
        >>> within_documents(Document([2, 3]), 5)
        tensor([0, 1, 0, 1, 2])
    """
    parts = () if mask is None else (mask, *getattr(mask, "parts", ()))
    lens = next((torch.tensor(part.q_lens) for part in parts if isinstance(part, Document)), None)
    at = torch.arange(length)
    if lens is None:
        return at
    ends = lens.cumsum(-1)
    if lens.dim() == 2:
        at = at.expand(len(lens), -1).contiguous()
    document = torch.searchsorted(ends, at, right=True)
    return at - (ends - lens).gather(-1, document)
