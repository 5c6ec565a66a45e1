"""An encoder around any mechanism that reads in both directions."""

from __future__ import annotations

from torch import Tensor

from manyheads.mask import Full, Mask, as_mask

from .block import Stack
from .config import Config


class Encoder(Stack):
    """Describes every token in the light of all others.

    Args:
        config: What it is made of; every mixer must have a form that is not causal.

    Raises:
        ValueError: A short convolution, which looks back only.

    Example:
        >>> import torch
        >>> model = Encoder(Config(100, outputs=3, tied=False, mixers="linear"))
        >>> model(torch.randint(100, (2, 10))).shape
        torch.Size([2, 10, 3])
        >>> model.pooled(torch.randint(100, (2, 10))).shape
        torch.Size([2, 3])
    """

    def __init__(self, config: Config) -> None:
        """Draws all weights from torch's generator."""
        if config.conv:
            raise ValueError(f"conv: the short convolution is causal; an encoder takes none, got {config.conv}")
        super().__init__(config)

    def forward(self, x: Tensor, *, mask: Mask | str | None = None) -> Tensor:
        """Reads a whole sequence.

        Args:
            x: Token ids ``(B, N)``, or with ``tokens=False`` floats ``(B, N, inputs)``.
            mask: Packed documents, or whatever all mixers understand.

        Returns:
            ``(B, N, outputs)``.

        Raises:
            ValueError: Input of another shape.
            UnsupportedError: A mixer without a form that is not causal, or a mask that it does not declare.
        """
        return self.head(self.hidden(x, mask=mask))

    def hidden(self, x: Tensor, *, mask: Mask | str | None = None) -> Tensor:
        """The states ``(B, N, C)`` before the output."""
        return self.run(x, Full() if mask is None else as_mask(mask))

    def pooled(self, x: Tensor) -> Tensor:
        """One output ``(B, outputs)`` for each sequence: that of the mean over its tokens."""
        return self.head(self.hidden(x).mean(1))
