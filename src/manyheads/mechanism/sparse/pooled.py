"""Attention to the key blocks whose mean agrees best with the mean of the queries: the plainest selector there is."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.engine.result import Attn
from manyheads.engine.tiled import tiled
from manyheads.mask import Causal, Mask, TileLayout
from manyheads.mechanism import exact, select
from manyheads.mechanism.carrier import order
from manyheads.spec import Case, Size, Spec, qkv


def pooled_topk(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    keep: int = 16,
    block: int = 64,
    share: str = "group",
    how: str = "mean",
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""Softmax attention of each block of queries to ``keep`` blocks of keys, chosen by the product of their means.

    $$o_i = \sum_{j \in \mathcal{S}(t)} \mathrm{softmax}_j(\mathrm{scale}\; q_i \cdot k_j)\, v_j, \qquad
    \mathcal{S}(t) = \mathrm{top}_b\; \bar q_t \cdot \bar k_b, \quad t = \lfloor i / \mathrm{block} \rfloor$$

    The first block of keys, which often holds a sink, is always kept; so is the block at the end of what a causal
    query may see, its own. Both count within ``keep``. Scoring costs a share of 1 / block² of the products of dense
    attention. The choice itself has no gradient.

    Args:
        q: (B, Hq, Nq, D), any floating dtype.
        k: (B, Hkv, Nk, D); Hq is a multiple of Hkv.
        v: (B, Hkv, Nk, Dv).
        keep: Blocks of keys that a block of queries keeps, those that are always kept among them; where there are no
            more, all.
        block: Tokens of a block, of queries and of keys.
        share: ``"group"``: the query heads of one key head choose together, by the mean of their scores, which is
            faster; ``"head"``: each for itself.
        how: How a block becomes one vector, as in :func:`manyheads.mechanism.select.pool`.
        mask: None or ``"causal"``, ``"full"``, or ``Document(lengths)`` for packed documents with or without
            ``Causal()``; blocks are then cut in each document.
        scale: Multiplies the scores; default D ** -0.5.
        return_lse: Whether to return the logarithm of the normaliser too.
        backend: ``"auto"``, ``"blocked"``, ``"triton"`` or ``"reference"``.

    Returns:
        (B, Hq, Nq, Dv), or :class:`manyheads.Attn` with lse (B, Hq, Nq) over the chosen keys.

    Raises:
        ValueError: Sizes that do not fit, fewer blocks than are always kept, an unknown name.
        UnsupportedError: Another mask, or packed queries with keys of another length.

    Conventions:
        Causal queries stand at the end of longer keys. Tokens after a query in its block of queries take part in its
        choice, so a choice is causal from block to block, not from token to token.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 96, 8), torch.randn(1, 2, 96, 8), torch.randn(1, 2, 96, 8))
        >>> whole = pooled_topk(q, k, v, keep=6, block=16)       # all six blocks: dense attention
        >>> bool((whole - torch.nn.functional.scaled_dot_product_attention(
        ...     q, k, v, is_causal=True, enable_gqa=True)).abs().max() < 1e-5)
        True
    """
    causal, lens = order(SPEC, mask, q)
    SPEC.check(q, k, v, causal=causal, lse=return_lse)
    parts, ids = _choose(q, k, v, causal, lens, keep, block, share, how, scale)
    layout = _layout(parts, ids, block, causal)
    padding = None if causal else parts.key_padding(q.shape[0])
    q, k, v = parts.tensors
    got = tiled(
        q,
        k,
        v,
        layout,
        scale=scale,
        key_padding=padding,
        return_lse=return_lse,
        backend=backend,
    )
    return Attn(*map(parts.restore, got)) if isinstance(got, Attn) else parts.restore(got)


def selection(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep: int = 16,
    block: int = 64,
    share: str = "group",
    how: str = "mean",
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
) -> TileLayout | Int[Tensor, "B S N J"]:
    """What :func:`pooled_topk` visits, with the same arguments: tiles, or for packed documents the tokens."""
    causal, lens = order(SPEC, mask, q)
    parts, ids = _choose(q, k, v, causal, lens, keep, block, share, how, scale)
    return _layout(parts, ids, block, causal) if lens is None else _tokens(parts, ids, causal)


def _choose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    lens: Tensor | None,
    keep: int,
    block: int,
    share: str,
    how: str,
    scale: float | None,
) -> tuple[select.Cut, Tensor]:
    """The tokens in whole blocks, and the key blocks of each block of queries (B, Hkv or Hq, Tq, keep)."""
    if lens is None:
        parts = select.Cut((q, k, v), block, q.shape[2])
        visible = select.block_causal(q.shape[2], k.shape[2], block, block, q.device)[None, None]
        visible = visible if causal else torch.ones_like(visible)
    else:
        parts = select.cut(lens, q, k, v, block=block)
        visible = select.block_documents(parts, block, block, causal=causal)
    q, k, v = parts.tensors
    scores = select.pooled_scores(
        q, k, q_block=block, k_block=block, how=how, scale=scale, share=share, real=parts.real
    )
    force = select.Forced(first=1, own=causal)
    return parts, select.top_k(scores, min(keep, scores.shape[-1]), visible=visible, force=force)


def _layout(parts: select.Cut, ids: Tensor, block: int, causal: bool) -> TileLayout:
    q, k = parts.tensors[:2]
    mask = Causal() if causal else None
    return TileLayout.from_ids(ids, nq=q.shape[2], nk=k.shape[2], tile=block, mask=mask, heads=q.shape[1])


