"""Structured input for indexers, how much of a choice another finds, and the flat scan at other sizes of its pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import op, scoring
from .method import Index

TUNINGS = ((8, 2**18), (16, 2**19), (32, 2**19), (64, 2**20))
"""Queries of a tile and products of a piece that a tuned flat scan chooses from."""


def clustered_index(
    tokens: int,
    queries: int,
    *,
    heads: int = 64,
    width: int = 128,
    topics: int = 48,
    run: int = 192,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Index:
    r"""Draws what an indexer reads from a text whose topics change now and then.

    Keys are $k_s = c_{\tau(s)} + \mathrm{spread} \cdot \varepsilon_s$ with standard normal centres and noise: the topic
    $\tau$ stays for runs of ``run / 2`` to ``3 run / 2`` tokens. The queries are the last tokens; each of their heads
    looks for one of four topics, the same for neighbouring queries, with noise of half that deviation of its own. Head
    weights are positive and log-normal with deviation 1: a few heads count most.

    Args:
        tokens: Keys N.
        queries: Queries Q, the last of the tokens.
        heads: Index heads H.
        width: Width D of an index head.
        topics: Number of centres.
        run: Mean length of a run, in tokens.
        spread: Deviation of keys around their centre, in units of the deviation of centres.
        dtype: Of queries and keys; weights are float32.
        seed: Of the draw.

    Returns:
        Queries (1, H, Q, D), keys (1, N, D), weights (1, H, Q).

    Example:
        >>> index = clustered_index(100, 3, heads=4, width=8)
        >>> index.q.shape, index.k.shape, index.w.shape
        (torch.Size([1, 4, 3, 8]), torch.Size([1, 100, 8]), torch.Size([1, 4, 3]))
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centres = normal(topics, width)
    runs = 2 * tokens // run + 2
    lengths = torch.randint(run // 2, 3 * run // 2 + 1, (runs,), generator=generator).clamp(min=1)
    topic = torch.randint(topics, (runs,), generator=generator).repeat_interleave(lengths)[:tokens]
    keys = centres[topic] + spread * normal(tokens, width)
    wanted = torch.randperm(topics, generator=generator)[:4]
    own = wanted[torch.randint(len(wanted), (heads,), generator=generator)]
    asked = centres[own][:, None] + 0.5 * spread * normal(heads, queries, width)
    weights = (normal(heads, 1) + 0.3 * normal(heads, queries)).exp()
    return Index(asked[None].to(dtype), keys[None].to(dtype), weights[None] * (heads * width) ** -0.5)


def index_of_heads(q: Float[Tensor, "B H Nq D"], k: Float[Tensor, "B H Nk D"]) -> Index:
    """An indexer whose scores are those of attention, rectified and averaged over heads: for captured queries and keys.

    The keys of all heads lie side by side in one wide key, and each head's query is zero beside its own part.

    Args:
        q: (B, H, Nq, D).
        k: (B, H, Nk, D), one key head for each query head.

    Returns:
        Queries (B, H, Nq, H D), keys (B, Nk, H D), weights (B, H, Nq).

    Example:
        >>> q, k = torch.randn(1, 3, 5, 4), torch.randn(1, 3, 7, 4)
        >>> index = index_of_heads(q, k)
        >>> torch.allclose(index.q @ index.k[:, None].mT, q @ k.mT, atol=1e-5)
        True
    """
    (batch, heads, queries, width), eye = q.shape, torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    wide = torch.einsum("bhqd,hg->bhqgd", q, eye).flatten(3)
    weights = q.new_full((batch, heads, queries), (heads * width**0.5) ** -1)
    return Index(wide, k.transpose(1, 2).flatten(2), weights)


def recall(wanted: Int[Tensor, "B Nq K"], found: Int[Tensor, "B Nq L"]) -> float:
    """The share of some chosen tokens that another choice finds.

    Args:
        wanted: (B, Nq, K), -1 for none.
        found: (B, Nq, L), -1 for none.

    Returns:
        A number in [0, 1].

    Example:
        >>> recall(torch.tensor([[[3, 5, 7, -1]]]), torch.tensor([[[5, 3]]]))
        0.6666666666666666
    """
    most = int(max(wanted.max(), found.max())) + 1
    seen = torch.zeros(*found.shape[:2], most + 1, dtype=torch.bool, device=found.device)
    seen.scatter_(2, found.long().where(found >= 0, most), True)
    held = seen.gather(2, wanted.long().clamp(min=0)) & (wanted >= 0)
    return float(held.sum()) / max(1, int((wanted >= 0).sum()))


@contextlib.contextmanager
def flat_scan_of(rows: int, piece: int) -> Iterator[None]:
    """Runs the flat scan with tiles and pieces of other sizes inside the block: for tuning, in one thread.

    Args:
        rows: Queries of a tile.
        piece: Products of a piece.

    Example:
        >>> with flat_scan_of(*TUNINGS[0]):
        ...     scoring.PIECE
        262144
    """
    before = op.TILE["flat"], scoring.PIECE
    op.TILE["flat"], scoring.PIECE = (rows, min(rows, 8)), piece
    try:
        yield
    finally:
        op.TILE["flat"], scoring.PIECE = before
