"""What torch itself has: fused attention by backend, compiled FlexAttention, packed attention."""

from __future__ import annotations

import inspect
import itertools
import math
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.bench import environment
from manyheads.bench.providers.base import MASK_PAIRS, SCORES, Form, Forward, Provider, first_reason, form_of, installed
from manyheads.bench.workload import Problem, human
from manyheads.common.errors import UnsupportedError
from manyheads.mask import BlockMap, Mask
from manyheads.mask.algebra import And, Or, PerHead

FLEX_PAIRS = 2**28
"""Above this many pairs no block mask is evaluated pair by pair."""
BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
"""Backends of ``scaled_dot_product_attention`` by the name they have here."""
HALF = ("float16", "bfloat16")
SMALL_TILES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}
"""Tiles of FlexAttention's GPU kernels, forward and backward, for blocks of 64."""


@dataclass(frozen=True)
class Sdpa:
    """``scaled_dot_product_attention``: ``is_causal`` when that is exact, else a boolean mask.

    Attributes:
        backend: One of ``BACKENDS``; empty for torch's own choice.
    """

    name: str = "sdpa"
    backend: str = ""
    package: str = "torch"

    def refuse(self, problem: Problem) -> str | None:
        """Refuses a boolean mask that is too large to be made, and what the backend by name cannot do."""
        pairs = problem.queries * problem.nk
        masked = not _is_full(problem) and not _is_causal(problem)
        cells = pairs * math.prod(problem.mask.shape)
        grouped = problem.hkv != problem.heads
        return first_reason(
            (
                self.backend in ("cudnn", "efficient") and not problem.on_gpu,
                f"torch's {self.backend} kernel needs a GPU",
            ),
            (
                self.backend in ("cudnn", "flash") and problem.on_gpu and problem.dtype not in HALF,
                f"torch's {self.backend} kernel takes float16 and bfloat16 on a GPU",
            ),
            (
                self.backend == "flash" and problem.on_gpu and masked,
                "torch's flash kernel takes no mask on a GPU but causal",
            ),
            (self.backend == "efficient" and grouped, "torch's efficient kernel takes no grouped heads"),
            (
                masked and cells > MASK_PAIRS,
                f"needs an N x N mask of {human(cells)} (and {human(4 * cells)} as floats inside)",
            ),
            (
                self.backend == "math" and pairs * problem.heads * problem.batch > SCORES,
                f"keeps all scores: {human(4 * pairs * problem.heads * problem.batch)}",
            ),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Makes the boolean mask, if one is needed."""
        options: dict[str, Any] = {"enable_gqa": problem.hkv != problem.heads, "scale": problem.scale}
        if _is_causal(problem):
            options["is_causal"] = True
        elif not _is_full(problem):
            options["attn_mask"] = problem.mask.dense(problem.queries, problem.nk).to(problem.device)
        if not self.backend:
            return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)
        return self._by_name(options)

    def _by_name(self, options: dict[str, Any]) -> Forward:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        backend = getattr(SDPBackend, BACKENDS[self.backend])

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            try:
                with sdpa_kernel([backend]):
                    return F.scaled_dot_product_attention(q, k, v, **options)
            except RuntimeError as error:
                if "No available kernel" in str(error) or "No viable backend" in str(error):
                    raise UnsupportedError(f"torch's {self.backend} kernel does not take this call") from None
                raise

        return call


@dataclass(frozen=True)
class Flex:
    """``torch.nn.attention.flex_attention`` compiled with its block mask; compilation is timed apart."""

    name: str = "flex"
    package: str = "torch"

    def refuse(self, problem: Problem) -> str | None:
        """Refuses gradients on a CPU, and machines where nothing can be compiled."""
        pairs = problem.queries * problem.nk
        return first_reason(
            (problem.backward and not problem.on_gpu, "FlexAttention has no backward on a CPU"),
            (problem.dtype == "float64", "FlexAttention computes in at most float32"),
            (
                not problem.on_gpu and environment.compiler() is None,
                "needs a C++ compiler (g++ or clang++) to be compiled",
            ),
            (problem.on_gpu and not installed("triton"), "needs triton to be compiled for a GPU"),
            (
                not problem.on_gpu and pairs > FLEX_PAIRS,
                f"its block mask is made from {human(pairs)} of booleans",
            ),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Makes the block mask and a function of its own, so that no limit on recompilation is met."""
        import torch._functorch.config as functorch
        from torch._inductor import config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        # buffers given away would not be there when the same graph is run backward again and again
        functorch.donated_buffer = problem.phase != "backward"
        if not problem.on_gpu:
            config.compile_threads = 1  # a pool of compilers would leave threads behind in the process that is timed
        mask_mod = problem.mask.to_flex(problem.queries, problem.nk, device=problem.device)
        batch, heads = (n if n > 1 else None for n in problem.mask.shape)
        fused = problem.queries * problem.nk > FLEX_PAIRS  # compiled, it never holds the N x N booleans
        size = _block_size(problem.mask)
        with torch.no_grad():
            block = create_block_mask(
                mask_mod,
                batch,
                heads,
                problem.queries,
                problem.nk,
                device=problem.device,
                BLOCK_SIZE=size,
                _compile=fused,
            )
        gqa, scale = problem.hkv != problem.heads, problem.scale
        small: Any = SMALL_TILES if problem.on_gpu and size < 128 else None  # its usual tiles would not fit the blocks

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(q, k, v, block_mask=block, scale=scale, enable_gqa=gqa, kernel_options=small)

        own = types.FunctionType(
            call.__code__.replace(co_name=f"flex_{next(_numbers)}"),
            call.__globals__,
            None,
            None,
            call.__closure__,
        )
        compiled: Forward = torch.compile(own, dynamic=False)
        return compiled


@dataclass(frozen=True)
class Varlen:
    """``torch.nn.attention.varlen.varlen_attn``: packed documents without padding, on a GPU."""

    name: str = "varlen"
    package: str = "torch"

    def refuse(self, problem: Problem) -> str | None:
        """Takes bands within documents in half precision on a GPU."""
        form = form_of(problem.mask)
        taken = _parameters() if installed("torch.nn.attention.varlen") else ()
        return first_reason(
            (not taken, f"torch {torch.__version__} has no varlen_attn"),
            (not problem.on_gpu, "varlen_attn needs a GPU"),
            (problem.dtype not in HALF, "varlen_attn takes float16 and bfloat16"),
            (form is None, "varlen_attn takes bands within documents only"),
            (problem.queries != problem.nk or problem.batch != 1, "as many queries as keys in one row only"),
            (problem.dv != problem.width, "varlen_attn takes values as wide as keys"),
            (
                problem.hkv != problem.heads and "enable_gqa" not in taken,
                f"varlen_attn of torch {torch.__version__} takes no grouped heads",
            ),
            (
                form is not None and form.pair not in ((-1, -1), (-1, 0)) and "window_size" not in taken,
                f"varlen_attn of torch {torch.__version__} takes no window",
            ),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Makes the bounds of the documents; queries and keys stay where they are."""
        from torch.nn.attention.varlen import varlen_attn

        form = form_of(problem.mask) or Form()
        bounds, longest = cumulative(form.lengths or (problem.queries,), problem.device)
        taken = _parameters()
        options: dict[str, Any] = {"scale": problem.scale} if "scale" in taken else {}
        options |= {"window_size": form.pair} if "window_size" in taken else {"is_causal": form.causal}
        if problem.hkv != problem.heads:
            options["enable_gqa"] = True
        attend: Any = varlen_attn

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
            out: Tensor = attend(q, k, v, bounds, bounds, longest, longest, **options)
            return out.transpose(0, 1)[None]

        return call


def cumulative(lengths: tuple[int, ...], device: str) -> tuple[Tensor, int]:
    """Bounds of packed documents as kernels take them, and the longest document.

    Args:
        lengths: Tokens of each document.
        device: Where the bounds are needed.

    Returns:
        int32 ``(documents + 1,)`` from 0 to the total, and the longest length.

    Example:
        >>> cumulative((3, 2), "cpu")
        (tensor([0, 3, 5], dtype=torch.int32), 3)
    """
    bounds = [0, *itertools.accumulate(lengths)]
    return torch.tensor(bounds, dtype=torch.int32, device=device), max(lengths)


def _parameters() -> tuple[str, ...]:
    """What this torch's ``varlen_attn`` takes; it has grown from version to version."""
    from torch.nn.attention import varlen

    return tuple(inspect.signature(varlen.varlen_attn).parameters)


def _block_size(mask: Mask) -> int:
    """Tokens of a block of the block mask: those of random blocks where they are known, so that few are cut."""
    parts = mask.parts if isinstance(mask, And | Or | PerHead) else (mask,)
    sizes = [part.block[0] if part.block else 64 for part in parts if isinstance(part, BlockMap)]
    return 64 if any(size % 128 for size in sizes) else 128


def _is_full(problem: Problem) -> bool:
    return problem.mask.text == "full"


def _is_causal(problem: Problem) -> bool:
    """Torch aligns ``is_causal`` to the upper left, so it is exact for as many queries as keys only."""
    return problem.mask.text == "causal" and problem.queries == problem.nk


_numbers = itertools.count()

PROVIDERS: tuple[Provider, ...] = (Sdpa(), *(Sdpa(f"sdpa-{name}", name) for name in BACKENDS), Flex(), Varlen())
