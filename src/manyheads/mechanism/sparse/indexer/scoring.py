"""Scores of the lightning indexer: a weighted sum over heads of rectified dot products, in pieces."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.engine.scratch import Scratch
from manyheads.engine.tiled.products import reduced_precision

PIECE = 2**19
"""Products (of a head, a query and a key) that are kept at once: what a core's cache holds beside the keys."""
WIDEST = 4096
"""Keys of a piece at most."""


def index_scores(
    index_q: Float[Tensor, "B H Nq D"], index_k: Float[Tensor, "B Nk D"], index_w: Float[Tensor, "B H Nq"]
) -> Float[Tensor, "B Nq Nk"]:
    r"""Every score of the lightning indexer, differentiable; needs memory for all heads and pairs.

    $$I_{ts} = \sum_j w_{tj}\, \mathrm{ReLU}(q_{tj} \cdot k_s)$$

    Args:
        index_q: (B, H, Nq, D), queries of the index heads.
        index_k: (B, Nk, D), keys that all index heads share.
        index_w: (B, H, Nq), weights of the heads, any sign.

    Returns:
        (B, Nq, Nk) in float32 (float64 for float64). Nothing is masked.

    Example:
        >>> q, k = torch.tensor([[[[1.0]], [[-1.0]]]]), torch.tensor([[[2.0], [-3.0]]])
        >>> index_scores(q, k, torch.tensor([[[1.0], [0.5]]]))
        tensor([[[2.0000, 1.5000]]])
    """
    wide = torch.float64 if index_q.dtype == torch.float64 else torch.float32
    products = torch.einsum("bhqd,bkd->bhqk", index_q.to(wide), index_k.to(wide)).relu()
    return torch.einsum("bhqk,bhq->bqk", products, index_w.to(wide))


def score_rows(q: Tensor, k: Tensor, w: Tensor, scratch: Scratch, name: str = "rows") -> Tensor:
    """Scores of some queries against all of some keys, a piece of keys after the other.

    Args:
        q: ``(Q, H, D)``, contiguous, in the accumulation dtype.
        k: ``(n, D)``, in the dtype of the inputs.
        w: ``(Q, H)``, in the accumulation dtype.
        scratch: Memory.
        name: Of the memory that the result is in.

    Returns:
        ``(Q, n)`` in scratch memory.
    """
    (queries, heads, _), n = q.shape, k.shape[0]
    out = scratch(name, (queries, n), q)
    piece = max(64, min(WIDEST, PIECE // max(1, queries * heads)))
    for start in range(0, n, piece):
        part = k[start : start + piece]
        out[:, start : start + piece] = score_piece(q, part, w, scratch)
    return out


def score_piece(q: Tensor, k: Tensor, w: Tensor, scratch: Scratch) -> Tensor:
    """Scores of some queries against a few keys, ``(Q, n)`` in scratch memory; arguments as in `score_rows`."""
    (queries, heads, width), n = q.shape, k.shape[0]
    flat, products = q.view(-1, width), scratch("products", (queries * heads, n), q)
    if k.dtype != q.dtype:
        given, k = k, scratch("wide keys", (n, width), q)
        k.copy_(given)
        if given.dtype == torch.bfloat16 and q.device.type == "cpu":  # exact: the operands hold bfloat16 values
            with reduced_precision():
                torch.mm(flat, k.mT, out=products)
        else:
            torch.mm(flat, k.mT, out=products)
    else:
        torch.mm(flat, k.mT, out=products)
    products.relu_()
    summed = scratch("summed", (queries, 1, n), q)
    return torch.bmm(w[:, None], products.view(queries, heads, n), out=summed)[:, 0]
