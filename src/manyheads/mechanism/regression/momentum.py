"""The delta rule with momentum: stochastic gradient descent on the fit of keys to values, with an inertia."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.common import checks
from manyheads.engine.scan.problem import starts_of
from manyheads.mask import Mask
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Spec, drawn, qkv

_CHUNK = 32


class MomentumState(NamedTuple):
    """What the layer remembers, in float32 (float64 for float64 inputs).

    Attributes:
        M: ``(B, H, D, Dv)``, the map: the output is ``M^T q``.
        S: ``(B, H, D, Dv)``, its last step.
    """

    M: Tensor
    S: Tensor


def momentum_delta(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    *,
    beta: Float[Tensor, "B H N"],
    momentum: Float[Tensor, "*gate"],
    decay: Float[Tensor, "*gate2"] | None = None,
    mask: Mask | str | None = None,
    scale: float | None = None,
    state: MomentumState | None = None,
    return_state: bool = False,
    chunk: int = _CHUNK,
) -> Float[Tensor, "B H N Dv"] | tuple[Float[Tensor, "B H N Dv"], MomentumState]:
    r"""Learns ``v = M^T k`` token by token, by gradient descent with momentum and weight decay, and reads it.

    $$M' = \alpha_t M_{t-1}, \quad S_t = \eta_t S_{t-1} + \beta_t k_t (v_t - M'^\top k_t)^\top, \quad
    M_t = M' + S_t, \quad o_t = \mathrm{scale}\; M_t^\top q_t$$

    With momentum 0 this is the gated delta rule; with no decay and a linear memory, Titans.

    Args:
        q: (B, H, N, D).
        k: (B, H, N, D); usually of length one.
        v: (B, H, N, Dv).
        beta: Steps (B, H, N) in [0, 2].
        momentum: eta in [0, 1], per head (H,) or per token (B, H, N).
        decay: Log of alpha, at most 0, per head (H,) or per token (B, H, N); none by default.
        mask: None or ``"causal"``, or ``Document(lens) & Causal()``.
        scale: Multiplies the queries; 1 by default.
        state: What came before the first token.
        return_state: Also return the state after all tokens.
        chunk: Tokens computed together; it changes no result.

    Returns:
        (B, H, N, Dv); with ``return_state`` also a :class:`MomentumState`.

    Raises:
        ValueError: Shapes or ranges that do not fit.
        TypeError: Gates or a state of the wrong type.
        UnsupportedError: What the Spec does not declare.

    Conventions:
        The gradient is taken at the decayed map, as in the gated delta rule; Titans takes it before the decay.

    Source:
        Wang et al., Test-time regression, arXiv 2501.12352, section 3; Behrouz et al., Titans, arXiv 2501.00663.

    Example:
        >>> k = v = torch.ones(1, 1, 3, 1)
        >>> beta, momentum = torch.full((1, 1, 3), 0.5), torch.tensor([0.5])
        >>> momentum_delta(k, k, v, beta=beta, momentum=momentum).flatten().tolist()
        [0.5, 1.0, 1.25]
    """
    checks.attention_inputs(q, k, v)
    causal, lens = order(SPEC, mask, q)
    SPEC.check(q, k, v, causal=causal)
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: expected a positive number of tokens, got {chunk!r}")
    _check(q, beta, momentum, decay)
    b, h, n, _ = q.shape
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    M, S = _started(state, q, v)
    q, k, v, beta = (t.to(wide) for t in (q, k, v, beta))
    q = q if scale is None else q * scale
    inertia, keep = _log(momentum, q), _by_token(decay, q)
    if lens is not None:
        starts = starts_of(lens, b, n, q.device)[:, None]
        inertia, keep = (t.masked_fill(starts, -torch.inf) for t in (inertia, keep))
    rows = []
    for at in range(0, n, chunk):
        part = slice(at, at + chunk)
        cut = (t[:, :, part] for t in (q, k, v, beta, inertia, keep))
        row, M, S = _chunk(M, S, *cut)
        rows.append(row)
    out = torch.cat(rows, 2) if rows else v.new_zeros(v.shape)
    return (out.to(dtype), MomentumState(M, S)) if return_state else out.to(dtype)


def step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B H D"],
    v: Float[Tensor, "B H Dv"],
    state: MomentumState | None = None,
    *,
    beta: Float[Tensor, "B H"],
    momentum: Float[Tensor, "*gate"],
    decay: Float[Tensor, "*gate2"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H Dv"], MomentumState]:
    """One token of :func:`momentum_delta`, by its definition.

    Args:
        q, k: (B, H, D).
        v: (B, H, Dv).
        state: What came before; nothing by default.
        beta: (B, H).
        momentum: (H,) or (B, H).
        decay: Log decay, (H,) or (B, H); none by default.
        scale: Multiplies the query.

    Returns:
        Output (B, H, Dv) and the new state.

    Raises:
        ValueError: Shapes or ranges that do not fit.

    Example:
        >>> one, half = torch.ones(1, 1, 1), torch.full((1, 1), 0.5)
        >>> out, state = step(one, one, one, beta=half, momentum=half)
        >>> out, state = step(one, one, one, state, beta=half, momentum=half)
        >>> out.item()
        1.0
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise ValueError(f"{name}: expected 3 dimensions (B, H, D) of one token, got shape {tuple(t.shape)}")
    checks.attention_inputs(q[:, :, None], k[:, :, None], v[:, :, None])
    gates = [None if t is None else t[..., None] if t.dim() == 2 else t for t in (momentum, decay)]
    _check(q[:, :, None], beta[..., None], gates[0], gates[1])
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    M, S = _started(state, q[:, :, None], v[:, :, None])
    q, k, v, beta, momentum = (t.to(wide) for t in (q, k, v, beta, momentum))
    if decay is not None:
        M = decay.to(wide).exp()[..., None, None] * M
    wrong = v[..., None, :] - k[..., None, :] @ M
    S = momentum[..., None, None] * S + beta[..., None, None] * k[..., None] * wrong
    M = M + S
    out = (q[..., None, :] @ M)[..., 0, :] * (1.0 if scale is None else scale)
    return out.to(dtype), MomentumState(M, S)


def reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    *,
    beta: Float[Tensor, "B H N"],
    momentum: Float[Tensor, "*gate"],
    decay: Float[Tensor, "*gate2"] | None = None,
    mask: Mask | str | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """The definition, token by token, from nothing at the first token of every document."""
    b, h, n, d = q.shape
    first = ~visible(mask, q).diagonal(offset=-1, dim1=-2, dim2=-1)  # (B | 1, 1, N - 1)
    first = torch.cat([first.new_ones(*first.shape[:2], 1), first], -1)
    wide = torch.promote_types(v.dtype, torch.float32)
    M = S = torch.zeros(b, h, d, v.shape[3], dtype=wide, device=q.device)
    rows = []
    for t in range(n):
        M, S = (x.masked_fill(first[:, :, t, None, None], 0.0) for x in (M, S))
        eta = momentum if momentum.dim() == 1 else momentum[:, :, t]
        log = decay if decay is None or decay.dim() == 1 else decay[:, :, t]
        row, (M, S) = step(q[:, :, t], k[:, :, t], v[:, :, t], MomentumState(M, S), beta=beta[:, :, t],
                           momentum=eta, decay=log, scale=scale)  # fmt: skip
        rows.append(row)
    return torch.stack(rows, 2)


def _chunk(
    M: Tensor, S: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, inertia: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Some tokens at once: what each writes solves a triangular system, as in the delta rule."""
    kept, moved = (_between(t).exp() for t in (keep, inertia))  # of M and of S, from token s to t
    reach = kept @ moved  # how much of what s wrote into S has come to M at t
    old, pace = keep.cumsum(-1).exp()[..., None], inertia.cumsum(-1).exp()[..., None]
    drift = kept @ pace
    beta = beta[..., None]
    system = beta * ((k @ k.mT) * (reach - moved)).tril(-1)
    right = beta * (v - old * (k @ M) - (drift - pace) * (k @ S))
    eye = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
    written = torch.linalg.solve_triangular(eye + system, right, upper=False, unitriangular=True)
    out = old * (q @ M) + drift * (q @ S) + ((q @ k.mT) * reach) @ written
    M, S = (
        old[:, :, -1:] * M + drift[:, :, -1:] * S + (reach[:, :, -1, :, None] * k).mT @ written,
        pace[:, :, -1:] * S + (moved[:, :, -1, :, None] * k).mT @ written,
    )
    return out, M, S


def _between(g: Tensor) -> Tensor:
    """``sum_{s<r<=t} g_r`` for ``s <= t``, else ``-inf``; sums alone, for the sake of ``-inf``."""
    n = g.shape[-1]
    lower = torch.ones(n, n, dtype=torch.bool, device=g.device).tril(-1)
    return g[..., None].expand(*g.shape, n).masked_fill(~lower, 0.0).cumsum(-2).masked_fill(lower.mT, -torch.inf)


def _log(momentum: Tensor, q: Tensor) -> Tensor:
    wide = _by_token(momentum, q)
    return wide.clamp_min(torch.finfo(wide.dtype).tiny).log()


def _by_token(gate: Tensor | None, q: Tensor) -> Tensor:
    if gate is None:
        return q.new_zeros(q.shape[:3])
    gate = gate.to(q.dtype)
    return gate[None, :, None].expand(q.shape[:3]) if gate.dim() == 1 else gate


def _started(state: MomentumState | None, q: Tensor, v: Tensor) -> MomentumState:
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = (*q.shape[:2], q.shape[3], v.shape[3])
    if state is None:
        zero = torch.zeros(shape, dtype=wide, device=q.device)
        return MomentumState(zero, zero)
    if not isinstance(state, MomentumState):
        raise TypeError(f"state: expected a MomentumState, got {type(state).__name__}")
    for name, t in zip("MS", state, strict=True):
        if tuple(t.shape) != shape or t.dtype != wide:
            raise ValueError(f"state: {name} must be {wide} of shape {shape}, got {t.dtype} of {tuple(t.shape)}")
    return state


def _check(q: Tensor, beta: Tensor, momentum: Tensor | None, decay: Tensor | None) -> None:
    b, h, n, _ = q.shape
    limits = (("beta", beta, 0.0, 2.0), ("momentum", momentum, 0.0, 1.0), ("decay", decay, -torch.inf, 0.0))
    for name, t, low, high in limits:
        if t is None and name == "decay":
            continue
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
        shapes = ((b, h, n),) if name == "beta" else ((h,), (b, h, n))
        if tuple(t.shape) not in shapes:
            either = "" if name == "beta" else f"(H={h},) or "
            raise ValueError(f"{name}: expected shape {either}(B={b}, H={h}, N={n}), got {tuple(t.shape)}")
        if torch.compiler.is_compiling() or t.device.type != "cpu" or not t.numel():
            continue
        if not bool(((t >= low) & (t <= high)).all()):
            raise ValueError(
                f"{name}: expected values in [{low:g}, {high:g}], got {float(t.min()):.4g} to {float(t.max()):.4g}"
            )


def flops(case: Case) -> int:
    """Counts the operations of a forward call in chunks.

    Args:
        case: The call.

    Returns:
        Products and triangular solves over all heads.
    """
    (b, h, n, d), e = case.q.shape, case.v.shape[3]
    c = min(_CHUNK, n)
    return b * h * n * (4 * c * d + 12 * d * e + 3 * c * e + 2 * c * c)


def traffic(case: Case) -> int:
    """Counts the bytes that have to move at least once: inputs and output.

    Args:
        case: The call.

    Returns:
        Bytes.
    """
    return sum(t.numel() * t.element_size() for t in (*case[:3], case.v))


SPEC = Spec(
    "momentum-delta",
    fn=momentum_delta,
    reference=reference,
    paper="Wang et al., Test-time regression, arXiv 2501.12352; Behrouz et al., Titans, arXiv 2501.00663",
    inputs=qkv(
        beta=drawn("BHN", lambda t: 0.05 * torch.sigmoid(t)),
        momentum=drawn("H", torch.sigmoid),
        decay=drawn("BHN", lambda t: -0.1 * t.square(), salt=1),
        mask=lambda size: "causal" if size.causal else "full",
    ),
    gates={"beta": "BHN", "momentum": "H", "decay": "BHN"},
    step=step,
    supports={"causal_self", "value_width", "backward", "decode"},
    invariances=("packed", "batch", "heads", "split"),
    axes={"carrier": "causal", "kernel": "linear", "estimator": "gradient descent, momentum", "execution": "chunks"},
    flops=flops,
    bytes=traffic,
)
