"""Choosing tokens by an indexer, and attending to them: what ``dsa``, ``hisa`` and ``misa`` share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from manyheads.engine.gather import gather
from manyheads.engine.result import Attn
from manyheads.mask import Mask
from manyheads.mechanism import select
from manyheads.mechanism.carrier import order
from manyheads.spec import Case, Spec

from .op import op
from .pooled import PooledKeys
from .scoring import index_scores

KEEP = 2048
"""Tokens that a query reads by default."""

Rule = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""A plain rule: index queries (H, Nq, D), keys (n, D), weights (H, Nq) of one document and the tokens to keep, to
bool (Nq, n)."""


class Index(NamedTuple):
    """What an indexer reads.

    Attributes:
        q: (B, H, Nq, D), index queries.
        k: (B, Nk, D), index keys.
        w: (B, H, Nq), weights of the index heads.
    """

    q: Tensor
    k: Tensor
    w: Tensor


class Method(Protocol):
    """A way of choosing tokens, with its sizes."""

    def call(self, keep: int) -> tuple[str, list[int]]:
        """Its name and the integers that the operator takes."""


@dataclass(frozen=True)
class Flat:
    """The scan of all keys that DeepSeek Sparse Attention was published with."""

    def call(self, keep: int) -> tuple[str, list[int]]:
        """Its name, and nothing to say."""
        return "flat", [-1]


def index_tokens(
    index: Index,
    *,
    keep: int,
    method: Method | None = None,
    lens: Tensor | None = None,
    pooled: PooledKeys | None = None,
) -> Tensor:
    """The tokens that each query shall attend to: the highest scores among those up to its own.

    Args:
        index: Queries, keys and weights of the indexer. Queries are the last of the tokens whose keys are given.
        keep: Tokens to choose for each query.
        method: :class:`Flat` by default, or a ``HISA`` or ``MISA``.
        lens: Lengths of packed documents, ``(n,)`` or ``(B, n)`` on the CPU; a query sees its own only.
        pooled: The keys with the means of their blocks, where they are kept for decoding; computed by default.

    Returns:
        int32 ``(B, Nq, keep)``: token ids, ascending, -1 after the last. Nothing is differentiated.

    Raises:
        ValueError: For shapes that do not fit, naming the argument, or a ``keep`` below 1.
        TypeError: For wrong dtypes.

    Example:
        >>> q, k, w = torch.ones(1, 1, 1, 1), torch.tensor([[[1.0], [3.0], [2.0]]]), torch.ones(1, 1, 1)
        >>> index_tokens(Index(q, k, w), keep=2)
        tensor([[[1, 2]]], dtype=torch.int32)
    """
    check_index(index, keep)
    method = Flat() if method is None else method
    how, options = method.call(keep)
    means = None
    if pooled is not None and how != "flat":
        if pooled.block != options[0] or len(pooled) != index.k.shape[1]:
            given = f"{len(pooled)} keys in blocks of {pooled.block}"
            raise ValueError(f"pooled: expected {index.k.shape[1]} keys in blocks of {options[0]}, got {given}")
        if lens is not None:
            raise ValueError("pooled: keys kept for decoding belong to one document, got lens too")
        means = pooled.means
    return op(*(t.detach() for t in index), means, lens, keep, how, options)


def check_index(index: Index, keep: int) -> None:
    """Checks what an indexer reads, and how much it shall keep.

    Raises:
        ValueError: For shapes that do not fit, naming the argument, or a ``keep`` below 1.
        TypeError: For wrong dtypes.
    """
    q, k, w = index
    for name, t, dims in (("index_q", q, 4), ("index_k", k, 3), ("index_w", w, 3)):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name}: expected a floating tensor, got {got}")
        if t.dim() != dims:
            raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(t.shape)}")
    b, heads, nq, width = q.shape
    if k.shape[0] != b or k.shape[2] != width:
        raise ValueError(f"index_k: expected shape (B={b}, Nk, D={width}), got {tuple(k.shape)}")
    if tuple(w.shape) != (b, heads, nq):
        raise ValueError(f"index_w: expected shape (B={b}, H={heads}, Nq={nq}), got {tuple(w.shape)}")
    if k.dtype != q.dtype:
        raise TypeError(f"index_k: expected the dtype of index_q, {q.dtype}, got {k.dtype}")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep: expected at least one token, got {keep!r}")


