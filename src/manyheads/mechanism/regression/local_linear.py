"""Local linear attention: a ridge regression around every query, where softmax attention takes an average."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.attention import Positions, attention
from manyheads.engine import solve as engine
from manyheads.engine.result import Attn
from manyheads.engine.solve import Solver
from manyheads.mask import Mask, as_mask
from manyheads.mechanism import exact
from manyheads.spec import Case, Spec, qkv

from .parallax import weights

RIDGE = 0.1


def local_linear_attention(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    ridge: float | Float[Tensor, " Hq"] = RIDGE,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    solver: Solver | str = "auto",
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""Fits a linear function of the keys to the values around every query, and returns its value at the query.

    $$o_i = b_i \quad\text{of}\quad \min_{b, W} \sum_j p_{ij} \lVert v_j - b - W (k_j - q_i)\rVert^2
          + \lambda \lVert W\rVert^2, \qquad p_i = \mathrm{softmax}_j(\mathrm{scale}\; q_i \cdot k_j)$$

    which is $o_i = \bar v_i + \mathrm{Cov}(v, k)\,(\mathrm{Cov}(k, k) + \lambda I)^{-1} (q_i - \bar k_i)$ with means
    and covariances under $p_i$. The weights of the values sum to one and may be negative. Time is quadratic in the
    tokens, memory linear; decoding is a call with few queries over all keys so far.

    Args:
        q: Queries (B, Hq, Nq, D), any floating dtype; half precision is computed in float32.
        k: Keys (B, Hkv, Nk, D); Hq is a multiple of Hkv and nothing is repeated in memory. Queries and keys should
            have like lengths (QK-norm), since their distance matters here.
        v: Values (B, Hkv, Nk, Dv).
        ridge: $\lambda \ge 0$, one number or one for each query head (Hq,), which may be learned.
        mask: A mask value, its text, a bool tensor with True for allowed, or None for everything.
        scale: Multiplies the dot products; ``D ** -0.5`` by default. With keys and queries of constant length it is
            the inverse squared bandwidth of a Gaussian kernel.
        positions: Logical positions ``(q_pos, k_pos)``, (N,) or (B, N).
        key_padding: bool (B, Nk), True for real keys. The others may hold anything, NaN included.
        solver: ``"auto"``, ``"direct"`` (moments), ``"cg"`` (conjugate gradients, matrix-free, as the paper's
            kernels), or a :class:`~manyheads.engine.solve.Solver` with a tolerance and a cap on the steps.
        return_lse: Also return the log of the softmax's normaliser.
        backend: ``"auto"``, ``"blocked"`` or ``"reference"``.

    Returns:
        (B, Hq, Nq, Dv) in the dtype of the inputs, or :class:`~manyheads.Attn`. A row that may attend to nothing
        gives 0.

    Raises:
        ValueError: For shapes that do not fit, a negative ridge, or a ridge of 0 where a query sees too few keys.
        TypeError: For wrong types or dtypes.

    Conventions:
        The ridge is relative to weights that sum to one, so that it means the same for every query and whatever is
        subtracted from scores for safety. Beside unnormalised weights $e^{\mathrm{scale}\, q \cdot k}$, as in the
        paper, the same estimate has the ridge $\lambda e^{\mathrm{lse}_i}$.

    Source:
        Zuo et al., Local Linear Attention, arXiv 2510.01450, sections 3 and 4.

    Example:
        >>> q = k = torch.randn(1, 1, 32, 4)
        >>> v = k @ torch.randn(4, 4)                        # a linear function of the keys
        >>> fitted, averaged = local_linear_attention(q, k, v, ridge=1e-6), attention(q, k, v)
        >>> bool((fitted - v).abs().max() < 1e-2 < (averaged - v).abs().max())
        True
    """
    return engine.local_linear(
        q,
        k,
        v,
        as_mask(mask),
        ridge=ridge,
        scale=scale,
        positions=positions,
        key_padding=key_padding,
        solver=solver,
        return_lse=return_lse,
        backend=backend,
    )


