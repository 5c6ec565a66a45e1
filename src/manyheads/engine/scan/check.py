"""What a call of the engine may hold: shapes before the operator, values inside it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...common import checks
from ...common.errors import UnsupportedError, unknown
from .. import sharding
from .problem import NORMALISERS, State, accumulate


def normaliser(given: bool | str) -> str:
    """The name of a normaliser; True means ``"max1"``, False none.

    Raises:
        ValueError: For a name that does not exist.
    """
    if isinstance(given, bool):
        return "max1" if given else ""
    if given not in NORMALISERS[1:]:
        raise unknown("normaliser of scan", str(given), NORMALISERS[1:])
    return given


def plain(tensors: Iterable[Tensor | None]) -> None:
    """Refuses sharded tensors, for an operator without rules for them.

    Raises:
        UnsupportedError: For a DTensor.
    """
    if sharding.seen(*tensors):
        raise UnsupportedError("scan: DTensors are not supported; call it on each rank's batch entries and heads")


def inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    normalise: str,
    scale: float | None,
) -> None:
    """Checks the shapes and dtypes of a call, and that its parts go together.

    Raises:
        TypeError: For what is not a floating tensor.
        ValueError: For shapes or devices that do not fit.
        UnsupportedError: For combinations without a meaning here.
    """
    checks.attention_inputs(q, k, v)
    checks.options(q, k, scale=scale, softcap=None, sink=None, dropout_p=0.0)
    b, h, n, d = q.shape
    if k.shape[2] != n:
        raise ValueError(f"k: a recurrence needs a key for each of the N={n} queries, got {k.shape[2]} keys")
    if decay is not None:
        _floating("decay", decay, q)
        if tuple(decay.shape) not in ((h,), (b, h, n), (b, h, n, d)):
            raise ValueError(
                f"decay: expected shape (H={h},), (B={b}, H={h}, N={n}) or (B={b}, H={h}, N={n}, D={d}), "
                f"got {tuple(decay.shape)}"
            )
    for name, t in (("beta", beta), ("gate", gate)):
        if t is not None:
            _floating(name, t, q)
            if tuple(t.shape) != (b, h, n):
                raise ValueError(f"{name}: expected shape (B={b}, H={h}, N={n}), got {tuple(t.shape)}")
    if decay is not None and decay.dim() == 4:
        if beta is not None:
            raise UnsupportedError("scan: the delta rule (beta) takes a decay per head or per token, not per channel")
        if gate is not None:
            raise UnsupportedError("scan: gate with a decay per channel; multiply k by exp(gate) instead")
    if beta is not None and gate is not None:
        raise UnsupportedError("scan: gate with the delta rule; beta is the input gate there")
    if beta is not None and normalise:
        raise UnsupportedError(f"scan: normalise={normalise!r} with the delta rule, whose weights have no sum")


def _floating(name: str, t: Tensor, q: Tensor) -> None:
    if not isinstance(t, Tensor) or not t.dtype.is_floating_point:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected a floating tensor, got {got}")
    if t.device != q.device:
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {t.device}")


def packed_state(
    state: State | None, q: Tensor, v: Tensor, normalise: str, gated: bool
) -> tuple[Tensor, Tensor | None]:
    """The matrix that the backends carry, ``(B, H, D, E)``, and its ``m``, from a state or from nothing.

    Raises:
        TypeError: For another type or dtype.
        ValueError: For parts that are missing, too many, or of another shape.
    """
    b, h, d, dv = q.shape[0], q.shape[1], q.shape[-1], v.shape[-1]
    dtype = accumulate(q.dtype)
    if state is None:
        total = torch.zeros(b, h, d, dv + bool(normalise), dtype=dtype, device=q.device)
        m = torch.full((b, h), -torch.inf, dtype=dtype, device=q.device) if gated else None
        return total, m
    if not isinstance(state, State):
        raise TypeError(f"state: expected a State, got {type(state).__name__}")
    wanted = (("S", state.S, (b, h, d, dv), True, "always"), ("n", state.n, (b, h, d), bool(normalise), "normalise"),
              ("m", state.m, (b, h), gated, "gate"))  # fmt: skip
    for name, t, shape, needed, why in wanted:
        if (t is not None) != needed:
            raise ValueError(f"state: {name} is {'missing' if needed else 'given'}; it belongs to a call with {why}")
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"state: {name} must have shape {shape}, got {tuple(t.shape)}")
        if t.dtype != dtype:
            raise TypeError(f"state: {name} must be {dtype} for inputs of {q.dtype}, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"state: {name} must be on {q.device}, got {t.device}")
    if state.m is not None and state.m.requires_grad:
        raise ValueError("state: m takes no gradient; detach it (results depend on exp(m) * S only)")
    total = state.S if state.n is None else torch.cat([state.S, state.n[..., None]], -1)
    return total, state.m


def values(decay: Tensor | None, beta: Tensor | None) -> None:
    """Checks ranges, where reading them does not wait for a device.

    Raises:
        ValueError: For a decay above 0 or a beta outside [0, 2].
    """
    if torch.compiler.is_compiling():
        return
    if decay is not None and decay.device.type == "cpu" and decay.numel() and (high := decay.amax().item()) > 0:
        raise ValueError(f"decay: log decays are at most 0, got {high:.4g}")
    if beta is not None and beta.device.type == "cpu" and beta.numel():
        low, high = (t.item() for t in torch.aminmax(beta))
        if low < 0 or high > 2:
            raise ValueError(f"beta: expected values in [0, 2], got {low:.4g} to {high:.4g}")
