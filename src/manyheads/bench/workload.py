"""What is computed: one attention problem and its inputs, drawn or captured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manyheads.mask import Mask

PHASES = ("forward", "backward", "forward+backward")
PASSES = {"forward": 2, "backward": 5, "forward+backward": 7}
"""Operations of a phase in halves of a forward pass: the scores are computed again on the way back."""
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Problem:
    """One attention call, without its tensors.

    Attributes:
        mask: What may attend to what.
        queries: Query tokens Nq.
        keys: Key tokens Nk; default Nq.
        batch: Batch size B.
        heads: Query heads Hq.
        kv_heads: Key heads Hkv; default Hq.
        width: Head width D of queries and keys.
        value_width: Head width of values; default D.
        dtype: Name of the torch dtype.
        phase: ``"forward"`` (under no_grad), ``"backward"`` (the gradients alone, of a forward pass that is not
            timed) or ``"forward+backward"``.
        scale: What the dot products are multiplied by; ``width ** -0.5`` by default.
        deviation: Standard deviation of the logits of synthetic inputs.
        seed: Seed of synthetic inputs.
        device: Where the inputs are: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
    """

    mask: Mask
    queries: int
    keys: int | None = None
    batch: int = 1
    heads: int = 8
    kv_heads: int | None = None
    width: int = 64
    value_width: int | None = None
    dtype: str = "float32"
    phase: str = "forward"
    scale: float | None = None
    deviation: float = 1.0
    seed: int = 0
    device: str = "cpu"

    @property
    def nk(self) -> int:
        """Key tokens."""
        return self.queries if self.keys is None else self.keys

    @property
    def hkv(self) -> int:
        """Key heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def dv(self) -> int:
        """Width of the values."""
        return self.width if self.value_width is None else self.value_width

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the inputs."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def backward(self) -> bool:
        """Whether gradients are part of the work."""
        return self.phase != "forward"

    @property
    def on_gpu(self) -> bool:
        """Whether the inputs are on a GPU."""
        return self.device.startswith("cuda")

    @property
    def layout(self) -> str:
        """How query and key heads are grouped.

        Example:
            >>> from manyheads.mask import Causal
            >>> [Problem(Causal(), 8, heads=8, kv_heads=n).layout for n in (8, 2, 1)]
            ['mha', 'gqa 8:2', 'mqa 8:1']
        """
        if self.hkv == self.heads:
            return "mha"
        return f"{'mqa' if self.hkv == 1 else 'gqa'} {self.heads}:{self.hkv}"

    @property
    def shape(self) -> str:
        """The shape in words.

        Example:
            >>> from manyheads.mask import Causal
            >>> Problem(Causal(), 128, kv_heads=2).shape
            '1x8:2x128x64'
        """
        heads = f"{self.heads}" if self.hkv == self.heads else f"{self.heads}:{self.hkv}"
        tokens = f"{self.queries}" if self.nk == self.queries else f"{self.queries}:{self.nk}"
        width = f"{self.width}" if self.dv == self.width else f"{self.width}:{self.dv}"
        return f"{self.batch}x{heads}x{tokens}x{width}"

    def flops(self, pairs: int) -> int:
        """Operations that the visible pairs need: two products forward, 2.5 times as many backward.

        Args:
            pairs: Visible pairs summed over batch and heads.

        Returns:
            Floating-point operations, a multiplication and an addition counted as two.
        """
        return pairs * (self.width + self.dv) * PASSES[self.phase]

    def exps(self, pairs: int) -> int:
        """Exponentials that the visible pairs need: one in each direction.

        Args:
            pairs: Visible pairs summed over batch and heads.
        """
        return pairs * (2 if self.phase == "forward+backward" else 1)

    def bytes(self) -> int:
        """Bytes of q, k, v and the result, once; with gradients also theirs."""
        size = torch.empty((), dtype=self.torch_dtype).element_size()
        per_head = self.heads * self.queries * (self.width + self.dv) + self.hkv * self.nk * (self.width + self.dv)
        return self.batch * per_head * size * (2 if self.backward else 1)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draws normal q, k, v whose logits have the deviation asked for under the default scale.

        They are drawn on the device, so that the same seed gives other numbers on a GPU than on a CPU.

        Returns:
            q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv).
        """
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def drawn(heads: int, tokens: int, width: int) -> Tensor:
            return torch.randn(self.batch, heads, tokens, width, generator=generator, device=self.device)

        q = drawn(self.heads, self.queries, self.width) * self.deviation
        k, v = drawn(self.hkv, self.nk, self.width), drawn(self.hkv, self.nk, self.dv)
        return q.to(self.torch_dtype), k.to(self.torch_dtype), v.to(self.torch_dtype)


@dataclass(frozen=True, eq=False)
class Captured:
    """q, k, v of one layer of a real model on real text, read from a file.

    Attributes:
        name: Which layer, for the row.
        q: ``(B, Hq, N, D)``.
        k: ``(B, Hkv, N, D)``.
        v: ``(B, Hkv, N, Dv)``.
        scale: What the model multiplies the dot products by.
        source: The model, as the file says.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    source: str

    def problem(
        self, mask: Mask, length: int, dtype: str, seed: int, *, phase: str = "forward", device: str = "cpu"
    ) -> Problem:
        """The problem of these inputs under a mask, cut to some tokens."""
        return Problem(
            mask,
            length,
            batch=self.q.shape[0],
            heads=self.q.shape[1],
            kv_heads=self.k.shape[1],
            width=self.q.shape[3],
            value_width=self.v.shape[3],
            dtype=dtype,
            scale=self.scale,
            seed=seed,
            phase=phase,
            device=device,
        )

    def tensors(self, length: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """The first tokens, in a dtype, on a device."""
        q, k, v = (t[:, :, :length].to(device, dtype).contiguous() for t in (self.q, self.k, self.v))
        return q, k, v


def read_captured(path: Path) -> list[Captured]:
    """Reads a file written by ``manyheads capture``.

    Of padded inputs the entry with the most tokens is kept, without its padding.

    Args:
        path: The file.

    Returns:
        One entry for each layer of self-attention, in order.

    Raises:
        ValueError: The file is missing, truncated, of another kind, or holds no self-attention.
        ImportError: The extra with safetensors is not installed.
    """
    from manyheads.integration.capture import load_capture

    try:
        found = load_capture(path)
    except ValueError as error:
        raise ValueError(str(error).replace("path:", "input:", 1).splitlines()[0]) from None
    layers = []
    for layer in found.layers:
        if layer.q.shape[2] != layer.k.shape[2]:
            continue
        q, k, v = (_without_padding(t, found.attention_mask) for t in (layer.q, layer.k, layer.v))
        layers.append(Captured(f"layer{layer.index}", q, k, v, layer.scaling, found.model))
    if not layers:
        raise ValueError(f"input: {path} holds no layer with as many queries as keys")
    return layers


def _without_padding(tensor: Tensor, real: Tensor | None) -> Tensor:
    if real is None or real.shape != (tensor.shape[0], tensor.shape[2]):
        return tensor
    longest = int(real.sum(1).argmax())
    return tensor[longest : longest + 1, :, real[longest]]


def human(count: float) -> str:
    """Writes a number of bytes for people.

    Example:
        >>> human(3 * 2**30)
        '3.0 GiB'
    """
    if count < 1:
        return "0 B"
    power = min(int(math.log2(count)) // 10, 4)
    return f"{count / 2 ** (10 * power):.{1 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