def _tokens(parts: select.Cut, ids: Tensor, causal: bool) -> Tensor:
    """Chosen blocks of padded documents as the tokens of the packed row, int32 (B, Hkv or Hq, N, keep * block)."""
    assert parts.place is not None
    tokens, block = parts.place.shape[1], parts.block
    own = torch.arange(tokens, device=ids.device)
    number = torch.full((parts.place.shape[0], parts.length + 1), -1, device=ids.device)  # the last is no token's
    number.scatter_(1, parts.place, own.expand(parts.place.shape[0], -1))
    spots = ids.long()[..., None] * block + torch.arange(block, device=ids.device)
    spots = torch.where(ids[..., None] < 0, parts.length, spots).flatten(3)
    found = number[:, None, None].expand(*spots.shape[:3], -1).gather(3, spots)
    found = parts.restore(found.repeat_interleave(block, 2))
    return torch.where(found > own[:, None], -1, found).int() if causal else found.int()


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    keep: int = 16,
    block: int = 64,
    share: str = "group",
    how: str = "mean",
    mask: Mask | str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    chosen: TileLayout | Tensor | None = None,
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """Exact attention under a matrix of visible pairs: the chosen blocks, document by document."""
    causal, lens = order(SPEC, mask, q)
    batch, heads, nq, nk = *q.shape[:3], k.shape[2]
    if chosen is not None:
        seen = select.pairs(chosen, q, k)
        return exact.reference(q, k, v, mask=seen, scale=scale, return_lse=return_lse)
    seen = torch.zeros(batch, heads, nq, nk, dtype=torch.bool, device=q.device)
    documents = None if lens is None else lens.expand(batch, -1).tolist()
    for b in range(batch):
        borders = [0, *itertools.accumulate(documents[b])] if documents else [0, nk]
        for lo, hi in itertools.pairwise(borders):
            rows = slice(lo, hi) if documents else slice(nq)
            if hi > lo:
                one = _plainly(q[b, :, rows], k[b, :, lo:hi], keep, block, share, how, causal)
                seen[b, :, rows, lo:hi] = one.repeat_interleave(heads // len(one), 0)
    return exact.reference(q, k, v, mask=seen, scale=scale, return_lse=return_lse)


def _plainly(q: Tensor, k: Tensor, keep: int, block: int, share: str, how: str, causal: bool) -> Tensor:
    """bool (Hkv or Hq, Nq, Nk) of one document: every score of every block, in the order of the definition."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    nq, nk, group = q.shape[1], k.shape[1], q.shape[0] // k.shape[0]
    pools = {"mean": lambda x: x.mean(1), "max": lambda x: x.amax(1), "norm": lambda x: x.sum(1) / x.shape[1] ** 0.5}
    a, b = (torch.stack([pools[how](x) for x in t.to(wide).split(block, 1)], 1) for t in (q, k))
    scores = (a @ b.repeat_interleave(group, 0).mT).detach()
    scores = scores.unflatten(0, (-1, group)).mean(1) if share == "group" else scores
    row, column = torch.arange(nq, device=q.device), torch.arange(nk, device=q.device)
    allowed = (column <= row[:, None] + nk - nq) if causal else torch.ones(nq, nk, dtype=torch.bool, device=q.device)
    seen = torch.zeros(scores.shape[0], nq, nk, dtype=torch.bool, device=q.device)
    for head, t in itertools.product(range(scores.shape[0]), range(scores.shape[1])):
        meet = [c for c in range(scores.shape[2]) if allowed[t * block : (t + 1) * block, c * block].any()]
        always = meet[:1] + (meet[-1:] if causal else [])
        best = sorted(meet, key=lambda c: (c not in always, -float(scores[head, t, c]), c))[:keep]
        for c in best:
            seen[head, t * block : (t + 1) * block, c * block : (c + 1) * block] = True
    return seen & allowed


def flops(case: Case) -> int:
    """Counts the operations of a forward call: the scores of all blocks, and two products over the kept ones.

    Args:
        case: The call.

    Returns:
        Operations, over all heads; blocks that a causal mask cuts count in full.
    """
    (batch, heads, nq, width), (nk, wide) = case.q.shape, case.v.shape[2:]
    block, keep = case.options.get("block", 64), case.options.get("keep", 16)
    scoring = 2 * batch * heads * -(-nq // block) * -(-nk // block) * width
    return scoring + 2 * batch * heads * nq * min(keep * block, nk) * (width + wide)


def _keep(size: Size) -> int:
    return min(3, -(-(size.queries if size.keys is None else size.keys) // 8))


SPEC = Spec(
    "pooled-topk",
    fn=pooled_topk,
    reference=reference,
    selection=selection,
    paper="none: what block selectors have in common",
    inputs=qkv(mask=lambda size: "causal" if size.causal else "full", keep=_keep, block=8),
    backends=("reference", "blocked", "triton"),
    supports={
        "noncausal_self",
        "causal_self",
        "noncausal_cross",
        "causal_cross",
        "gqa",
        "value_width",
        "lse",
        "backward",
    },  # fmt: skip
    invariances=("packed", "batch", "heads", "causal_selection", "first_selected"),
    axes={"carrier": "chosen blocks", "kernel": "exp", "estimator": "average", "execution": "tiles"},
    flops=flops,
    bytes=exact.traffic,
)