def check_sizes(config: Any, **least: int) -> None:
    """Checks integers of a configuration against the least that each may be, and ``flat_below``.

    Raises:
        ValueError: Naming the field.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < bound:
            raise ValueError(f"{name}: expected an integer of at least {bound}, got {value!r}")
    below = config.flat_below
    if below is not None and (isinstance(below, bool) or not isinstance(below, int) or below < 0):
        raise ValueError(f"flat_below: expected a position of at least 0, or None, got {below!r}")


def choose(
    spec: Spec, q: Tensor, k: Tensor, index: Index, keep: int, method: Method, mask: Mask | str | Tensor | None
) -> Tensor:
    """Token ids ``(B, 1, Nq, keep)`` for attention of ``q`` to ``k`` under a mask.

    Raises:
        UnsupportedError: For a mask that the mechanism does not declare.
        ValueError: For index tensors of other tokens than those of q and k.
    """
    _, lens = order(spec, mask, q)
    check_index(index, keep)
    for name, t, at, n in (("index_q", index.q, 2, q.shape[2]), ("index_k", index.k, 1, k.shape[2])):
        if t.shape[0] != q.shape[0] or t.shape[at] != n:
            raise ValueError(f"{name}: expected B={q.shape[0]} and {n} tokens, got shape {tuple(t.shape)}")
    return index_tokens(index, keep=keep, method=method, lens=lens)[:, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, scale: float | None, return_lse: bool, backend: str
) -> Tensor | Attn:
    """The consumer: softmax attention of each query to its tokens."""
    return gather(q, k, v, ids, scale=scale, return_lse=return_lse, backend=backend)


# --- the plain way -----------------------------------------------------------------------------------------------


def pairs(
    chosen: Tensor | None,
    rule: Rule,
    spec: Spec,
    q: Tensor,
    k: Tensor,
    index: Index,
    keep: int,
    mask: Mask | str | None,
) -> Tensor:
    """The pairs ``(B, 1|Hq, Nq, Nk)`` that ids name; without ids those that a plain rule chooses in each document."""
    _, lens = order(spec, mask, q)
    if chosen is not None:
        return select.pairs(chosen, q, k)
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]
    index = Index(*(t.detach() for t in index))
    seen = torch.zeros(batch, queries, keys, dtype=torch.bool, device=q.device)
    for b in range(batch):
        own = [keys] if lens is None else (lens if lens.dim() == 1 else lens[min(b, lens.shape[0] - 1)]).tolist()
        ends = [sum(own[:i]) for i in range(len(own) + 1)]
        for start, stop in pairwise(ends):
            rows = slice(max(0, start - keys + queries), max(0, stop - keys + queries))
            one = (index.q[b, :, rows], index.k[b, start:stop], index.w[b, :, rows])
            seen[b, rows, start:stop] = rule(*one, keep)
    return seen[:, None]


def visible(q: Tensor, k: Tensor) -> Tensor:
    """Which keys ``(n, D)`` the queries ``(H, Nq, D)`` of a document see, bool ``(Nq, n)``."""
    nq, nk = q.shape[1], k.shape[0]
    return torch.ones(nq, nk, dtype=torch.bool, device=q.device).tril(nk - nq)


def best(scores: Tensor, keep: int) -> Tensor:
    """The highest ``keep`` of each row, the earlier of equals, ``-inf`` never: bool, shape of ``scores``."""
    at = scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, at, True) & (scores > -torch.inf)


def plain_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """`index_scores` of one document."""
    return index_scores(q[None], k[None], w[None])[0]


def flat_rule(q: Tensor, k: Tensor, w: Tensor, keep: int) -> Tensor:
    """The highest scores of all visible keys."""
    return best(plain_scores(q, k, w).masked_fill(~visible(q, k), -torch.inf), keep)


def lengths(spec: Spec, case: Case) -> list[int]:
    """How many keys each query of a call sees, over one batch entry."""
    nq, nk = case.q.shape[2], case.k.shape[2]
    _, lens = order(spec, case.options.get("mask"), case.q)
    if lens is None:
        return [max(0, nk - nq + i + 1) for i in range(nq)]
    return [i + 1 for n in lens.view(-1, lens.shape[-1])[0].tolist() for i in range(n)]


def attention_flops(spec: Spec, case: Case) -> int:
    """Operations of attention to the tokens that are kept."""
    keep = case.options.get("keep", KEEP)
    kept = sum(min(n, keep) for n in lengths(spec, case))
    return 2 * case.q.shape[0] * case.q.shape[1] * (case.q.shape[3] + case.v.shape[3]) * kept
