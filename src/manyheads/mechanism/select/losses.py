"""How an indexer learns: its scores are pulled towards the attention of the model, over the keys that were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from .blocks import check_block

_NUMBERS = 1 << 22  # held at a time, by default
_GATHERED = 8  # so many times dearer is a product with a gathered key than with a key in place


def index_loss(
    q: Float[Tensor, "B Hq Nq D"],
    k: Float[Tensor, "B Hkv Nk D"],
    index_q: Float[Tensor, "B Hi Nq Di"],
    index_k: Float[Tensor, "B G Nk Di"],
    ids: Integer[Tensor, "#B S Tq K"] | None = None,
    *,
    weights: Float[Tensor, "B Hi Nq"] | None = None,
    block: int = 1,
    q_block: int = 1,
    scale: float | None = None,
    index_scale: float | None = None,
    lens: Integer[Tensor, "*B n"] | Sequence[int] | None = None,
    chunk: int | None = None,
) -> Float[Tensor, ""]:
    r"""The divergence of an indexer from the attention it selects for, over the chosen keys a query may see.

    $$L = \mathrm{mean}_{s,t} \sum_{j \in \mathcal{C}_{s,t}} P_{s,t,j} \log (P_{s,t,j} / \pi_{s,t,j}), \qquad
    P_s = \mathrm{mean}_{h \in s}\, \mathrm{softmax}_{\mathcal{C}}(\mathrm{scale}\; q_h \cdot k),\quad
    \pi_s = \mathrm{softmax}_{\mathcal{C}}(I_s)$$

    with $I_{s,t,j} = \mathrm{scale}_I\; q^I_t \cdot k^I_j$, or with ``weights``
    $\sum_i w_{t,i}\, \mathrm{ReLU}(\mathrm{scale}_I\; q^I_{t,i} \cdot k^I_j)$ over the index heads of the set. The
    attention is a teacher: q, k and the choice get no gradient; index_q, index_k and weights get the analytic one,
    $\partial L / \partial I = (\pi - P) / (\text{sets} \cdot \text{rows})$, which is found with the loss, some queries
    at a time, so that nothing is as large as all pairs.

    Args:
        q: (B, Hq, Nq, D), queries of the model.
        k: (B, Hkv, Nk, D), its keys; the last query stands at the last key, and sees no later one.
        index_q: (B, Hi, Nq, Di), queries of the indexer.
        index_k: (B, G, Nk, Di), its keys; G is 1 or S.
        ids: Integers (B|1, S, Tq, K): key blocks chosen by each of S sets for each block of queries, negative for none.
            S divides Hq and Hi, and divides Hkv or is a multiple; neighbouring heads form a set. None: all keys, for
            one set with ``weights`` and Hi sets without, as while an indexer warms up.
        weights: (B, Hi, Nq), of each index head; None for one head a set and plain products.
        block: Keys of a block; 1 for token ids.
        q_block: Queries of a block.
        scale: Of the model's products; D ** -0.5 by default.
        index_scale: Of the indexer's; Di ** -0.5 by default.
        lens: Tokens of packed documents, (n,) or (B, n), on the CPU; needs as many queries as keys.
        chunk: Queries at a time; by default so many that some million numbers are gathered.

    Returns:
        A scalar in float32 (float64 for float64), averaged over sets and over the rows that see a chosen key; zero when
        there are none.

    Raises:
        ValueError: Shapes that do not fit, naming the argument.

    Source:
        Equations after MiniMax Sparse Attention, arXiv 2606.13392; with weights after DeepSeek-V3.2.

    Example:
        >>> x = torch.ones(1, 2, 5, 4)
        >>> index_q = torch.randn(1, 1, 5, 4, requires_grad=True)
        >>> float(index_loss(x, x, index_q, x[:, :1]).detach().abs()) < 1e-6      # both are uniform
        True
    """
    sets = _check(q, k, index_q, index_k, ids, weights, block, q_block)
    document = None if lens is None else _documents(lens, q, k)
    gather = ids is not None and ids.shape[3] * block * _GATHERED < k.shape[2]
    call = _Call(
        q.shape[3] ** -0.5 if scale is None else float(scale),
        index_q.shape[3] ** -0.5 if index_scale is None else float(index_scale),
        sets,
        block,
        q_block,
        gather,
        chunk or _chunk(q, k, index_q, sets, ids.shape[3] * block if ids is not None and gather else 0),
    )
    return _IndexLoss.apply(q.detach(), k.detach(), index_q, index_k, weights, ids, document, call)


class _Call(NamedTuple):
    scale: float
    index_scale: float
    sets: int
    block: int
    q_block: int
    gather: bool
    chunk: int


class _IndexLoss(torch.autograd.Function):
    """The loss and, found with it, its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        index_q: Tensor,
        index_k: Tensor,
        weights: Tensor | None,
        ids: Tensor | None,
        document: Tensor | None,
        call: _Call,
    ) -> Tensor:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        grads = [torch.zeros_like(t, dtype=wide) for t in (index_q, index_k, weights) if t is not None]
        loss, seen = torch.zeros((), dtype=wide, device=q.device), torch.zeros((), dtype=wide, device=q.device)
        for rows, tokens, visible in _chunks(q, k, ids, document, call):
            teacher = _teacher(q[:, :, rows].to(wide), k, tokens, visible, call)
            keys = _gathered(index_k, tokens, call.sets).to(wide)
            queries = _by_set(index_q[:, :, rows].to(wide), call.sets)
            products = _times(queries, keys.mT) * call.index_scale
            gate = None if weights is None else _by_set(weights[:, :, rows, None].to(wide), call.sets)
            scores = products if gate is None else products.relu() * gate
            student = _softmax(scores.sum(3), visible)
            loss = loss + _divergence(teacher, student)
            seen = seen + visible.any(-1).expand(student.shape[:3]).sum()
            d_products = (student - teacher)[:, :, :, None]
            if gate is not None:
                grads[2][:, :, rows] = (d_products * products.relu()).sum(-1).movedim(3, 2).flatten(1, 2)
                d_products = d_products * gate * (products > 0)
            d_products = d_products * call.index_scale
            grads[0][:, :, rows] = _times(d_products, keys).movedim(3, 2).flatten(1, 2)
            _add(grads[1], tokens, queries, d_products)
        ctx.save_for_backward(seen.clamp(min=1), *grads)
        ctx.dtypes = [t.dtype for t in (index_q, index_k, weights) if t is not None]
        return loss / seen.clamp(min=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, *grads = ctx.saved_tensors
        found: list[Tensor | None] = [(g * (grad / seen)).to(t) for g, t in zip(grads, ctx.dtypes, strict=True)]
        found += [None] * (3 - len(found))
        return None, None, *found, None, None, None


def _chunks(
    q: Tensor, k: Tensor, ids: Tensor | None, document: Tensor | None, call: _Call
) -> Iterator[tuple[slice, Tensor | int, Tensor]]:
    """Some queries at a time: the tokens of each, (B|1, S, c, K), or so many first ones, and which of them count."""
    nq, nk = q.shape[2], k.shape[2]
    for start in range(0, nq, call.chunk):
        rows = slice(start, min(start + call.chunk, nq))
        at = torch.arange(rows.start, rows.stop, device=q.device)
        place = (at + (nk - nq))[:, None]
        chosen = None if ids is None else ids.index_select(2, at // call.q_block).long()
        count = max(1, rows.stop + nk - nq)
        tokens: Tensor | int = count
        if chosen is not None and call.gather:
            found = chosen[..., None] * call.block + torch.arange(call.block, device=q.device)
            found = torch.where(chosen[..., None] < 0, nk, found).flatten(3)
            visible = found <= place
            tokens = found = found.clamp(max=nk - 1)
            other = None if document is None else _look_up(document, found)
        else:
            visible = (torch.arange(count, device=q.device) <= place)[None, None]
            if chosen is not None:
                visible = visible & _among(chosen, count, call.block)
            other = None if document is None else document[:, None, None, :count]
        if document is not None:
            visible = visible & (document[:, rows][:, None, :, None] == other)
        yield rows, tokens, visible


def _among(chosen: Tensor, tokens: int, block: int) -> Tensor:
    """Which of the first tokens lie in chosen blocks, (B|1, S, c, tokens)."""
    blocks = -(-tokens // block)
    at = torch.where((chosen < 0) | (chosen > blocks), blocks, chosen)
    kept = torch.zeros(*chosen.shape[:3], blocks + 1, dtype=torch.bool, device=chosen.device).scatter(3, at, True)
    return kept[..., :-1].repeat_interleave(block, 3)[..., :tokens]


def _teacher(q: Tensor, k: Tensor, tokens: Tensor | int, visible: Tensor, call: _Call) -> Tensor:
    """The attention over the chosen keys, averaged over the query heads of each set: (B, S, c, K)."""
    heads, kv_heads, sets = q.shape[1], k.shape[1], call.sets
    each = max(1, kv_heads // sets)  # key heads of a set
    queries = _by_set(q, sets).unflatten(3, (each, -1))
    total = torch.zeros((), dtype=q.dtype, device=q.device)
    for i in range(each):
        own = k[:, i::each] if sets <= kv_heads else k.repeat_interleave(sets // kv_heads, 1)
        keys = _gathered(own, tokens, sets).to(q.dtype)
        products = _times(queries[:, :, :, i], keys.mT) * call.scale
        total = total + _softmax(products, visible[:, :, :, None]).sum(3)
    return total * (sets / heads)


# Of a set: queries (B, S, c, J, D) with the J heads that share keys; keys (B, S, N, D), or those of the K tokens of
# each query, (B, S, c, K, D).


def _gathered(keys: Tensor, tokens: Tensor | int, sets: int) -> Tensor:
    keys = keys.expand(-1, sets, -1, -1)
    if isinstance(tokens, int):
        return keys[:, :, :tokens]
    flat = tokens.expand(keys.shape[0], sets, -1, -1).flatten(2)[..., None].expand(-1, -1, -1, keys.shape[3])
    return keys.gather(2, flat).unflatten(2, tokens.shape[2:])


def _by_set(x: Tensor, sets: int) -> Tensor:
    return x.unflatten(1, (sets, -1)).movedim(2, 3)


def _times(x: Tensor, keys: Tensor) -> Tensor:
    """(B, S, c, J, A) by (B, S, A, Z) or (B, S, c, A, Z)."""
    return x @ keys if keys.dim() == 5 else (x.flatten(2, 3) @ keys).unflatten(2, x.shape[2:4])


def _add(total: Tensor, tokens: Tensor | int, queries: Tensor, d_products: Tensor) -> None:
    """Adds what some queries give to the gradient of the indexer's keys."""
    if isinstance(tokens, int):
        found = d_products.flatten(2, 3).mT @ queries.flatten(2, 3)
        total[:, :, :tokens] += found.sum(1, keepdim=True) if total.shape[1] == 1 else found
        return
    found = (d_products.mT @ queries).flatten(2, 3)
    flat = tokens.expand(*found.shape[:2], -1, -1).flatten(2)[..., None].expand_as(found)
    if total.shape[1] == 1:
        found, flat = found.flatten(1, 2)[:, None], flat.flatten(1, 2)[:, None]
    total.scatter_add_(2, flat, found)


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Over what is visible; zero for rows that see nothing."""
    return scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0.0)


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    least = torch.finfo(student.dtype).tiny
    return torch.where(teacher > 0, teacher * (teacher.clamp(min=least) / student.clamp(min=least)).log(), 0.0).sum()


def _look_up(document: Tensor, tokens: Tensor) -> Tensor:
    """The document of each token, (B, S, c, K)."""
    batch = max(document.shape[0], tokens.shape[0])
    flat = tokens.expand(batch, -1, -1, -1).flatten(1)
    return document.expand(batch, -1).gather(1, flat).unflatten(1, tokens.shape[1:])


def _documents(lens: Any, q: Tensor, k: Tensor) -> Tensor:
    own = torch.as_tensor(lens).long()
    own = own[None] if own.dim() == 1 else own
    tokens = k.shape[2]
    if q.shape[2] != tokens:
        raise ValueError(f"lens: packed documents need as many queries as keys, got {q.shape[2]} and {tokens}")
    if not torch.compiler.is_compiling() and bool((own.sum(-1) != tokens).any()):
        raise ValueError(f"lens: expected documents that sum to the {tokens} tokens, got {own.sum(-1).tolist()}")
    at = torch.arange(tokens).expand(own.shape[0], -1).contiguous()
    return torch.searchsorted(own.cumsum(-1), at, right=True).to(q.device)


def _chunk(q: Tensor, k: Tensor, index_q: Tensor, sets: int, gathered: int) -> int:
    """Queries at a time for about `_NUMBERS` numbers."""
    heads = max(q.shape[1], index_q.shape[1])
    row = gathered * (heads + sets * max(q.shape[3], index_q.shape[3])) if gathered else k.shape[2] * heads
    return max(1, min(q.shape[2], _NUMBERS // max(1, q.shape[0] * row)))


def _check(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    ids: Tensor | None,
    weights: Tensor | None,
    block: int,
    q_block: int,
) -> int:
    """Checks the shapes; the number of sets."""
    check_block(block)
    check_block(q_block, "q_block")
    (batch, heads, nq, _), nk, index_heads = q.shape, k.shape[2], index_q.shape[1]
    if heads % k.shape[1]:
        raise ValueError(f"q: its {heads} heads must be a multiple of the {k.shape[1]} heads of k")
    if index_q.shape[0] != batch or index_q.shape[2] != nq:
        raise ValueError(f"index_q: expected (B={batch}, Hi, Nq={nq}, Di), got {tuple(index_q.shape)}")
    wanted = (batch, nk, index_q.shape[3])
    if weights is not None and tuple(weights.shape) != (batch, index_heads, nq):
        raise ValueError(f"weights: expected (B={batch}, Hi={index_heads}, Nq={nq}), got {tuple(weights.shape)}")
    if ids is None:
        sets = 1 if weights is not None else index_heads
    else:
        rows = -(-nq // q_block)
        if ids.dim() != 4 or ids.is_floating_point() or ids.shape[0] not in (1, batch) or ids.shape[2] != rows:
            raise ValueError(f"ids: expected integers (B={batch}, S, {rows}, K), got {ids.dtype} {tuple(ids.shape)}")
        sets = ids.shape[1]
    if (index_k.shape[0], *index_k.shape[2:]) != wanted or index_k.shape[1] not in (1, sets):
        raise ValueError(
            f"index_k: expected (B={batch}, 1 or S={sets}, Nk={nk}, Di={wanted[2]}), got {tuple(index_k.shape)}"
        )
    if max(sets, k.shape[1]) % min(sets, k.shape[1]):
        raise ValueError(f"ids: {sets} sets do not fit the {k.shape[1]} heads of k; one has to divide the other")
    if heads % sets or index_heads % sets or (weights is None and index_heads != sets):
        raise ValueError(
            f"ids: {sets} sets do not fit {heads} query heads and {index_heads} index heads"
            + ("" if weights is not None else "; without weights each set has one index head")
        )
    return sets
