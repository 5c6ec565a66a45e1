"""MiniMax sparse attention (MSA): a light index scores every key, the best blocks of keys are attended to exactly."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.common import checks
from manyheads.engine.result import Attn
from manyheads.engine.tiled import tiled
from manyheads.mask import Mask, TileLayout
from manyheads.mechanism import carrier, exact
from manyheads.mechanism.select import Cut, Forced, cut, index_loss, max_scores, pairs
from manyheads.spec import Case, Spec, drawn, qkv

from . import per_query
from .per_query import best_blocks, by_block, numbered


@dataclass(frozen=True)
class MSAConfig:
    """Sizes of MiniMax sparse attention.

    Attributes:
        block: Keys of a block.
        keep: Blocks that a query attends to, the forced ones included.
        first: Of these, the first blocks of the sequence.
        local: Of these, the blocks that end with the query's own.

    Raises:
        ValueError: Sizes that do not fit together.
    """

    block: int = 128
    keep: int = 16
    first: int = 0
    local: int = 1

    def __post_init__(self) -> None:
        for name, least in (("block", 1), ("keep", 1), ("first", 0), ("local", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.first + self.local > self.keep:
            forced = self.first + self.local
            raise ValueError(f"keep: expected at least the {forced} blocks that are always kept, got {self.keep}")


DEFAULT = MSAConfig()


def msa(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hkv Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    config: MSAConfig = DEFAULT,
    mask: Mask | str | None = None,
    scale: float | None = None,
    order: str = "auto",
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    r"""Causal attention to the blocks of keys that an index finds best, one set for each query and key head.

    $$s_{g,t,b} = \max_{j \in b,\, j \le t} u_{g,t} \cdot z_j, \qquad
    o_t = \mathrm{attn}(q_t, K_{I_{g,t}}, V_{I_{g,t}})$$

    with index queries $u$, one for each key head g, and index keys $z$, shared by all. $I$ are the ``keep`` blocks of
    highest score, the query's own among them. Scores are compared as they are: a softmax before the choice would not
    change its order. The choice has no gradient: an index learns as :func:`train_msa` says.

    Args:
        q: (B, Hq, Nq, D). The last query stands at the last key.
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        index_q: (B, Hkv, Nq, Di), queries of the index; its gradient is zero.
        index_k: (B, Nk, Di), keys of the index; its gradient is zero.
        config: Sizes.
        mask: None or causal; ``Document(lengths) & Causal()`` for packed documents, where blocks begin anew.
        scale: Multiplies the scores of attention; D ** -0.5 by default.
        order: Loop order, as in :func:`manyheads.engine.tiled.tiled`; ``"keys"`` as published.
        return_lse: Also return the logarithm of the normaliser over the chosen keys.
        backend: As in :func:`manyheads.attention`.

    Returns:
        (B, Hq, Nq, Dv) in the dtype of ``v``, or :class:`manyheads.Attn` with lse (B, Hq, Nq).

    Raises:
        ValueError: For shapes that do not fit, naming the argument.
        TypeError: For wrong dtypes.
        UnsupportedError: For masks other than those above.

    Conventions:
        Scoring costs a product of Di channels for every causal pair and key head; no table of all pairs is held.

    Source:
        Lai et al., MiniMax Sparse Attention, arXiv 2606.13392.

    Example:
        >>> q, k, v = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
        >>> index = dict(index_q=torch.randn(1, 2, 50, 4), index_k=torch.randn(1, 50, 4))
        >>> msa(q, k, v, **index, config=MSAConfig(block=8, keep=3)).shape
        torch.Size([1, 4, 50, 8])
    """
    parts, index_q, index_k = _cut(q, k, v, index_q, index_k, config, mask, scale, return_lse)
    own_q, own_k, own_v = parts.tensors[:3]
    layout = per_query.layout(_choose(parts, index_q, index_k, config), own_k.shape[2], config.block, q.shape[1])
    found = tiled(own_q, own_k, own_v, layout, scale=scale, order=order, return_lse=return_lse, backend=backend)
    if isinstance(found, Attn):
        return Attn(*(per_query.restored(parts, t) for t in found))
    return per_query.restored(parts, found)


def selection(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hkv Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    config: MSAConfig = DEFAULT,
    mask: Mask | str | None = None,
    scale: float | None = None,
    order: str = "auto",
) -> TileLayout | Int[Tensor, "B Hkv N K"]:
    """What :func:`msa` visits.

    Args:
        q, k, v, index_q, index_k, config, mask, scale, order: As for :func:`msa`.

    Returns:
        The layout, its ``ids`` (B, Hkv, Nq, keep) of blocks; for packed documents the tokens themselves, -1 for none.
    """
    with torch.no_grad():
        parts, index_q, index_k = _cut(q, k, v, index_q, index_k, config, mask, scale, False)
        return per_query.selected(_choose(parts, index_q, index_k, config), parts, k.shape[2], q.shape[1])


def reference(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    v: Float[Tensor, "B Hkv Nk Dv"],
    *,
    index_q: Float[Tensor, "B Hkv Nq Di"],
    index_k: Float[Tensor, "B Nk Di"],
    config: MSAConfig = DEFAULT,
    mask: Mask | str | None = None,
    scale: float | None = None,
    order: str = "auto",
    return_lse: bool = False,
    chosen: TileLayout | Tensor | None = None,
) -> Float[Tensor, "B Hq Nq Dv"] | Attn:
    """Every index score, the largest of each block, the best blocks; then dense attention to their pairs."""
    allowed, _, number = (t.to(q.device) for t in numbered(mask, q.shape[2], k.shape[2], config.block))
    if chosen is None:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (index_q.detach().to(wide) @ index_k.detach().to(wide)[:, None].mT).masked_fill(~allowed, -torch.inf)
        best = by_block(scores, number, lambda s, own: s.masked_fill(~own, -torch.inf).amax(-1))
        seen = by_block(allowed, number, lambda a, own: (a & own).any(-1))
        best = best_blocks(best, seen, config.keep, config.first, config.local)
        index = number[:, None, None].expand(*best.shape[:3], -1)
        table = best.gather(3, index).repeat_interleave(q.shape[1] // k.shape[1], 1) & allowed
    else:
        table = pairs(chosen, q, k) & allowed
    return exact.reference(q, k, v, mask=table, scale=scale, return_lse=return_lse)


class Trained(NamedTuple):
    """What a training step of :func:`train_msa` gives.

    Attributes:
        out: (B, Hq, N, Dv), as :func:`msa` gives it; in the warm-up over all keys.
        loss: How far the index is from attention, a scalar in float32 (float64 for float64). Only ``index_q`` and
            ``index_k`` get its gradient.
    """

    out: Tensor
    loss: Tensor


def train_msa(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    index_q: Float[Tensor, "B Hkv N Di"],
    index_k: Float[Tensor, "B N Di"],
    config: MSAConfig = DEFAULT,
    mask: Mask | str | None = None,
    scale: float | None = None,
    index_scale: float | None = None,
    warm: bool = False,
    order: str = "auto",
    backend: str = "auto",
) -> Trained:
    r"""One step of :func:`msa` in training: the output, and what teaches the index.

    $$L = \frac{1}{B N G} \sum_{b,t,g} \mathrm{KL}\big(\bar p_{b,t,g} \,\|\, \mathrm{softmax}_j(\gamma\, u_{g,t} \cdot
    z_j)\big)$$

    over the tokens of the chosen blocks, where $\bar p$ is the average of the attention weights of the query heads of
    key head g, taken as given.

    Args:
        q: (B, Hq, N, D).
        k: (B, Hkv, N, D).
        v: (B, Hkv, N, Dv).
        index_q: (B, Hkv, N, Di), of an input without gradient, so that the loss moves the index alone.
        index_k: (B, N, Di), likewise.
        config: Sizes.
        mask: As for :func:`msa`.
        scale: Multiplies the scores of attention; D ** -0.5 by default.
        index_scale: Multiplies those of the index in the loss; Di ** -0.5 by default.
        warm: Whether attention sees all keys and the index learns from all of them: the first phase of training.
        order: As for :func:`msa`.
        backend: As in :func:`manyheads.attention`.

    Returns:
        A :class:`Trained` pair. The loss is :func:`manyheads.mechanism.select.index_loss`.

    Raises:
        ValueError: For shapes that do not fit, naming the argument.
        TypeError: For wrong dtypes.
        UnsupportedError: For masks other than those of :func:`msa`.

    Source:
        Lai et al., MiniMax Sparse Attention, arXiv 2606.13392.

    Example:
        >>> q, k, v = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
        >>> index = dict(index_q=torch.randn(1, 2, 50, 4), index_k=torch.randn(1, 50, 4))
        >>> step = train_msa(q, k, v, **index, config=MSAConfig(block=8, keep=3))
        >>> step.out.shape, bool(step.loss > 0)
        (torch.Size([1, 4, 50, 8]), True)
    """
    teach = functools.partial(index_loss, scale=scale, index_scale=index_scale)
    parts, own_index_q, own_index_k = _cut(q, k, v, index_q, index_k, config, mask, scale, False)
    if warm:
        _, lens = carrier.order(SPEC, mask, q)
        out = tiled(q, k, v, "causal" if mask is None else mask, scale=scale, backend=backend)
        loss = teach(q, k, index_q, index_k[:, None], lens=lens)
    else:
        own_q, own_k, own_v = parts.tensors[:3]
        ids = _choose(parts, own_index_q, own_index_k, config)
        layout = per_query.layout(ids, own_k.shape[2], config.block, q.shape[1])
        out = tiled(own_q, own_k, own_v, layout, scale=scale, order=order, backend=backend)
        if parts.real is not None:
            ids = ids.masked_fill(~parts.real[:, None, :, None], -1)  # padding teaches nothing
        loss = teach(own_q, own_k, own_index_q, own_index_k[:, None], ids, block=config.block)
    assert isinstance(out, Tensor)
    return Trained(out if warm else per_query.restored(parts, out), loss)


def _cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    config: MSAConfig,
    mask: Mask | str | None,
    scale: float | None,
    lse: bool,
) -> tuple[Cut, Tensor, Tensor]:
    """Everything checked and cut into whole blocks of one document each."""
    checks.attention_inputs(q, k, v)
    checks.options(q, k, scale=scale, softcap=None, sink=None, dropout_p=0.0)
    SPEC.check(q, k, v, causal=True, lse=lse)
    for name, t, shape in (
        ("index_q", index_q, (q.shape[0], k.shape[1], q.shape[2])),
        ("index_k", index_k, (q.shape[0], k.shape[2])),
    ):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
        if t.dim() != len(shape) + 1 or tuple(t.shape[:-1]) != shape:
            raise ValueError(f"{name}: expected shape {(*shape, 'Di')}, got {tuple(t.shape)}")
    if index_q.shape[-1] != index_k.shape[-1]:
        raise ValueError(f"index_k: expected the width {index_q.shape[-1]} of index_q, got {index_k.shape[-1]}")
    _, lens = carrier.order(SPEC, mask, q)
    per_query.self_only(lens, q.shape[2], k.shape[2], SPEC.slug)
    every = (q, k, v, index_q, index_k[:, None])
    parts = Cut(every, config.block, k.shape[2]) if lens is None else cut(lens, *every, block=config.block)
    return parts, parts.tensors[3], parts.tensors[4][:, 0]


def _choose(parts: Cut, index_q: Tensor, index_k: Tensor, config: MSAConfig) -> Tensor:
    """The blocks of each query, (B, G, Nq, keep)."""
    own, keys = index_q.detach(), index_k.detach()[:, None]
    queries, tokens = own.shape[2], keys.shape[2]

    def score(some: slice) -> Tensor:
        past = keys[:, :, : max(1, some.stop + tokens - queries)]  # all that the slice sees
        return max_scores(own[:, :, some], past, k_block=config.block, scale=1.0, share="head")

    return per_query.choose(
        score,
        parts,
        queries=queries,
        keys=tokens,
        block=config.block,
        keep=config.keep,
        force=Forced(first=config.first, local=config.local, own=False),
        rows=per_query.rows_at_once(own.shape[0] * own.shape[1] * tokens),
    )


def flops(case: Case) -> int:
    """Counts the operations of a forward call: an index score for every causal pair, attention to what is kept.

    Args:
        case: The call, without documents.

    Returns:
        Operations over all heads, every query keeping all it may.
    """
    config: MSAConfig = case.options.get("config", DEFAULT)
    (batch, heads, queries, width), (_, groups, keys, _) = case.q.shape, case.k.shape
    seen = [i + 1 for i in range(keys - queries, keys)]
    kept = [min(n, (config.keep - 1) * config.block + (n - 1) % config.block + 1) for n in seen]
    scored = 2 * batch * groups * sum(seen) * case.options["index_q"].shape[-1]
    return scored + 2 * batch * heads * sum(kept) * (width + case.v.shape[3])


SPEC = Spec(
    "msa",
    fn=msa,
    reference=reference,
    selection=selection,
    paper="Lai et al., MiniMax Sparse Attention, arXiv 2606.13392",
    inputs=qkv(
        config=MSAConfig(block=4, keep=2),
        mask=lambda size: "causal" if size.causal else "full",
        index_q=drawn("BGQD", salt=1, wide=False),
        index_k=drawn("BND", salt=2, wide=False),
    ),
    gates={"index_q": "BGQD", "index_k": "BND"},
    backends=("reference", "blocked"),
    supports={"causal_self", "causal_cross", "gqa", "value_width", "lse", "backward"},
    invariances=("packed", "batch", "heads", "causal_selection", "own_selected"),
    axes={"carrier": "blocks of keys chosen by a learned index", "kernel": "exp", "estimator": "average",
          "execution": "tiles"},
    flops=flops,
    bytes=exact.traffic,
    evidence={
        1: "test_msa::test_all_blocks_kept_is_causal_attention",
        2: "test_msa::test_raw_scores_choose_what_their_softmax_would",
        3: "test_msa::test_the_gradient_of_the_index_is_that_of_the_divergence",
        4: "test_msa::test_the_own_block_is_in_every_row_and_none_lies_ahead",
        5: "test_msa::test_key_heads_select_different_sets_that_their_query_heads_share",
    },
)  # fmt: skip
