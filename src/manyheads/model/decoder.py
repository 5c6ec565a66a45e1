"""A decoder around any mechanism: each token is computed from itself and those before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.common.errors import UnsupportedError
from manyheads.mask import Causal, Mask, as_mask

from .block import Memory, Stack
from .config import Config


class Cache(NamedTuple):
    """What a decoder remembers of the tokens so far.

    Attributes:
        blocks: One memory a block.
        position: How many tokens came.
    """

    blocks: tuple[Memory, ...]
    position: int = 0


class Decoder(Stack):
    r"""Predicts something at every token from that token and the earlier ones.

    $$x \leftarrow x + \mathrm{mixer}(\mathrm{norm}(x)), \qquad x \leftarrow x + W_3(\mathrm{silu}(W_1 \bar x) \odot
    W_2 \bar x), \quad \bar x = \mathrm{norm}(x)$$

    Args:
        config: What it is made of.

    Example:
        >>> torch.manual_seed(0)
        <...>
        >>> model = Decoder(Config(256, mixers=("linear", "softmax")))
        >>> model(torch.randint(256, (2, 10))).shape
        torch.Size([2, 10, 256])
        >>> model.generate(torch.tensor([[72, 105]]), 3).shape
        torch.Size([1, 5])
    """

    def __init__(self, config: Config) -> None:
        """Draws all weights from torch's generator."""
        super().__init__(config)

    def forward(self, x: Tensor, *, mask: Mask | str | None = None) -> Tensor:
        """Reads a whole sequence.

        Args:
            x: Token ids ``(B, N)``, or with ``tokens=False`` floats ``(B, N, inputs)``.
            mask: Packed documents as ``Document(lens)``; causality is added. Other masks go where every mixer
                understands them.

        Returns:
            ``(B, N, outputs)``.

        Raises:
            ValueError: Input of another shape.
            UnsupportedError: A mask that a mixer does not declare.
        """
        asked: Mask = Causal() if mask is None else as_mask(mask) & Causal()
        return self.head(self.run(x, asked))

    def step(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Reads one more token.

        Args:
            x: Token ids ``(B,)``, or floats ``(B, inputs)``.
            cache: What came before; nothing by default.

        Returns:
            ``(B, outputs)`` and the new cache. The old one stays as it was.

        Raises:
            UnsupportedError: A mixer has no step.
        """
        self._expect(x, 1)
        for block, name in zip(self.layers, self.config.layers, strict=True):
            if not hasattr(block.mixer, "step"):
                raise UnsupportedError(f"step: the mixer {name!r} reads whole sequences only")
        if cache is None:
            cache = Cache(tuple(Memory() for _ in self.layers))
        at = torch.full((1,), cache.position, device=x.device)
        hidden = self.position(self.embed(x)[:, None], at)[:, 0]
        kept = []
        for block, memory in zip(self.layers, cache.blocks, strict=True):
            hidden, memory = block.step(hidden, memory)
            kept.append(memory)
        return self.head(self.norm(hidden)), Cache(tuple(kept), cache.position + 1)

    @torch.no_grad()
    def generate(
        self, tokens: Tensor, count: int, *, temperature: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continues token sequences.

        Args:
            tokens: ``(B, N)`` with N at least 1.
            count: Tokens to add.
            temperature: 0 takes the likeliest token; above, tokens are drawn from the softmax of logits over it.
            generator: Draws the tokens.

        Returns:
            ``(B, N + count)``.

        Raises:
            ValueError: No token to continue, a negative count or temperature, a network that predicts no tokens.
            UnsupportedError: A mixer has no step.
        """
        config = self.config
        if not config.tokens or config.outputs not in (0, config.inputs):
            raise ValueError("generate: the network must predict the tokens that it reads")
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens: expected (B, N) with N at least 1, got {tuple(tokens.shape)}")
        if count < 0 or temperature < 0:
            raise ValueError(f"count, temperature: expected at least 0, got {count} and {temperature}")
        cache: Cache | None = None
        for token in tokens.unbind(1):
            logits, cache = self.step(token, cache)
        found = [tokens]
        for number in range(count):
            if temperature:
                odds = (logits / temperature).softmax(-1)
                token = torch.multinomial(odds, 1, generator=generator)[:, 0]
            else:
                token = logits.argmax(-1)
            found.append(token[:, None])
            if number + 1 < count:
                logits, cache = self.step(token, cache)
        return torch.cat(found, 1)


