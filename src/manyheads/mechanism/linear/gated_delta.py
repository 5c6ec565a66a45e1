"""Gated DeltaNet: a linear memory that forgets by a gate and overwrites what it holds under a key."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.common import checks
from manyheads.engine import scan as engine
from manyheads.engine.scan import State
from manyheads.mask import Mask
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Case, Spec, drawn, qkv

from .mlstm import traffic


def gated_delta(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    decay: Float[Tensor, "B H N"],
    beta: Float[Tensor, "B H N"],
    unit: bool = True,
    mask: Mask | str | None = None,
    scale: float | None = None,
    state: State | None = None,
    return_state: bool = False,
    chunk: int | None = None,
    backend: str = "auto",
) -> Float[Tensor, "B H N Dv"] | tuple[Tensor, State]:
    r"""Reads a memory from which every token first erases, in part, what stands under its key.

    $$S_t = e^{g_t} (I - \beta_t k_t k_t^\top) S_{t-1} + \beta_t k_t v_t^\top, \qquad
    o_t = \mathrm{scale}\; S_t^\top q_t$$

    With $g = 0$ it is DeltaNet: one step of gradient descent per token on $\tfrac12 \|S^\top k_t - v_t\|^2$.

    Args:
        q: (B, H, N, D).
        k: (B, Hkv, N, D); H is a multiple of Hkv, every query head has a memory of its own.
        v: (B, Hkv, N, Dv).
        decay: (B, H, N) log decay g, at most 0. Keep it in float32 for inputs in half precision.
        beta: (B, H, N) share that is overwritten, in [0, 1]; up to 2 for negative eigenvalues.
        unit: Whether queries and keys are brought to length 1 first.
        mask: None or causal, or packed documents (``Document(lens) & Causal()``), at whose borders the memory is
            empty.
        scale: Multiplies the queries; D ** -0.5 by default.
        state: What came before.
        return_state: Also return the memory after the last token.
        chunk: Tokens computed together; the engine's choice by default. It changes no result.
        backend: As in :func:`manyheads.engine.scan.scan`.

    Returns:
        (B, H, N, Dv) in the dtype of ``v``; with ``return_state`` also the :class:`State`, whose S is (B, H, D, Dv).

    Raises:
        ValueError: For shapes that do not fit, or on a CPU for decays above 0 and beta outside [0, 2].
        TypeError: For wrong dtypes.
        UnsupportedError: For masks other than those above.

    Source:
        Yang et al., Gated Delta Networks, arXiv 2412.06464, section 3.

    Example:
        >>> k = torch.eye(2).view(1, 1, 2, 2)[:, :, [0, 1, 0]]        # the last token overwrites the first
        >>> v = torch.tensor([1.0, 2.0, 7.0]).view(1, 1, 3, 1)
        >>> ones = torch.ones(1, 1, 3)
        >>> out = gated_delta(k, k, v, decay=0 * ones, beta=ones, scale=1.0)
        >>> out[0, 0, :, 0].round(decimals=3).tolist()
        [1.0, 2.0, 7.0]
    """
    checks.attention_inputs(q, k, v)
    SPEC.check(q, k, v, causal=True)
    _check(decay, beta)
    _, lens = order(SPEC, mask, q)
    if unit:
        q, k = unit_length(q), unit_length(k)
    return engine.scan(
        q,
        k,
        v,
        decay=decay,
        beta=beta,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        state=state,
        lens=lens,
        return_state=return_state,
        chunk=chunk,
        backend=backend,
    )


def step(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B Hkv D"],
    v: Float[Tensor, "B Hkv Dv"],
    state: State | None = None,
    *,
    decay: Float[Tensor, "B H"],
    beta: Float[Tensor, "B H"],
    unit: bool = True,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H Dv"], State]:
    """One token of :func:`gated_delta`: overwrites, then reads.

    Args:
        q: (B, H, D).
        k: (B, Hkv, D).
        v: (B, Hkv, Dv).
        state: What came before; nothing by default.
        decay: (B, H) log decay.
        beta: (B, H) share that is overwritten.
        unit, scale: As in :func:`gated_delta`.

    Returns:
        Output (B, H, Dv) in the dtype of ``v``, and the new state.

    Raises:
        ValueError: For shapes or values that do not fit.

    Example:
        >>> one, gate = torch.ones(1, 1, 4), torch.zeros(1, 1)
        >>> out, state = step(one, one, one, decay=gate, beta=gate + 1)
        >>> out.shape, state.S.shape
        (torch.Size([1, 1, 4]), torch.Size([1, 1, 4, 4]))
    """
    _check(decay, beta)
    if unit:
        q, k = unit_length(q), unit_length(k)
    return engine.step(q, k, v, state, decay=decay, beta=beta, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def unit_length(x: Float[Tensor, "*rows D"], eps: float = 1e-6) -> Float[Tensor, "*rows D"]:
    """Vectors of length 1: ``x / sqrt(|x|^2 + eps)``, in the dtype of ``x``.

    Args:
        x: Vectors along the last axis.
        eps: Keeps zero vectors at zero.

    Returns:
        The same shape and dtype; the norm is taken in float32 (float64 for float64).

    Example:
        >>> unit_length(torch.tensor([3.0, 4.0])).round(decimals=4)
        tensor([0.6000, 0.8000])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def gates(
    a: Float[Tensor, "B H *tokens"],
    b: Float[Tensor, "B H *tokens"],
    log_rate: Float[Tensor, " H"],
    bias: Float[Tensor, " H"],
) -> tuple[Tensor, Tensor]:
    r"""The gates of Gated DeltaNet from projections: $g = -e^{A} \mathrm{softplus}(a + \delta)$, $\beta = \sigma(b)$.

    Args:
        a: (B, H, N) or (B, H) projection for the decay.
        b: (B, H, N) or (B, H) projection for the share that is overwritten.
        log_rate: (H,) A.
        bias: (H,) delta.

    Returns:
        Decay and beta of the same shape in float32 (float64 for float64).

    Example:
        >>> decay, beta = gates(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2), torch.zeros(2))
        >>> decay[0, 0].round(decimals=4), beta[0, 0]
        (tensor(-0.6931), tensor(0.5000))
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    rate, bias = (t.to(wide).view(-1, *(1,) * (a.dim() - 2)) for t in (log_rate, bias))
    return -rate.exp() * F.softplus(a.to(wide) + bias), torch.sigmoid(b.to(wide))


def reference(
    q: Float[Tensor, "B H N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    decay: Float[Tensor, "B H N"],
    beta: Float[Tensor, "B H N"],
    unit: bool = True,
    mask: Mask | str | None = None,
    scale: float | None = None,
    state: State | None = None,
) -> Float[Tensor, "B H N Dv"]:
    """All pairs at once: what the tokens write solves a triangular system, and every token reads what it may see."""
    if unit:
        q, k = unit_length(q), unit_length(k)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    q, keys, values, decay, beta = (t.to(wide) for t in (q, k, v, decay, beta))
    allowed, total = visible(mask, q), decay.cumsum(-1)
    kept = (total[..., :, None] - total[..., None, :]).masked_fill(~allowed, -torch.inf).exp()
    carried = 0 if state is None else total.masked_fill(~allowed[..., 0], -torch.inf).exp()[..., None]
    old = 0 if state is None else carried * (keys @ state.S)
    system = torch.eye(q.shape[2], dtype=wide, device=q.device) + (beta[..., None] * (keys @ keys.mT) * kept).tril(-1)
    written = torch.linalg.solve_triangular(system, beta[..., None] * (values - old), upper=False, unitriangular=True)
    out = (q @ keys.mT * kept) @ written + (0 if state is None else carried * (q @ state.S))
    return (out * (q.shape[3] ** -0.5 if scale is None else scale)).to(v.dtype)


def flops(case: Case, chunk: int = 64) -> int:
    """Counts the operations of a forward call in chunks.

    Args:
        case: The call.
        chunk: Tokens per chunk.

    Returns:
        Operations over all heads: the memory is read twice (by keys and queries) and written once for every token;
        inside a chunk there are half the pairs of keys and of queries, and the triangular system for keys and values.
    """
    (batch, heads, tokens, width), value_width = case.q.shape, case.v.shape[3]
    return batch * heads * tokens * (6 * width * value_width + chunk * (3 * width + 2 * value_width))


def _check(decay: Tensor, beta: Tensor) -> None:
    for name, t in (("decay", decay), ("beta", beta)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a floating tensor (B, H, N), got {type(t).__name__}")
        if t.dim() not in (2, 3):  # the engine checks the rest, but takes decays of other kinds too
            raise ValueError(f"{name}: expected shape (B, H, N), got {tuple(t.shape)}")


SPEC = Spec(
    "gated-delta-net",
    fn=gated_delta,
    reference=reference,
    step=step,
    paper="Yang et al., Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464",
    inputs=qkv(
        mask=lambda size: "causal" if size.causal else "full",
        decay=drawn("BHN", lambda t: -0.2 * F.softplus(t), salt=1),
        beta=drawn("BHN", torch.sigmoid, salt=2),
    ),
    gates={"decay": "BHN", "beta": "BHN"},
    backends=("reference", "blocked"),
    supports={"causal_self", "gqa", "value_width", "backward", "decode"},
    invariances=("packed", "batch", "heads", "split"),
    axes={"carrier": "causal", "kernel": "inner product", "estimator": "delta rule", "execution": "scan"},
    flops=flops,
    bytes=traffic,
)
