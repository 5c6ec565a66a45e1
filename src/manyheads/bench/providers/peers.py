"""Other packages, each as it is meant to be called; taken when installed, and never needed."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.bench.providers.base import MASK_PAIRS, SCORES, Form, Forward, Provider, first_reason, form_of, installed
from manyheads.bench.providers.torch import HALF, cumulative
from manyheads.bench.workload import Problem, human
from manyheads.mask.neighborhood import Neighborhood


@dataclass(frozen=True)
class Peer:
    """What all packages share: a name, what to install, what to import.

    Attributes:
        name: How it is called here.
        package: The distribution.
        module: What is imported.
        lossy: Whether it computes an approximation.
    """

    name: str = ""
    package: str = ""
    module: str = ""
    lossy: bool = False

    def refuse(self, problem: Problem) -> str | None:
        """First whether it is installed, then what all packages that compute bands cannot do, then its own reasons."""
        if not installed(self.module):
            return f"not installed (pip install --no-deps {self.package})"
        return self._limits(problem, form_of(problem.mask))

    def _limits(self, problem: Problem, form: Form | None) -> str | None:
        raise NotImplementedError

    def _load(self, module: str | None = None) -> Any:
        """Imports the package; what it says and warns about itself while it loads is not ours to show."""
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return importlib.import_module(module or self.module)


@dataclass(frozen=True)
class XTransformers(Peer):
    """``x_transformers.attend.Attend``, which its layers are made around, with torch's fused kernel."""

    name: str = "x-transformers"
    package: str = "x-transformers"
    module: str = "x_transformers"

    def _limits(self, problem: Problem, form: Form | None) -> str | None:
        pairs = problem.queries * problem.nk * math.prod(problem.mask.shape)
        return first_reason(
            (
                problem.hkv not in (1, problem.heads),
                "query head h takes key head h mod Hkv there, other groups than elsewhere",
            ),
            (
                pairs > MASK_PAIRS and not _plain(problem, form),
                f"needs an N x N mask of {human(pairs)} (and {human(4 * pairs)} as floats inside)",
            ),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Makes the boolean mask, if one is needed."""
        form = form_of(problem.mask)
        plain = _plain(problem, form)
        causal = plain and form is not None and form.causal
        attend = self._load("x_transformers.attend").Attend(flash=True, causal=causal, scale=problem.scale).eval()
        mask = None if plain else problem.mask.dense(problem.queries, problem.nk).to(problem.device)
        return lambda q, k, v: attend(q, k, v, mask=mask)[0]


@dataclass(frozen=True)
class Performer(Peer):
    """``performer_pytorch.FastAttention``: positive orthogonal random features, hence an estimate."""

    name: str = "performer"
    package: str = "performer-pytorch"
    module: str = "performer_pytorch"
    lossy: bool = True

    def _limits(self, problem: Problem, form: Form | None) -> str | None:
        return first_reason(
            (not _plain(problem, form), "takes no mask but causal"),
            (problem.hkv != problem.heads, "takes no grouped heads"),
            (problem.scale is not None, "has the default scale only"),
            (problem.dtype == "float16", "its features overflow in float16"),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Draws the features."""
        causal = problem.mask.text == "causal"
        with torch.random.fork_rng(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.manual_seed(problem.seed)
            attend = self._load().FastAttention(problem.width, causal=causal)
        ready: Forward = attend.to(problem.device)
        return ready


@dataclass(frozen=True)
class Fla(Peer):
    """flash-linear-attention: its Triton kernel for softmax attention on a GPU, its plain formula on a CPU."""

    name: str = "fla"
    package: str = "flash-linear-attention"
    module: str = "fla"

    def _limits(self, problem: Problem, form: Form | None) -> str | None:
        band = form is not None and (form.right == 0 or form.plain) and problem.queries == problem.nk
        scores = problem.batch * problem.heads * problem.queries * problem.nk
        return first_reason(
            (not band, "takes full, causal and causal windows"),
            (not problem.on_gpu and form is not None and form.lengths is not None, "takes no documents on a CPU"),
            (problem.on_gpu and form is not None and not form.causal, "its kernel is causal"),
            (problem.on_gpu and problem.width > 256, "its kernel takes widths to 256"),
            (not problem.on_gpu and scores > SCORES, f"keeps all scores: {human(4 * scores)}"),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Binds window and documents; its tensors have heads after tokens."""
        form = form_of(problem.mask) or Form()
        window = None if form.left is None else form.left + 1
        if not problem.on_gpu:
            naive = self._load("fla.ops.attn.naive").naive_parallel_attn
            return lambda q, k, v: naive(
                *_tokens_first(q, k, v), scale=problem.scale, window_size=window, causal=form.causal
            )[0].transpose(1, 2)
        attend = self._load("fla.ops.attn").parallel_attn
        bounds = None if form.lengths is None else cumulative(form.lengths, problem.device)[0].long()
        return lambda q, k, v: attend(
            *(t.contiguous() for t in _tokens_first(q, k, v)),
            scale=problem.scale,
            window_size=window,
            cu_seqlens=bounds,
        ).transpose(1, 2)


@dataclass(frozen=True)
class Xformers(Peer):
    """``xformers.ops.memory_efficient_attention``; grouped heads are expanded views, as its documents ask."""

    name: str = "xformers"
    package: str = "xformers"
    module: str = "xformers"

    def _limits(self, problem: Problem, form: Form | None) -> str | None:
        return first_reason(
            (not problem.on_gpu, "needs a GPU"),
            (problem.dtype == "float64", "takes at most float32"),
            (form is None, "takes bands within documents only"),
            (problem.queries != problem.nk or problem.batch != 1, "as many queries as keys in one row only"),
            (
                form is not None and form.left is not None and not form.causal,
                "its windows are causal",
            ),
            (problem.backward and problem.hkv != problem.heads, "takes grouped heads forward only"),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Makes the bias that says what is visible."""
        ops = self._load("xformers.ops")
        bias = self._bias(problem, form_of(problem.mask) or Form())
        group = problem.heads // problem.hkv

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = _tokens_first(q, k, v)
            if group > 1:
                q = q.unflatten(2, (problem.hkv, group))
                k, v = (t[:, :, :, None].expand(-1, -1, -1, group, -1) for t in (k, v))
            out: Tensor = ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=problem.scale)
            return (out.flatten(2, 3) if group > 1 else out).transpose(1, 2)

        return call

    def _bias(self, problem: Problem, form: Form) -> Any:
        masks = self._load("xformers.ops.fmha.attn_bias")
        if form.lengths is not None:
            blocks = masks.BlockDiagonalMask.from_seqlens(list(form.lengths), device=problem.device)
            if form.left is not None:
                return blocks.make_local_attention(form.left + 1)
            return blocks.make_causal() if form.causal else blocks
        if form.left is not None:
            return masks.LowerTriangularFromBottomRightLocalAttentionMask(form.left + 1)
        return masks.LowerTriangularMask() if form.causal else None


@dataclass(frozen=True)
class Natten(Peer):
    """``natten.na1d``, ``na2d`` and ``na3d``: neighbourhoods, and causal windows in one dimension."""

    name: str = "natten"
    package: str = "natten"
    module: str = "natten"

    def _limits(self, problem: Problem, form: Form | None) -> str | None:
        return first_reason(
            (self._neighborhood(problem) is None, "takes neighbourhoods, and causal windows in one dimension"),
            (problem.hkv != problem.heads, "takes no grouped heads"),
            (problem.dtype == "float64", "takes at most float32"),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Binds the neighbourhood; its tensors have heads after the axes of the grid."""
        natten, near = self._load(), self._neighborhood(problem)
        assert near is not None
        attend = getattr(natten, f"na{len(near.grid)}d")

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.unflatten(1, near.grid).contiguous() for t in _tokens_first(q, k, v))
            out: Tensor = attend(
                q,
                k,
                v,
                kernel_size=near.window,
                stride=near.stride,
                dilation=near.dilation,
                is_causal=near.causal,
                scale=problem.scale,
            )
            return out.flatten(1, len(near.grid)).transpose(1, 2)

        return call

    def _neighborhood(self, problem: Problem) -> Neighborhood | None:
        if isinstance(problem.mask, Neighborhood):
            return problem.mask
        form = form_of(problem.mask)
        if form is None or form.left is None or not form.causal or form.lengths is not None:
            return None
        window = form.left + 1
        if problem.queries != problem.nk or not 2 <= window <= problem.queries:
            return None
        return Neighborhood(problem.queries, window, causal=True)


@dataclass(frozen=True)
class Sage(Peer):
    """``sageattention.sageattn``: 8-bit scores, 16-bit values, hence an approximation."""

    name: str = "sageattention"
    package: str = "sageattention"
    module: str = "sageattention"
    lossy: bool = True

    def _limits(self, problem: Problem, form: Form | None) -> str | None:
        return first_reason(
            (not problem.on_gpu, "needs a GPU"),
            (problem.backward, "has no backward"),
            (not _plain(problem, form), "takes no mask but causal"),
            (problem.width not in (64, 96, 128) or problem.dv != problem.width, "takes widths 64, 96 and 128"),
            (problem.dtype == "float64", "takes at most float32"),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Binds causality and scale; keys are centred here, because it would centre the caller's in place."""
        attend, causal = self._load().sageattn, problem.mask.text == "causal"
        return lambda q, k, v: attend(
            q, k - k.mean(2, keepdim=True), v, is_causal=causal, sm_scale=problem.scale, smooth_k=False
        )


@dataclass(frozen=True)
class FlashAttn(Peer):
    """``flash_attn_func`` and ``flash_attn_varlen_func`` of the flash-attn package."""

    name: str = "flash-attn"
    package: str = "flash-attn"
    module: str = "flash_attn"

    def _limits(self, problem: Problem, form: Form | None) -> str | None:
        return first_reason(
            (not problem.on_gpu, "needs a GPU"),
            (problem.dtype not in HALF, "takes float16 and bfloat16"),
            (form is None, "takes bands within documents only"),
            (problem.width > 256 or problem.dv != problem.width, "takes widths to 256, values as wide as keys"),
            (
                form is not None and form.lengths is not None and problem.batch != 1,
                "takes documents in one row only",
            ),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Binds the band, and the bounds of documents if there are any."""
        package, form = self._load(), form_of(problem.mask) or Form()
        options = {"softmax_scale": problem.scale, "causal": form.causal, "window_size": form.pair}
        if form.lengths is None:
            attend = package.flash_attn_func
            return lambda q, k, v: attend(*_tokens_first(q, k, v), **options).transpose(1, 2)
        bounds, longest = cumulative(form.lengths, problem.device)
        packed = package.flash_attn_varlen_func

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t[0] for t in _tokens_first(q, k, v))
            out: Tensor = packed(q, k, v, bounds, bounds, longest, longest, **options)
            return out.transpose(0, 1)[None]

        return call


def _plain(problem: Problem, form: Form | None) -> bool:
    """Whether it is full, or causal with as many queries as keys, where every alignment means the same."""
    return form is not None and form.plain and (not form.causal or problem.queries == problem.nk)


def _tokens_first(*tensors: Tensor) -> Iterator[Tensor]:
    """``(B, H, N, D)`` as views ``(B, N, H, D)``."""
    return (tensor.transpose(1, 2) for tensor in tensors)


PROVIDERS: tuple[Provider, ...] = (XTransformers(), Performer(), Fla(), Xformers(), Natten(), Sage(), FlashAttn())