def interpolate(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    slope: Float[Tensor, "*shared D Dv"],
    *,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
) -> Float[Tensor, "B Hq Nq Dv"]:
    r"""Softmax attention to what a linear map leaves unexplained, plus that map at the query.

    $$o_i = \sum_j p_{ij} (v_j - W^\top k_j) + W^\top q_i$$

    With $W = 0$ this is softmax attention, with the local ridge solution local linear attention, and with the state
    of a linear attention a hybrid of both.

    Args:
        q, k, v, mask, scale, key_padding: As for :func:`local_linear_attention`.
        slope: $W$, (D, Dv), with as many of the dimensions (B, Hq, Nq) before as it depends on.

    Returns:
        (B, Hq, Nq, Dv). A row that may attend to nothing gives 0.

    Raises:
        ValueError: For a slope whose shape does not fit.

    Example:
        >>> q = k = torch.randn(1, 1, 6, 3)
        >>> slope = torch.randn(3, 3)
        >>> torch.allclose(interpolate(q, k, k @ slope, slope), q @ slope, atol=1e-5)
        True
    """
    width = (q.shape[3], v.shape[3])
    if tuple(slope.shape[-2:]) != width or slope.dim() not in (2, 4, 5):
        raise ValueError(
            f"slope: expected (D, Dv) = {width}, or (B|1, Hq|1, D, Dv), or (B|1, Hq|1, Nq|1, D, Dv), "
            f"got {tuple(slope.shape)}"
        )
    both = attention(
        q, k, torch.cat([v, k], dim=-1), mask=mask, scale=scale, key_padding=key_padding, return_lse=True
    )
    mean, centre = both.out.split(width[::-1], dim=-1)
    away = (q - centre).masked_fill(both.lse[..., None] == -torch.inf, 0.0)
    if slope.dim() == 5:
        return mean + (away[..., None, :] @ slope)[..., 0, :]
    return mean + away @ slope


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    ridge: float | Float[Tensor, " Hq"] = RIDGE,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    solver: Solver | str = "auto",
    return_lse: bool = False,
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """The normal equations around every query, as they stand: ``z`` is the way from the query to a key."""
    p, lse = weights(q, k, mask=mask, scale=scale, positions=positions, key_padding=key_padding)
    k, v_wide = (t.to(p.dtype).repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if key_padding is not None:
        k, v_wide = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v_wide))
    z = k[:, :, None] - q.to(p.dtype)[:, :, :, None]
    mu = torch.einsum("bhij,bhijd->bhid", p, z)
    added = torch.as_tensor(ridge, dtype=p.dtype, device=p.device).expand(q.shape[1])[:, None, None, None]
    moments = torch.einsum("bhij,bhijd,bhije->bhide", p, z, z)
    rho = torch.linalg.solve(moments + added * torch.eye(q.shape[3], dtype=p.dtype, device=p.device), mu)
    tilted = p * (1 - torch.einsum("bhijd,bhid->bhij", z, rho)) / (1 - (mu * rho).sum(-1))[..., None]
    out = (tilted @ v_wide).to(v.dtype)
    return Attn(out, lse) if return_lse else out


def flops(case: Case) -> int:
    """Counts the operations of a forward call that forms the matrices: for every visible pair the score, the mean
    key, the products of two channels of the key and their sum, the corrected value; for every query a factorisation.

    Args:
        case: The call.

    Returns:
        ``pairs * (8 * D + 2 * Dv + D * (D + 1)) + B * Hq * Nq * D ** 3 / 3``.
    """
    d, dv = case.q.shape[3], case.v.shape[3]
    pairs = exact.flops(case) // (2 * (d + dv))
    return pairs * (8 * d + 2 * dv + d * (d + 1)) + case.q.numel() * d * d // 3


SPEC = Spec(
    "lla",
    fn=local_linear_attention,
    reference=reference,
    paper="Zuo et al., Local Linear Attention, arXiv 2510.01450",
    inputs=qkv(mask=lambda size: "causal" if size.causal else None, ridge=0.5),
    backends=("reference", "blocked"),
    supports={
        "noncausal_self",
        "causal_self",
        "noncausal_cross",
        "causal_cross",
        "mask",
        "gqa",
        "value_width",
        "positions",
        "key_padding",
        "lse",
        "backward",
    },  # fmt: skip
    invariances=("packed", "padding", "batch", "heads"),
    axes={"carrier": "any mask", "kernel": "exp", "estimator": "local linear, ridge", "execution": "tiles and solves"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_local_linear::test_a_strong_ridge_is_softmax_attention",
        2: "test_local_linear::test_affine_values_are_reproduced_where_softmax_fails",
        3: "test_local_linear::test_plain_centred_direct_and_iterative_solves_agree",
        4: "test_local_linear::test_weights_sum_to_one",
        5: "test_local_linear::test_a_constant_added_to_values_is_added_to_outputs",
        6: "test_local_linear::test_gradients_match_finite_differences",
        7: "test_local_linear::test_one_key_returns_its_value",
    },
)
