"""Queries, keys and values with the structure that sparse mechanisms live on: needles, documents, videos, weights.

Normal inputs have no heavy keys for a selector to find. What is drawn here has some, by a rule that is written down and
with a fixed seed; what real layers give stands in ``manyheads.bench.suites.real``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from manyheads.common.errors import unknown

FRAME = (16, 16)
"""Rows and columns of a frame of a video."""
ASKING = 32
"""Neighbouring queries that look for the same needle."""
SPAN = 4
"""Tokens of a needle, and of the sink."""


class Inputs(NamedTuple):
    """One call's tensors.

    Attributes:
        q: (1, Hq, N, D).
        k: (1, Hkv, N, D).
        v: (1, Hkv, N, D).
        needles: Where needles begin, ascending, (n,); None where there are none.
        wanted: For each query the number of the needle that it looks for, -1 for none, (N,); None likewise.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    needles: Tensor | None = None
    wanted: Tensor | None = None


@dataclass(frozen=True)
class Shape:
    """Sizes of what is drawn.

    Attributes:
        tokens: N.
        heads: Query heads Hq.
        kv_heads: Key heads Hkv, a divisor of Hq.
        width: D, even, for queries, keys and values.
        dtype: Name of the dtype; everything is drawn in float32 and rounded once.
        seed: Of the draw.
    """

    tokens: int
    heads: int = 8
    kv_heads: int = 2
    width: int = 64
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ValueError: Sizes that make no call.
        """
        if min(self.tokens, self.heads, self.kv_heads, self.width) < 1 or self.heads % self.kv_heads:
            raise ValueError(f"heads: expected positive sizes and a multiple of the key heads, got {self}")
        if self.width % 2:
            raise ValueError(f"width: expected an even number, got {self.width}")

    def __str__(self) -> str:
        """As a row says it."""
        return f"1x{self.heads}:{self.kv_heads}x{self.tokens}x{self.width}"

    @property
    def generator(self) -> Generator:
        """A fresh source of numbers."""
        return Generator().manual_seed(self.seed)

    def normal(self, generator: Generator, heads: int) -> Tensor:
        """Standard normal (1, heads, N, D)."""
        return torch.randn(1, heads, self.tokens, self.width, generator=generator)

    def plain(self) -> tuple[Tensor, Tensor, Tensor, Generator]:
        """Normal q, k and v, and the generator that drew them."""
        generator = self.generator
        q, k, v = (self.normal(generator, heads) for heads in (self.heads, self.kv_heads, self.kv_heads))
        return q, k, v, generator

    def rounded(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors in the dtype."""
        return tuple(t.to(getattr(torch, self.dtype)) for t in tensors)


def draw(name: str, shape: Shape) -> Inputs:
    """Draws structured inputs.

    Args:
        name: One of ``KINDS``.
        shape: Sizes, dtype and seed.

    Returns:
        The inputs, the same for the same name and shape.

    Raises:
        ValueError: An unknown name; the nearest is suggested.

    Example:
        >>> draw("needles", Shape(512, heads=4, kv_heads=2, width=16)).k.shape
        torch.Size([1, 2, 512, 16])
    """
    if name not in KINDS:
        raise unknown("input", name, KINDS)
    return KINDS[name](shape)


