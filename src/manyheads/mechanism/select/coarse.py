"""From coarse to fine: scoring only what lies in the blocks that a first look kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from .blocks import check_block
from .choose import Force, top_k
from .scores import groups

_NUMBERS = 1 << 22  # gathered at a time


def coarse_to_fine(
    coarse: Float[Tensor, "B H Tq Tk"],
    score: Callable[[Tensor], Tensor],
    keep: int,
    *,
    blocks: int,
    ratio: int,
    count: int,
    last: Integer[Tensor, " Tq"] | None = None,
    visible: Bool[Tensor, "*visible"] | None = None,
    force: Force = None,
) -> Int[Tensor, "B H Tq keep"]:
    """Keeps some blocks by a coarse score, then the best of what lies in them by a fine one.

    Args:
        coarse: (B, H, Tq, Tk), scores of blocks.
        score: From candidates, int32 (B, H, Tq, M) with -1 for none, to their scores; such as :func:`scores_at`. What
            it says about none does not matter.
        keep: Candidates kept, at most M = ``blocks * ratio``.
        blocks: Blocks kept first, at most Tk.
        ratio: Tokens (or smaller blocks) of a block.
        count: Tokens (or smaller blocks) in all.
        last: (Tq,), the last of them that a row may keep, such as its own position; all by default.
        visible, force: Of blocks, as for :func:`top_k`.

    Returns:
        int32 (B, H, Tq, keep): ascending, -1 after the last.

    Raises:
        ValueError: Numbers that do not fit each other.

    Example:
        >>> coarse, fine = torch.tensor([[[[1.0, 2.0, 0.0]]]]), torch.tensor([9.0, 1.0, 3.0, 5.0, 8.0, 8.0])
        >>> chosen = coarse_to_fine(coarse, lambda at: fine[at.clamp(min=0)], 2, blocks=2, ratio=2, count=6)
        >>> chosen.flatten().tolist()
        [0, 3]
    """
    if keep > blocks * ratio:
        raise ValueError(f"keep: expected at most the {blocks * ratio} in blocks={blocks} of ratio={ratio}, got {keep}")
    chosen = top_k(coarse, blocks, visible=visible, force=force)
    candidates = expand(chosen, ratio, count, last=last)
    return refine(score(candidates), candidates, keep)


def expand(
    ids: Int[Tensor, "B H Tq K"], ratio: int, count: int, *, last: Integer[Tensor, " Tq"] | None = None
) -> Int[Tensor, "B H Tq M"]:
    """The tokens (or smaller blocks) of chosen blocks.

    Args:
        ids: (B, H, Tq, K), blocks, negative for none.
        ratio: Tokens of a block.
        count: Tokens in all; the last block may hold fewer.
        last: (Tq,), the last token that each row may keep; all by default.

    Returns:
        int32 (B, H, Tq, K * ratio), in the order of the blocks, -1 for none.

    Raises:
        ValueError: A ratio below 1, or ``last`` of another shape.

    Example:
        >>> expand(torch.tensor([[[[0, 2, -1]]]]), 2, 5).flatten().tolist()
        [0, 1, 4, -1, -1, -1]
    """
    check_block(ratio, "ratio")
    if last is not None and tuple(last.shape) != (ids.shape[2],):
        raise ValueError(f"last: expected shape (Tq={ids.shape[2]},), got {tuple(last.shape)}")
    found = ids[..., None] * ratio + torch.arange(ratio, device=ids.device, dtype=ids.dtype)
    most = count - 1 if last is None else last.clamp(max=count - 1)[:, None, None]
    found = torch.where((ids[..., None] >= 0) & (found <= most), found, -1)
    return found.flatten(3).to(torch.int32)


def refine(
    scores: Float[Tensor, "B H Tq M"], candidates: Int[Tensor, "B H Tq M"], keep: int
) -> Int[Tensor, "B H Tq keep"]:
    """The best of some candidates.

    Args:
        scores: (B, H, Tq, M), of each candidate.
        candidates: (B, H, Tq, M), each once in a row, negative for none.
        keep: How many, 1 to M.

    Returns:
        int32 (B, H, Tq, keep): ascending, -1 after the last. Of equal scores the first candidate is kept.

    Raises:
        ValueError: ``keep`` out of range, or shapes that differ.

    Example:
        >>> refine(torch.tensor([[[[1.0, 7.0, 5.0]]]]), torch.tensor([[[[4, 6, 2]]]]), 2).flatten().tolist()
        [2, 6]
    """
    if scores.shape != candidates.shape:
        wanted, got = tuple(scores.shape), tuple(candidates.shape)
        raise ValueError(f"candidates: expected the shape of scores, {wanted}, got {got}")
    at = top_k(scores, keep, visible=candidates >= 0)
    none = torch.iinfo(torch.int32).max
    found = candidates.gather(-1, at.clamp(min=0).long()).to(torch.int32)
    found = torch.where(at < 0, none, found).sort(-1).values
    return torch.where(found == none, -1, found)


def scores_at(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    ids: Integer[Tensor, "#B S Nq M"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "B S Nq M"]:
    """Products of each query with some keys of its own.

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        ids: (B|1, S, Nq, M), tokens, negative for none; S is Hkv, for the mean over the query heads of a group, or Hq.
        scale: Multiplies the products; D ** -0.5 by default.

    Returns:
        Float32 (float64 for float64) (B, S, Nq, M); -inf where there is no token. Made some queries at a time.

    Raises:
        ValueError: Heads or queries that do not fit.

    Example:
        >>> q = k = torch.tensor([[[[2.0], [3.0]]]])
        >>> scores_at(q, k, torch.tensor([[[[0, -1], [0, 1]]]])).flatten().tolist()
        [4.0, -inf, 6.0, 9.0]
    """
    group, wide = groups(q, k), torch.float64 if q.dtype == torch.float64 else torch.float32
    sets, nq = ids.shape[1], q.shape[2]
    if sets not in (q.shape[1], k.shape[1]) or ids.shape[2] != nq or ids.shape[0] not in (1, q.shape[0]):
        wanted = f"(B={q.shape[0]}, {k.shape[1]} or {q.shape[1]}, Nq={nq}, M)"
        raise ValueError(f"ids: expected shape {wanted}, got {tuple(ids.shape)}")
    q = q.to(wide) * (q.shape[3] ** -0.5 if scale is None else scale)
    if sets == q.shape[1]:
        k = k.repeat_interleave(group, 1) if group > 1 else k
    else:
        q = q.unflatten(1, (sets, group)).mean(2)
    ids = ids.expand(q.shape[0], -1, -1, -1)
    step = max(1, _NUMBERS // max(1, q.shape[0] * sets * ids.shape[3] * q.shape[3]))
    found = [_products(q[:, :, i : i + step], k, ids[:, :, i : i + step]) for i in range(0, nq, step)]
    return torch.cat(found, 2) if found else q.new_zeros(ids.shape)


def _products(q: Tensor, k: Tensor, ids: Tensor) -> Tensor:
    at = ids.clamp(min=0).long().flatten(2)[..., None].expand(-1, -1, -1, k.shape[3])
    keys = k.gather(2, at).unflatten(2, ids.shape[2:]).to(q.dtype)
    return (keys @ q[..., None])[..., 0].masked_fill(ids < 0, float("-inf"))
