"""The recurrence whose state is a vector: every channel decays and is written by itself."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...common.scopes import refuse_inside
from . import check
from .problem import accumulate

_BLOCK = 32  # steps of one loop; longer sequences are cut into blocks that run side by side


def elementwise(
    keep: Float[Tensor, "*batch N D"],
    x: Float[Tensor, "*batch N D"],
    state: Float[Tensor, "*batch D"] | None = None,
) -> Float[Tensor, "*batch N D"]:
    r"""Runs $h_t = a_t \odot h_{t-1} + x_t$ along the last axis but one.

    No product of factors is divided by another, so factors of 0 are exact and small ones lose nothing. Differentiable
    any number of times.

    Args:
        keep: (..., N, D) factors a, usually in [0, 1].
        x: (..., N, D).
        state: (..., D) the h before the first token; zeros by default.

    Returns:
        (..., N, D): every h, in float32 (float64 for float64). The last one is the state of what comes next.

    Raises:
        ValueError: For shapes that differ.
        TypeError: For what is not a floating tensor.
        UnsupportedError: For DTensors, and inside a parallel context.

    Example:
        >>> keep, x = torch.full((4, 1), 0.5), torch.ones(4, 1)
        >>> elementwise(keep, x)[:, 0].tolist()
        [1.0, 1.5, 1.75, 1.875]
    """
    refuse_inside("elementwise")
    check.plain((keep, x, state))
    for name, t in (("keep", keep), ("x", x), ("state", state)):
        if t is not None and (not isinstance(t, Tensor) or not t.is_floating_point()):
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
    if x.dim() < 2 or keep.shape != x.shape:
        raise ValueError(f"keep: expected the shape (..., N, D) = {tuple(x.shape)} of x, got {tuple(keep.shape)}")
    shape = (*x.shape[:-2], x.shape[-1])
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"state: expected shape (..., D) = {shape}, got {tuple(state.shape)}")
    wide = accumulate(torch.promote_types(keep.dtype, x.dtype))
    first = x.new_zeros(shape, dtype=wide) if state is None else state.to(wide)
    return op(keep.to(wide), x.to(wide), first)


_library = torch.library.Library("manyheads", "FRAGMENT")
_library.define("elementwise(Tensor keep, Tensor x, Tensor state) -> Tensor")


def _forward(keep: Tensor, x: Tensor, state: Tensor) -> Tensor:
    tokens = x.shape[-2]
    if tokens <= _BLOCK:
        return _loop(keep, x, state)
    blocks = -(-tokens // _BLOCK)
    missing = blocks * _BLOCK - tokens
    if missing:
        keep = torch.nn.functional.pad(keep, (0, 0, 0, missing), value=1.0)
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    keep, x = (t.unflatten(-2, (blocks, _BLOCK)) for t in (keep, x))
    inside = _loop(keep, x, torch.zeros_like(x[..., 0, :]))
    kept = keep.cumprod(-2)
    ends = _forward(kept[..., -1, :], inside[..., -1, :], state)
    before = torch.cat([state[..., None, :], ends[..., :-1, :]], -2)
    out = inside.addcmul_(kept, before[..., None, :]).flatten(-3, -2)
    return out[..., :tokens, :].contiguous() if missing else out


def _loop(keep: Tensor, x: Tensor, state: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for a, b, h in zip(keep.unbind(-2), x.unbind(-2), out.unbind(-2), strict=True):
        state = torch.addcmul(b, a, state, out=h)
    return out


def _fake(keep: Tensor, x: Tensor, state: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    keep, _, state, out = ctx.saved_tensors
    # the same recurrence from the end, with the factor of the token behind
    behind = torch.cat([keep[..., 1:, :], torch.zeros_like(keep[..., :1, :])], -2)
    dx = op(behind.flip(-2), grad.flip(-2), torch.zeros_like(state)).flip(-2)
    before = torch.cat([state[..., None, :], out[..., :-1, :]], -2)
    dstate = (keep[..., :1, :] * dx[..., :1, :]).sum(-2)  # a sum over one token, or over none
    return dx * before[..., : dx.shape[-2], :], dx, dstate


_library.impl("elementwise", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("manyheads::elementwise", _fake)
torch.library.register_autograd("manyheads::elementwise", _backward, setup_context=_setup)
op = torch.ops.manyheads.elementwise.default
