"""What a small network is made of, as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from manyheads.common.rope import RoPE

from .mixers import parse
from .position import Learned, NoPE, Position, Sinusoidal, Slopes


@dataclass(frozen=True)
class Config:
    """A network of pre-norm blocks, each a mixer and a feed-forward layer.

    Attributes:
        inputs: Size of the vocabulary, or, with ``tokens=False``, channels of real-valued input.
        outputs: What comes out for each token; 0 for as many as ``inputs``.
        width: Channels C between blocks.
        depth: Number of blocks.
        heads: Heads of every mixer.
        kv_heads: Heads of keys and values where the mixer can share them; 0 for as many as ``heads``.
        mixers: Names of mixers, with options as in ``"rat(chunk=16)"``; repeated over the layers, so that
            ``("rat", "softmax(window=1024)")`` alternates.
        hidden: Channels inside the feed-forward layer; 0 for 8/3 C when gated (4 C when not), to a multiple of 8.
        gated: Feed-forward ``W3 (silu(W1 x) * W2 x)``, else ``W2 gelu(W1 x)``; neither has biases.
        position: How order is known. ``RoPE`` and ``Slopes`` act in the mixers that score pairs of tokens;
            recurrent mixers know order themselves. ``Learned`` and ``Sinusoidal`` are added to the embedding.
        conv: Width of a short causal convolution in front of every mixer, the same for all; 0 for none.
        tokens: Whether the input is token ids.
        tied: Whether embedding and output share their weight; needs tokens and as many outputs as inputs.

    Raises:
        ValueError: Numbers that do not fit together, an unknown mixer.
        TypeError: A position that is none.

    Example:
        >>> Config(256, depth=4, mixers=("rat(chunk=16)", "softmax(window=64)")).layers
        ('rat(chunk=16)', 'softmax(window=64)', 'rat(chunk=16)', 'softmax(window=64)')
    """

    inputs: int
    outputs: int = 0
    width: int = 64
    depth: int = 2
    heads: int = 4
    kv_heads: int = 0
    mixers: tuple[str, ...] | str = "softmax"
    hidden: int = 0
    gated: bool = True
    position: Position = RoPE()
    conv: int = 0
    tokens: bool = True
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("inputs", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("outputs", "kv_heads", "hidden", "conv"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or a positive number, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads={self.heads}, got {self.width}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads={self.heads}, got {self.kv_heads}")
        if not self.pattern:
            raise ValueError("mixers: expected at least one name, got none")
        for text in self.pattern:
            parse(text)
        kinds = (RoPE, NoPE, Slopes, Learned, Sinusoidal)
        if type(self.position) not in kinds:
            known = ", ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"position: expected one of {known}, got {type(self.position).__name__}")
        if self.tied and (not self.tokens or self.outputs not in (0, self.inputs)):
            raise ValueError("tied: embedding and output share a weight only if tokens come in and tokens go out")

    @property
    def pattern(self) -> tuple[str, ...]:
        """The mixers as a tuple."""
        return (self.mixers,) if isinstance(self.mixers, str) else tuple(self.mixers)

    @property
    def layers(self) -> tuple[str, ...]:
        """The mixer of each layer."""
        return tuple(self.pattern[i % len(self.pattern)] for i in range(self.depth))

    @property
    def inner(self) -> int:
        """Channels inside the feed-forward layer."""
        usual = 8 * self.width / 3 if self.gated else 4 * self.width
        return self.hidden or max(8, 8 * round(usual / 8))

    def replace(self, **changes: Any) -> Config:
        """The same with some fields changed."""
        return replace(self, **changes)