def needles(shape: Shape) -> Inputs:
    """Noise in which a few short spans of keys are what some later queries look for.

    Every 512 tokens hold one needle of four keys along a direction of its own. Three in four blocks of 32 queries
    look for one of the needles before them, all heads for the same one, with logits that give it most of the weight;
    the others look for nothing.

    Args:
        shape: Sizes, dtype and seed.

    Returns:
        The inputs, with the places of the needles and who wants which.
    """
    q, k, v, generator = shape.plain()
    n, count = shape.tokens, max(1, shape.tokens // 512)
    room = n // count
    starts = torch.randint(max(1, room - SPAN), (count,), generator=generator) + room * torch.arange(count)
    ways = torch.randn(shape.kv_heads, count, shape.width, generator=generator)
    ways *= math.sqrt(shape.width) / ways.norm(dim=-1, keepdim=True)
    for number, start in enumerate(starts.tolist()):
        k[0, :, start : start + SPAN] = ways[:, number, None] + 0.1 * k[0, :, start : start + SPAN]
        v[0, :, start : start + SPAN] += 2.0 * torch.randn(shape.kv_heads, 1, shape.width, generator=generator)
    block = torch.arange(n) // ASKING
    ends = starts + SPAN
    before = (ends[None] <= (block * ASKING)[:, None]).sum(-1)  # needles that a block of queries has behind it
    chance = torch.rand(int(block[-1]) + 1, 2, generator=generator)[block]
    wanted = torch.where((before > 0) & (chance[:, 0] < 0.75), (chance[:, 1] * before).long(), -1)
    gain = (math.log(max(n, 2)) + 2.0) / math.sqrt(shape.width)
    asking = torch.where((wanted >= 0)[:, None], gain * ways[:, wanted.clamp(min=0)], torch.zeros(()))
    q += asking.repeat_interleave(shape.heads // shape.kv_heads, 0)[None]
    q, k, v = shape.rounded(q, k, v)
    return Inputs(q, k, v, starts, wanted)


def document(shape: Shape) -> Inputs:
    """Text-like: passages on topics that come back, nearby tokens that matter more, and a sink at the start.

    Passages have a geometric length of 192 tokens on average, each one of max(4, N / 512) topics. Queries and keys
    share their topic's direction (two logits) and low-frequency features of the position (three logits at distance 0,
    fading over some hundred tokens); every query gives the first four keys six logits.

    Args:
        shape: Sizes, dtype and seed.

    Returns:
        The inputs.
    """
    q, k, v, generator = shape.plain()
    n, width = shape.tokens, shape.width
    topics = max(4, n // 512)
    starts = torch.rand(n, generator=generator) < 1 / 192
    passage = starts.cumsum(0)
    topic = torch.randint(topics, (int(passage[-1]) + 1,), generator=generator)[passage]
    ways = torch.randn(shape.kv_heads, topics, width, generator=generator)
    ways = ways / ways.norm(dim=-1, keepdim=True)
    group, root = shape.heads // shape.kv_heads, math.sqrt(width)
    about = ways[:, topic] * math.sqrt(2.0 * root)
    near = _features(torch.arange(n)[:, None].float(), torch.logspace(1.5, 3.0, width // 2)[:, None], math.sqrt(3.0))
    k += (about + near)[None]
    q += (about.repeat_interleave(group, 0) + near)[None]
    sink = torch.randn(shape.kv_heads, 1, width, generator=generator)
    sink *= math.sqrt(6.0 * root) / sink.norm(dim=-1, keepdim=True)
    q += sink.repeat_interleave(group, 0)[None]
    k[0, :, :SPAN] = sink
    v += 0.7 * torch.randn(shape.kv_heads, topics, width, generator=generator)[:, topic][None]
    q, k, v = shape.rounded(q, k, v)
    return Inputs(q, k, v)


def video(shape: Shape) -> Inputs:
    """Video-like: frames of 16 x 16 tokens, row by row, whose scores fall off smoothly along three axes.

    Keys and queries hold random Fourier features of a Gaussian over (frame, row, column) of widths 2, 3 and 3, so that
    a token gives itself seven logits, its neighbours nearly as many and far ones none; half a unit of noise is added.

    Args:
        shape: Sizes, dtype and seed. The last frame may be cut.

    Returns:
        The inputs.
    """
    q, k, v, generator = shape.plain()
    at = torch.arange(shape.tokens)
    place = torch.stack((at // math.prod(FRAME), at // FRAME[1] % FRAME[0], at % FRAME[1]), -1).float()
    size = math.sqrt(7.0)
    fields = []
    for _ in range(shape.kv_heads):
        scale = 2 * math.pi * torch.tensor([2.0, 3.0, 3.0]) / torch.randn(shape.width // 2, 3, generator=generator)
        fields.append(_features(place, scale, size))
    field = torch.stack(fields)[None]
    k = 0.5 * k + field
    q = 0.5 * q + field.repeat_interleave(shape.heads // shape.kv_heads, 1)
    shade = torch.randn(shape.width, shape.width, generator=generator) / math.sqrt(shape.width)
    q, k, v = shape.rounded(q, k, 0.5 * v + field @ shade)
    return Inputs(q, k, v)


def columns(shape: Shape) -> Inputs:
    """Heavy keys, one in fifty, scattered over the sequence, which every later query wants: vertical lines of a mask.

    They have six logits for every query, give or take one, beside normal ones.

    Args:
        shape: Sizes, dtype and seed.

    Returns:
        The inputs.
    """
    q, k, v, generator = shape.plain()
    heavy = torch.rand(shape.kv_heads, shape.tokens, generator=generator) < 0.02
    size = 6.0 + torch.randn(shape.kv_heads, shape.tokens, generator=generator)
    k[0, :, :, -1] = torch.where(heavy, size, torch.zeros(()))
    q[..., -1] = math.sqrt(shape.width)
    q, k, v = shape.rounded(q, k, v)
    return Inputs(q, k, v)


def uneven(shape: Shape) -> Inputs:
    """Stretches of keys from heavy to negligible, and a sink: what a threshold can tell apart.

    The first four keys have 14 logits for every query; the others have normal logits whose deviation is drawn for each
    128 of them, uniformly up to 4.

    Args:
        shape: Sizes, dtype and seed.

    Returns:
        The inputs.
    """
    q, k, v, generator = shape.plain()
    size = 4 * torch.rand(-(-shape.tokens // 128), generator=generator).repeat_interleave(128)[: shape.tokens]
    k *= size[:, None]
    k[:, :, :SPAN] = 0.0
    k[..., -1] = 0.0
    k[:, :, :SPAN, -1] = 14.0
    q[..., -1] = math.sqrt(shape.width)
    q, k, v = shape.rounded(q, k, v)
    return Inputs(q, k, v)


def _features(place: Tensor, wavelength: Tensor, size: float) -> Tensor:
    """Cosines and sines (N, 2 F) of places (N, A) under wavelengths (F, A), whose dot product is ``size**2 * D**0.5``
    at distance 0 and falls with it: ``size**2`` logits under the default scale."""
    phase = place @ (2 * math.pi / wavelength).mT
    both = torch.cat((phase.cos(), phase.sin()), -1)
    count, width = wavelength.shape[0], both.shape[1]
    return both * size * math.sqrt(math.sqrt(width) / count)


KINDS: dict[str, Callable[[Shape], Inputs]] = {
    "needles": needles,
    "document": document,
    "video": video,
    "columns": columns,
    "uneven": uneven,
}
"""Structured inputs by name."""
