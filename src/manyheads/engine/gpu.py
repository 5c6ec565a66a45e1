"""What the launchers of all kernels share: where kernels run, what they can read, and on which architecture."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.tracing import constant
from . import configs

FAR = 1 << 23
"""Elements between two tokens from which on a tile of 256 would leave the 32 bits in which kernels count inside it."""


@constant
def refuse(device: str) -> list[str]:
    """Why no kernel can run on a type of device; empty when one can."""
    if importlib.util.find_spec("triton") is None:
        return ["triton is not installed; `pip install manyheads[triton]`"]
    if device == "cpu" and not interpreted():
        return ["its kernels need a GPU; tests run them on a CPU in Triton's interpreter (TRITON_INTERPRET=1)"]
    if device not in ("cpu", "cuda"):
        return [f"it has no kernels for {device}"]
    return []


def refuse_inputs(q: Tensor, v: Tensor) -> list[str]:
    """Why no kernel takes the dtype or the widths of a call; empty when they do."""
    reasons = []
    if q.dtype == torch.float64:
        reasons.append("float64 has no matrix instruction; use backend='blocked'")
    if not 0 < q.shape[3] <= 256 or not 0 < v.shape[3] <= 256:
        reasons.append(f"head widths from 1 to 256, got D = {q.shape[3]} and Dv = {v.shape[3]}")
    return reasons


@functools.cache
def interpreted() -> bool:
    """Whether this process runs kernels in Triton's interpreter."""
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return False
    from triton.runtime import JITFunction

    from .tiled.kernels import row_products

    return not isinstance(row_products, JITFunction)


def readable(t: Tensor) -> Tensor:
    """With neighbouring entries of the last dimension; the interpreter has no bfloat16."""
    t = t.to(torch.float32) if t.dtype == torch.bfloat16 and interpreted() else t
    if t.dim() == 4 and t.stride(2) >= FAR:
        return t.contiguous()
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 and t.is_contiguous() else t.contiguous()


def padded(width: int) -> int:
    """The block of columns that holds a head width."""
    return max(16, 1 << (width - 1).bit_length())


def tf32(q: Tensor) -> bool:
    """Whether the caller has allowed float32 products of reduced precision, by torch's own switch."""
    # the older function raises once somebody has used this switch
    return q.dtype == torch.float32 and q.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture of the tables of configurations that serves a device; the interpreter takes one of them."""
    if device.type == "cpu":
        return "sm_90"
    if torch.version.hip is not None:
        return configs.family("hip", torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return configs.family("cuda", 10 * major + minor)


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """``sum_d x y`` of every row.

    Args:
        x: ``(B, H, N, W)``, readable.
        y: The same shape, contiguous.

    Returns:
        float32 ``(B, H, N)``.
    """
    from .tiled.kernels import row_products as kernel

    out = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    n, width = out.numel(), x.shape[3]
    with on(x.device):
        kernel[(-(-n // 64),)](
            x, y, out, *x.stride()[:3], n, x.shape[1], x.shape[2], WIDTH=width, PADDED=padded(width), ROWS=64
        )
    return out


def launch(kernel: Any, programs: tuple[int, ...], arguments: dict[str, Any], config: Any = None) -> None:
    """Calls a kernel with those of the arguments that it has, under a configuration of the table.

    Args:
        kernel: The function.
        programs: The grid.
        arguments: By name; may hold more than the kernel takes.
        config: Warps and stages; Triton's own without.
    """
    used = {name: arguments[name] for name in kernel.arg_names}
    options = {} if config is None else {"num_warps": config.warps, "num_stages": config.stages}
    device = next(value.device for value in used.values() if isinstance(value, Tensor))
    with on(device):
        kernel[programs](**used, **options)


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Launches inside the block go to a device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield
