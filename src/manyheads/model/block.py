"""The block that decoder and encoder share, and the stack around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.mask import Mask
from manyheads.nn import ShortConv

from .config import Config
from .mixers import build
from .position import Added, within_documents


class FeedForward(nn.Module):
    """``W3 (silu(W1 x) * W2 x)``, or without a gate ``W2 gelu(W1 x)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gated = config.gated
        self.up = nn.Linear(config.width, config.inner * (2 if config.gated else 1), bias=False)
        self.down = nn.Linear(config.inner, config.width, bias=False)
        nn.init.normal_(self.up.weight, std=config.width**-0.5)
        nn.init.normal_(self.down.weight, std=(2 * config.depth * config.inner) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(..., C)`` to ``(..., C)``."""
        if not self.gated:
            return self.down(F.gelu(self.up(x)))
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Memory(NamedTuple):
    """What one block remembers between steps: the last inputs of its convolution, the cache of its mixer."""

    conv: Tensor | None = None
    mixer: Any = None


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + feed_forward(norm(x))``.

    Args:
        config: Sizes.
        mixer: Name of the mixer with its options.
        layer: Number of the layer, from 0.
    """

    def __init__(self, config: Config, mixer: str, layer: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width)
        self.conv = ShortConv(config.width, config.conv, activation="none") if config.conv else None
        self.mixer = build(mixer, config, layer)
        self.norm = nn.RMSNorm(config.width)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, *, mask: Mask) -> Tensor:
        """From ``(B, N, C)`` to ``(B, N, C)``."""
        inner = self.mixer_norm(x)
        if self.conv is not None:
            inner = inner + self.conv(inner, mask=mask)
        x = x + self.mixer(inner, mask=mask)
        return x + self.feed_forward(self.norm(x))

    def step(self, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """One token ``(B, C)``."""
        inner, conv = self.mixer_norm(x), memory.conv
        if self.conv is not None:
            short, conv = self.conv.step(inner, conv)
            inner = inner + short
        step: Callable[..., tuple[Tensor, Any]] = getattr(self.mixer, "step")  # noqa: B009 (a mixer need not have one)
        mixed, kept = step(inner, memory.mixer)
        x = x + mixed
        return x + self.feed_forward(self.norm(x)), Memory(conv, kept)


class Stack(nn.Module):
    """Embedding, blocks, last norm and output: everything but the direction of reading.

    Args:
        config: What it is made of.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, outputs = config.width, config.outputs or config.inputs
        self.embed: nn.Embedding | nn.Linear
        if config.tokens:
            self.embed = nn.Embedding(config.inputs, width)
            nn.init.normal_(self.embed.weight, std=width**-0.5)
        else:
            self.embed = nn.Linear(config.inputs, width)
        self.position = Added(config.position, width)
        self.blocks = nn.ModuleList([Block(config, name, layer) for layer, name in enumerate(config.layers)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, outputs, bias=False)
        nn.init.normal_(self.head.weight, std=width**-0.5)
        if config.tied:
            self.head.weight = self.embed.weight

    def run(self, x: Tensor, mask: Mask) -> Tensor:
        """The hidden states ``(B, N, C)`` after the last norm."""
        self._expect(x, 2)
        at = within_documents(mask, x.shape[1]).to(x.device)
        hidden = self.position(self.embed(x), at)
        for block in self.layers:
            hidden = block(hidden, mask=mask)
        return self.norm(hidden)

    def parameter_count(self, *, embedding: bool = True) -> int:
        """How many numbers are learned, shared ones once.

        Args:
            embedding: Whether the embedding and an output of its own count.

        Returns:
            The count.
        """
        every = {p: p.numel() for p in self.parameters()}
        outside = {self.embed.weight, self.head.weight}
        return sum(count for p, count in every.items() if embedding or p not in outside)

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def _expect(self, x: Tensor, dims: int) -> None:
        config = self.config
        if config.tokens:
            if x.dim() != dims or x.is_floating_point():
                want = "(B, N)" if dims == 2 else "(B,)"
                raise ValueError(f"tokens: expected integers {want}, got {x.dtype} of shape {tuple(x.shape)}")
        elif x.dim() != dims + 1 or x.shape[-1] != config.inputs:
            want = f"(B, N, {config.inputs})" if dims == 2 else f"(B, {config.inputs})"
            raise ValueError(f"input: expected shape {want}, got {tuple(x.shape)}")
