"""A whole mechanism made of selectors: what twenty files will look like, for tests of the parts they share."""

from __future__ import annotations

import itertools

import torch

from manyheads import Causal
from manyheads.engine.tiled import tiled
from manyheads.mask import TileLayout
from manyheads.mechanism import exact, select
from manyheads.mechanism.carrier import order, visible
from manyheads.spec import Spec, qkv

FORCE = select.Forced(first=1, local=1)


def pooled(q, k, v, *, block=16, keep=3, mask=None, scale=None, return_lse=False, backend="auto"):
    """Attention of blocks of queries to the blocks of keys with the best pooled score, and the first and own one."""
    _, lens = order(SPEC, mask, q)
    SPEC.check(q, k, v, causal=True, lse=return_lse)
    parts = select.cut(lens, q, k, v, block=block)
    chosen = _layout(parts, block, keep, scale)
    got = tiled(*parts.tensors, chosen, scale=scale, return_lse=return_lse, backend=backend)
    return type(got)(*map(parts.restore, got)) if return_lse else parts.restore(got)


def selection(q, k, v, *, block=16, keep=3, mask=None, scale=None):
    """The layout that `pooled` visits; of packed documents as pairs."""
    _, lens = order(SPEC, mask, q)
    parts = select.cut(lens, q, k, v, block=block)
    chosen = _layout(parts, block, keep, scale)
    return chosen if lens is None else select.pairs(chosen, q, k, parts=parts)


def _layout(parts, block, keep, scale):
    q, k, _ = parts.tensors
    scores = select.pooled_scores(q, k, q_block=block, k_block=block, scale=scale, real=parts.real)
    seen = select.block_documents(parts, block, block)
    ids = select.top_k(scores, min(keep, scores.shape[-1]), visible=seen, force=FORCE)
    return TileLayout.from_ids(
        ids, nq=q.shape[2], nk=k.shape[2], tile=block, mask=Causal(), batch=q.shape[0], heads=q.shape[1]
    )


def reference(q, k, v, *, block=16, keep=3, mask=None, scale=None, return_lse=False, chosen=None):
    """The same, one row of blocks at a time."""
    seen = visible(mask, q)
    seen = seen & (choose(q.detach(), k.detach(), seen, block, keep) if chosen is None else select.pairs(chosen, q, k))
    return exact.reference(q, k, v, mask=seen, scale=scale, return_lse=return_lse)


def choose(q, k, seen, block, keep):
    """Which pairs are kept, document by document, block by block."""
    (batch, heads, n, _), group = q.shape, q.shape[1] // k.shape[1]
    kept = torch.zeros(batch, heads, n, n, dtype=torch.bool, device=q.device)
    firsts = seen[0, 0].int().argmax(-1)
    for start in firsts.unique().tolist():
        own = range(start, start + int((firsts == start).sum()), block)
        stop = start + int((firsts == start).sum())
        for b, h, i in itertools.product(range(batch), range(heads), own):
            mates = range(h // group * group, (h // group + 1) * group)
            query = torch.stack([q[b, m, i : min(i + block, stop)].mean(0) for m in mates]).mean(0)
            earlier = [j for j in own if j <= i]
            scores = {j: float(query @ k[b, h // group, j : min(j + block, stop)].mean(0)) for j in earlier}
            scores |= {start: float("inf"), i: float("inf")}
            for j in sorted(scores, key=lambda j: -scores[j])[:keep]:
                kept[b, h, i : min(i + block, stop), j : min(j + block, stop)] = True
    return kept


SPEC = Spec(
    "pooled-sample",
    fn=pooled,
    reference=reference,
    selection=selection,
    paper="none",
    inputs=qkv(mask="causal"),
    backends=("reference", "blocked"),
    supports={"causal_self", "gqa", "value_width", "lse", "backward"},
    invariances=("packed", "batch", "causal_selection", "own_selected", "first_selected"),
    flops=lambda case: case.q.numel(),
    bytes=exact.traffic,
)
