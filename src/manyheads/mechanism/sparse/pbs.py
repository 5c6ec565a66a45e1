"""PBS: keys sorted inside segments so that the important ones share blocks, then block-sparse prefill."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from manyheads.engine.result import Attn
from manyheads.engine.tiled import tiled
from manyheads.mask import Causal, Mask, TileLayout
from manyheads.mask.evaluate import pack
from manyheads.mask.ids import settle
from manyheads.mechanism import exact, select
from manyheads.mechanism.carrier import order, visible
from manyheads.mechanism.sparse.sale import documents
from manyheads.spec import Case, Spec, qkv


@dataclass(frozen=True)
class PBS:
    """Sizes of permuted block-sparse attention.

    Attributes:
        block: Tokens of a block of queries or keys.
        segment: Tokens inside which keys are sorted; a multiple of ``block``. A query sees its own segment whole.
        mass: Share in (0, 1] of the softmax over pooled blocks that the kept ones hold; 1 keeps all.
        permute: Whether keys are sorted at all; without, this is plain block-sparse attention.

    Raises:
        ValueError: Sizes below 1, a segment that is no multiple of the block, a mass out of range.
    """

    block: int = 128
    segment: int = 256
    mass: float = 0.9
    permute: bool = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block: expected at least 1 token, got {self.block}")
        if self.segment < 1 or self.segment % self.block:
            raise ValueError(f"segment: expected a multiple of block={self.block}, got {self.segment}")
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass: expected a share in (0, 1], got {self.mass}")


class Permuted(NamedTuple):
    """What a call visits.

    Attributes:
        layout: Tiles over sorted keys.
        order: int64 (B, Hq, N): column c of the layout is key ``order[b, h, c]``.
    """

    layout: TileLayout
    order: Int[Tensor, "B Hq N"]


def pbs(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    config: PBS = PBS(),
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq N Dv"] | Attn:
    r"""Causal block-sparse attention over keys that were sorted, segment by segment, by how important they look.

    Softmax attention does not care in which order keys come. So inside each complete segment the keys of a head are
    sorted by the score that the last block of queries gives them,

    $$a_j = \operatorname{mean}_{i \in \text{last block}} \operatorname{softmax}_j(\mathrm{scale}\; q_i \cdot k_j)$$

    over the keys of complete segments; keys that matter then share few blocks. Each block of queries keeps the fewest
    earlier blocks, scored by products of means, that hold ``mass`` of their softmax, the block with the first token,
    and its own segment whole, of which every query sees what is not later than itself. Queries are not moved.

    Args:
        q: (B, Hq, N, D).
        k: (B, Hkv, N, D); Hq is a multiple of Hkv, every query head sorts for itself.
        v: (B, Hkv, N, Dv).
        config: Sizes.
        mask: None or ``"causal"``; ``Document(lengths) & Causal()`` for packed documents, cut into segments each.
        scale: Multiplies the scores; D ** -0.5 by default.
        return_lse: Also return the log of the normaliser, over the kept blocks.
        backend: As in :func:`manyheads.engine.tiled.tiled`.

    Returns:
        (B, Hq, N, Dv), or :class:`manyheads.Attn` with lse (B, Hq, N).

    Raises:
        ValueError: Shapes that do not fit.
        UnsupportedError: Another mask, queries and keys of different lengths, inputs that need gradients.

    Conventions:
        The choice sees later keys and queries: the last block of queries sorts for all. Only with ``mass=1`` is the
        output causal in the strict sense; otherwise no later key is ever attended, but later tokens change what is.

    Source:
        Wang et al., Sparser Block-Sparse Attention via Token Permutation, arXiv 2510.21270.

    Example:
        >>> q = k = v = torch.ones(1, 1, 6, 2)
        >>> pbs(q, k, v, config=PBS(block=1, segment=2, mass=0.5), scale=0.0, return_lse=True).lse.exp()[0, 0].round()
        tensor([1., 2., 2., 3., 3., 4.])
    """
    lens = _prepared(q, k, v, mask, return_lse)
    parts = select.cut(lens, q, k, v, block=config.segment)
    queries, keys, values = parts.tensors
    kept, permutation = _choose(q, k, lens, parts, config, scale)
    # sorted keys for earlier segments, and all as they came for the own one: so no tile but the diagonal has a mask
    filled = -parts.length % config.block
    keys, values = (
        torch.cat([pad(select.permute(t, permutation), (0, 0, 0, filled)),
                   t.repeat_interleave(q.shape[1] // t.shape[1], 1)], 2)
        for t in (keys, values)
    )  # fmt: skip
    own = _own(kept.shape[2], config, q.device).expand_as(kept)
    tiles = torch.cat([kept, own], -1)
    at = torch.arange(parts.length)
    layout = TileLayout.from_ids(
        torch.where(tiles, torch.arange(tiles.shape[-1], device=q.device), -1),
        nq=parts.length,
        nk=keys.shape[2],
        tile=config.block,
        mask=Causal(),
        positions=(at, torch.cat([torch.zeros(parts.length + filled, dtype=at.dtype), at])),
        batch=q.shape[0],
        heads=q.shape[1],
    )
    got = tiled(queries, keys, values, layout, scale=scale, return_lse=return_lse, backend=backend)
    return Attn(*map(parts.restore, got)) if isinstance(got, Attn) else parts.restore(got)


def selection(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    config: PBS = PBS(),
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
) -> Permuted | Bool[Tensor, "B Hq N N"]:
    """What :func:`pbs` attends to: tiles over sorted keys and their order; of packed documents the pairs."""
    lens = _prepared(q, k, v, mask, False)
    parts = select.cut(lens, q, k, v, block=config.segment)
    kept, permutation = _choose(q, k, lens, parts, config, scale)
    found = Permuted(_sorted_layout(kept, permutation, config), permutation)
    if lens is None:
        return found
    wide = parts.tensors
    pairs = select.pairs(found, wide[0], wide[1])
    return parts.restore(parts.restore(pairs, dim=2), dim=3)


def visited_tiles(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    *,
    config: PBS = PBS(),
    mask: Mask | str | Tensor | None = None,
    scale: float | None = None,
) -> int:
    """Tiles that :func:`pbs` computes, over batch and heads.

    The layout of :func:`selection` has more of them: sorted keys spread the pairs of the own segment over all its
    tiles, while a call computes that segment as it came, and no tile after the diagonal.

    Args:
        q, k, config, mask, scale: As for :func:`pbs`.

    Returns:
        Their number.

    Example:
        >>> visited_tiles(torch.ones(1, 1, 6, 2), torch.ones(1, 1, 6, 2), config=PBS(block=1, segment=2, mass=1.0))
        21
    """
    lens = _prepared(q, k, k, mask, False)
    parts = select.cut(lens, q, block=config.segment)
    kept, _ = _choose(q, k, lens, parts, config, scale)
    own = _own(kept.shape[2], config, q.device)
    if parts.real is not None:  # padding computes nothing
        real = pad(parts.real, (0, -parts.length % config.block)).unflatten(1, (-1, config.block)).any(-1)
        own = own & real[:, None, :, None] & real[:, None, None]
    return int(kept.sum()) + int(own.expand_as(kept).sum())


def key_scores(
    q: Float[Tensor, "B Hq N D"], k: Float[Tensor, "B Hkv N D"], config: PBS = PBS(), *, scale: float | None = None
) -> Float[Tensor, "B Hq N"]:
    """How much the last block of queries looks at each key of the complete segments; 0 for the rest.

    Args:
        q: (B, Hq, N, D).
        k: (B, Hkv, N, D).
        config: Sizes.
        scale: As for :func:`pbs`.

    Returns:
        Float32 (float64 for float64) (B, Hq, N), each row summing to 1 where there is a complete segment.

    Example:
        >>> key_scores(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2), PBS(block=1, segment=2)).flatten().tolist()
        [0.25, 0.25, 0.25, 0.25, 0.0]
    """
    whole, group = k.shape[2] // config.segment * config.segment, q.shape[1] // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    last = q[:, :, -config.block :].to(wide).unflatten(1, (-1, group)).flatten(2, 3)
    s = last @ k[:, :, :whole].to(wide).mT * (q.shape[3] ** -0.5 if scale is None else scale)
    return pad(s.softmax(-1).unflatten(2, (group, -1)).mean(3).flatten(1, 2), (0, k.shape[2] - whole))


def _choose(
    q: Tensor, k: Tensor, lens: Tensor | None, parts: select.Cut, config: PBS, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Kept blocks of earlier segments, bool ``(B, Hq, T, T)``, and the order of keys, both of the padded tokens."""
    blocks = -(-parts.length // config.block)
    kept = torch.zeros(*q.shape[:2], blocks, blocks, dtype=torch.bool, device=q.device)
    permutation = torch.arange(parts.length, device=q.device).expand(*q.shape[:2], -1).clone()
    with torch.no_grad():
        for at, place in documents(lens, config.segment, q):
            far, moved = _one(q[at], k[at], config, scale)
            first = place // config.block
            kept[at[0], :, first : first + far.shape[2], first : first + far.shape[3]] = far
            permutation[at[0], :, place : place + moved.shape[2]] = moved + place
    return kept, permutation


def _one(q: Tensor, k: Tensor, config: PBS, scale: float | None) -> tuple[Tensor, Tensor]:
    """The same for one document."""
    n = q.shape[2]
    at = torch.arange(n, device=q.device).expand(*q.shape[:2], -1)
    blocks = -(-n // config.block)
    if n <= config.segment:
        return torch.zeros(*q.shape[:2], blocks, blocks, dtype=torch.bool, device=q.device), at
    if config.permute:
        at = select.reorder(key_scores(q, k, config, scale=scale), config.segment)
    keys = select.permute(k, at)
    scores = select.pooled_scores(q, keys, q_block=config.block, k_block=config.block, scale=scale, share="head")
    part = torch.arange(blocks, device=q.device) // (config.segment // config.block)
    earlier = part[:, None] > part
    ids = select.top_p(scores, config.mass, visible=earlier)
    far = torch.zeros(*q.shape[:2], blocks, blocks + 1, dtype=torch.bool, device=q.device)
    far = far.scatter(3, torch.where(ids < 0, blocks, ids).long(), True)[..., :blocks]
    first = (pad(at, (0, -n % config.block), value=n).unflatten(2, (-1, config.block)) == 0).any(-1)
    return far | (first[:, :, None] & earlier), at


def _own(blocks: int, config: PBS, device: torch.device) -> Tensor:
    """Blocks of a query block's own segment up to itself: bool ``(T, T)``."""
    at = torch.arange(blocks, device=device)
    part = at // (config.segment // config.block)
    return (part[:, None] == part) & (at[:, None] >= at)


def _sorted_layout(kept: Tensor, permutation: Tensor, config: PBS) -> TileLayout:
    """The tiles over sorted keys; those of the own segment see what is not later than the query."""
    block, n, blocks = config.block, permutation.shape[2], kept.shape[2]
    at = torch.arange(blocks, device=kept.device)
    part = at // (config.segment // block)
    own = (part[:, None] == part).nonzero()
    keys = pad(permutation, (0, -n % block), value=n).unflatten(2, (-1, block))[:, :, own[:, 1]]
    rows = own[:, :1] * block + torch.arange(block, device=kept.device)
    seen = (keys[..., None, :] <= rows[..., None]) & (keys[..., None, :] < n) & (rows < n)[..., None]
    number = torch.arange(1, seen.shape[:3].numel() + 1, device=kept.device, dtype=torch.int32).view(seen.shape[:3])
    masks = torch.where(kept, 0, -1).to(torch.int32)
    masks[:, :, own[:, 0], own[:, 1]] = torch.where(seen.any(-1).any(-1), number, -1)
    ids, counts, masks = settle(torch.where(masks >= 0, at.to(torch.int32), -1), masks)
    empty = TileLayout.from_ids(ids, nq=n, nk=n, tile=block, batch=kept.shape[0], heads=kept.shape[1])
    bits = torch.from_numpy(pack(seen.flatten(0, 2).cpu().numpy())).to(kept.device)
    return replace(empty, ids_mask=masks.clamp(min=0), bits=bits)


def reference(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    config: PBS = PBS(),
    mask: Mask | str | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    chosen: Permuted | Tensor | None = None,
) -> Float[Tensor, "B Hq N Dv"] | Attn:
    """Every head and block by itself: sort, choose by pooled scores, an exact softmax over what is kept."""
    seen = visible(mask, q).expand(*q.shape[:3], -1)
    if chosen is not None:
        seen = seen & select.pairs(chosen, q, k)
    else:
        kept = torch.zeros_like(seen)
        wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        for at, _ in documents(order(SPEC, mask, q)[1], config.segment, q):
            kept[at[0], :, at[2], at[2]] = plain_choice(q[at].double(), wide[at].double(), config, scale)
        seen = seen & kept
    return exact.reference(q, k, v, mask=seen, scale=scale, return_lse=return_lse)


def plain_choice(
    q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H N D"], config: PBS, scale: float | None = None
) -> Bool[Tensor, "B H N N"]:
    """Which pairs of one document lie in kept blocks or the own segment, keys where they were."""
    (batch, heads, n, width), size, part = q.shape, config.block, config.segment
    factor = width**-0.5 if scale is None else scale
    kept = (torch.arange(n)[:, None] // part == torch.arange(n) // part).expand(batch, heads, n, n).clone()
    whole = n // part * part
    for b, h in itertools.product(range(batch), range(heads)) if n > part else ():
        weight = (q[b, h, -size:] @ k[b, h, :whole].T * factor).softmax(-1).mean(0)
        sort = range(0, whole, part) if config.permute else ()
        moved = [i + j for i in sort for j in weight[i : i + part].argsort(descending=True, stable=True).tolist()]
        at = torch.tensor(moved + list(range(len(moved), n)))
        blocks = at.split(size)
        for first in range(part, n, size):
            query = q[b, h, first : first + size].mean(0)
            earlier = range(first // part * part // size)
            logits = torch.stack([query @ k[b, h, blocks[j]].mean(0) for j in earlier]) * factor
            weights, ranked = logits.softmax(-1).sort(descending=True, stable=True)
            most = int((weights.cumsum(-1) - weights < config.mass).sum()) if config.mass < 1 else len(ranked)
            for j in [*ranked[:most].tolist(), *(j for j in earlier if (blocks[j] == 0).any())]:
                kept[b, h, first : first + size, blocks[j]] = True
    return kept


def flops(case: Case) -> int:
    """Counts a forward call of the defaults' order: scores for sorting, and the two products of all causal pairs.

    Args:
        case: The call; what it skips depends on the content.

    Returns:
        ``2 * pairs * (D + Dv)`` over all heads, and ``2 * N * D`` for each query of the last block.
    """
    config = case.options.get("config", PBS())
    sorting = 2 * case.q.shape[:2].numel() * config.block * case.k.shape[2] * case.q.shape[3]
    return exact.flops(case._replace(options={"mask": "causal"})) + sorting


def _prepared(q: Tensor, k: Tensor, v: Tensor, mask: Mask | str | Tensor | None, lse: bool) -> Tensor | None:
    _, lens = order(SPEC, mask, q)
    SPEC.check(q, k, v, causal=True, lse=lse)
    return lens


SPEC = Spec(
    "pbs",
    fn=pbs,
    reference=reference,
    selection=selection,
    paper="Wang et al., Sparser Block-Sparse Attention via Token Permutation, arXiv 2510.21270",
    inputs=qkv(mask=lambda size: "causal" if size.causal else "full", config=PBS(block=4, segment=8, mass=0.6)),
    backends=("reference", "blocked"),
    supports={"causal_self", "gqa", "value_width", "lse"},
    invariances=("packed", "batch", "heads", "own_selected", "first_selected"),
    axes={"carrier": "blocks of sorted keys", "kernel": "exp", "estimator": "average", "execution": "tiles"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_pbs::test_keeping_all_is_dense_for_any_order",
        2: "test_pbs::test_keeping_all_is_dense_for_any_order",
        3: "test_pbs::test_later_tokens_reach_earlier_ones_through_the_choice_only",
        4: "test_pbs::test_the_first_token_is_always_seen",
        5: "test_pbs::test_heavy_keys_that_are_scattered_need_fewer_blocks_when_sorted",
    },
)
