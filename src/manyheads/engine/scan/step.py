"""The recurrence one token at a time: for decoding, and as the definition of the engine."""

from __future__ import annotations

import torch
from torch import Tensor

from . import check
from .problem import State, accumulate, divide, finite, unpacked, with_ones


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None = None,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    gate: Tensor | None = None,
    scale: float | None = None,
    normalise: bool | str = False,
) -> tuple[Tensor, State]:
    """One token of :func:`scan`: updates the state, then reads it.

    The cost does not depend on how many tokens came before. Differentiable like any composition of torch operators.

    Args:
        q: ``(B, H, D)``.
        k: ``(B, Hkv, D)``; ``H`` is a multiple of ``Hkv``.
        v: ``(B, Hkv, Dv)``.
        state: What came before; nothing by default.
        decay: Log decay ``(H,)``, ``(B, H)`` or ``(B, H, D)``, at most 0; none by default.
        beta: Step of the delta rule ``(B, H)`` in [0, 2]; additive updates by default.
        gate: Log input gate ``(B, H)``.
        scale: Multiplies ``q``; 1 by default.
        normalise: As in :func:`scan`.

    Returns:
        Output ``(B, H, Dv)`` in the dtype of ``v``, and the new state.

    Raises:
        ValueError: For shapes or values that do not fit, naming the argument.
        UnsupportedError: For combinations that :func:`scan` refuses.

    Example:
        >>> q = k = v = torch.ones(1, 2, 4)
        >>> out, state = step(q, k, v)
        >>> out, state = step(q, k, v, state)
        >>> out[0, 0].tolist()
        [8.0, 8.0, 8.0, 8.0]
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions (B, H, D) of one token, got shape {tuple(t.shape)}")
    kind = check.normaliser(normalise)
    decay_n = decay.unsqueeze(2) if decay is not None and decay.dim() in (2, 3) else decay
    beta_n, gate_n = None if beta is None else beta.unsqueeze(2), None if gate is None else gate.unsqueeze(2)
    check.inputs(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), decay_n, beta_n, gate_n, kind, scale)
    acc, group = accumulate(q.dtype), q.shape[1] // k.shape[1]
    total, m = check.packed_state(state, q, v, kind, gate is not None)
    check.values(decay, beta)
    keys, values = k, v
    if q.dtype != acc:
        q, keys, values = q.to(acc), k.to(acc), v.to(acc)
    if scale is not None:
        q = q * scale
    if kind:
        values = with_ones(values)
    if group > 1:
        keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    decay, beta, gate = [t if t is None or t.dtype == acc else t.to(acc) for t in (decay, beta, gate)]
    out, total, m = advance(total, m, q, keys, values, decay, beta, gate, kind)
    return out if out.dtype == v.dtype else out.to(v.dtype), unpacked(total, m, kind)


def advance(
    state: Tensor,
    m: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    gate: Tensor | None,
    normalise: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One token in the accumulation dtype: ``(output, state, m)`` after it.

    Args:
        state: ``(B, H, D, E)``; ``E`` counts the column of the denominator.
        m: ``(B, H)`` with a gate, else None.
        q, k, v: ``(B, H, D)``, ``(B, H, D)``, ``(B, H, E)``; ``q`` is scaled.
        decay: Log decay, broadcasting to ``(B, H)``, or ``(B, H, D)``, or None.
        beta, gate: ``(B, H)`` or None.
        normalise: One of ``NORMALISERS``.
    """
    if gate is None:
        if decay is not None:
            keep = decay.exp().unsqueeze(-1)
            state = (keep if keep.dim() == 4 else keep.unsqueeze(-1)) * state
    else:
        assert m is not None
        log = torch.zeros((), dtype=q.dtype, device=q.device) if decay is None else decay
        new = torch.maximum(log + m, gate).detach()
        state = (log + m - finite(new)).exp()[..., None, None] * state
        k = (gate - finite(new)).exp()[..., None] * k
        m = new
    if beta is not None:
        v = beta[..., None] * (v - (k[..., None, :] @ state)[..., 0, :])
    k, v = k.unsqueeze(-1), v.unsqueeze(-2)
    # decoding, where nothing is recorded, in one pass
    state = state + k * v if torch.is_grad_enabled() else torch.addcmul(state, k, v)
    total = torch.matmul(q.unsqueeze(-2), state).squeeze(-2)
    return divide(total, normalise, None if m is None else finite(m)), state, m
