"""Exact softmax attention under any mask: the declaration of the front door."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.attention import Positions, attention
from manyheads.engine.result import Attn
from manyheads.mask import Mask, as_mask
from manyheads.spec import Case, Spec, qkv


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Tensor, " Hq"] | None = None,
    positions: Positions | None = None,
    key_padding: Bool[Tensor, "B Nk"] | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """Every score, masked, through a softmax: the meaning of :func:`manyheads.attention`.

    Arguments and results are those of the front door; biases and dropout are not covered here.

    Example:
        >>> q = k = v = torch.ones(1, 1, 3, 4)
        >>> reference(q, k, v, mask="causal", return_lse=True).lse.exp().round().tolist()
        [[[7.0, 15.0, 22.0]]]
    """
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    allowed = as_mask(mask).dense(q.shape[2], k.shape[2], positions=positions).to(q.device)
    if key_padding is not None:
        allowed = allowed & key_padding[:, None, None, :]
        k, v = (t.masked_fill(~key_padding[:, None, :, None], 0.0) for t in (k, v))
    scores = q.to(wide) @ k.to(wide).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sink is not None:
        scores = torch.cat((scores, sink.to(wide)[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp()[..., : k.shape[2]]
    out = (weights.to(v.dtype).to(wide) @ v.to(wide)).to(v.dtype)
    lse = lse.masked_fill(empty, float("-inf"))[..., 0]
    return Attn(out, lse) if return_lse else out


def flops(case: Case) -> int:
    """Counts the operations of a forward call: two per channel and visible pair, in each of two products.

    Args:
        case: The call; its ``mask`` decides the pairs.

    Returns:
        ``2 * pairs * (D + Dv)`` over all heads.
    """
    (batch, heads, nq), nk = case.q.shape[:3], case.k.shape[2]
    positions = case.options.get("positions")
    layout = as_mask(case.options.get("mask")).tiles(nq, nk, positions=positions, batch=batch, heads=heads)
    return 2 * layout.pairs * (case.q.shape[3] + case.v.shape[3])


def traffic(case: Case) -> int:
    """Counts the bytes that have to move at least once: the three inputs and the output.

    Args:
        case: The call.

    Returns:
        Bytes.
    """
    out = case.q.shape[0] * case.q.shape[1] * case.q.shape[2] * case.v.shape[3]
    return sum(t.numel() * t.element_size() for t in case[:3]) + out * case.v.element_size()


SPEC = Spec(
    "exact",
    fn=attention,
    reference=reference,
    paper="Vaswani et al., Attention Is All You Need, arXiv 1706.03762",
    inputs=qkv(mask=lambda size: "causal" if size.causal else None),
    hf_name="manyheads_exact",
    backends=("reference", "blocked", "triton", "sdpa"),
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
        "bias",
        "softcap",
        "sink",
        "dropout",
        "lse",
        "backward",
    },  # fmt: skip
    invariances=("packed", "padding", "batch", "heads"),
    axes={"carrier": "any mask", "kernel": "exp", "estimator": "average", "execution": "tiles"},
    flops=flops,
    bytes=traffic,
)
