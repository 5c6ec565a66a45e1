"""Tokens cut into chunks that begin anew with every document: for mechanisms that treat a chunk as one thing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Chunks:
    """Where tokens lie when they are cut into chunks of C slots; the slots of incomplete chunks stay empty.

    Attributes:
        size: Slots C of a chunk.
        tokens: Tokens N.
        count: Chunks M.
        offset: Empty slots before the first token, for tokens that came before.
        rank: int64 (R, M) number of each chunk in its document; R is 1 or the batch size.
        document: int64 (R, M) document of each chunk; None when there is one.
        take: int64 (R, M * C) token of each slot, N for none; None when slots are in order.
        put: int64 (R, N) slot of each token; None when slots are in order.
    """

    size: int
    tokens: int
    count: int
    offset: int
    rank: Tensor
    document: Tensor | None = None
    take: Tensor | None = None
    put: Tensor | None = None

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Tokens as chunks: ``(B, H, N, ...)`` to ``(B, H, M, C, ...)``, empty slots filled."""
        if self.take is None:
            after = self.count * self.size - self.offset - self.tokens
            if self.offset or after:
                x = F.pad(x, (*(0, 0) * (x.dim() - 3), self.offset, after), value=fill)
        else:
            one = x.new_full((*x.shape[:2], 1, *x.shape[3:]), fill)
            x = _select(torch.cat([x, one], 2), self.take)
        return x.unflatten(2, (self.count, self.size))

    def join(self, x: Tensor) -> Tensor:
        """Chunks as tokens: ``(B, H, M, C, ...)`` to ``(B, H, N, ...)``."""
        x = x.flatten(2, 3)
        return x.narrow(2, self.offset, self.tokens) if self.put is None else _select(x, self.put)

    @property
    def empty(self) -> Tensor:
        """bool (R, M, C), True for slots without a token of this call."""
        if self.take is None:
            slot = torch.arange(self.count * self.size, device=self.rank.device)
            taken = (slot >= self.offset) & (slot < self.offset + self.tokens)
            return ~taken.view(1, self.count, self.size)
        return (self.take == self.tokens).unflatten(1, (self.count, self.size))


def cut(
    tokens: int, size: int, lens: Tensor | None, *, offset: int = 0, device: torch.device | str = "cpu"
) -> Chunks:
    """Cuts tokens, or packed documents, into chunks.

    Args:
        tokens: Tokens N, at least 1.
        size: Tokens of a chunk.
        lens: Lengths of documents (n,) or (R, n) that sum to N, or None for one.
        offset: Tokens of the first document's first chunk that came before this call.
        device: Where the indices go.

    Returns:
        The chunks.

    Raises:
        ValueError: For a size that is no positive integer.

    Example:
        >>> chunks = cut(5, 2, torch.tensor([3, 2]))
        >>> chunks.split(torch.arange(5.0).view(1, 1, 5), fill=-1.0)[0, 0].tolist()
        [[0.0, 1.0], [2.0, -1.0], [3.0, 4.0]]
        >>> chunks.rank.tolist(), chunks.document.tolist()
        ([[0, 1, 0]], [[0, 0, 1]])
    """
    check_size(size)
    if lens is None:
        count = -(-(tokens + offset) // size)
        return Chunks(size, tokens, count, offset, torch.arange(count, device=device)[None])
    rows = torch.atleast_2d(lens).to(device, torch.int64)
    rows = torch.cat([rows[:, :1] + offset, rows[:, 1:]], 1)
    counts = (rows + size - 1) // size
    if torch.compiler.is_compiling():
        count = (tokens + offset) // size + rows.shape[1]  # a bound that holds for all lengths: one graph serves them
    else:
        count = int(counts.sum(1).max())
    ends, stops = rows.cumsum(1), counts.cumsum(1)
    chunk = torch.arange(count, device=device).expand(rows.shape[0], -1)
    document = torch.searchsorted(stops, chunk.contiguous(), right=True).clamp(max=rows.shape[1] - 1)
    rank = chunk - (stops - counts).gather(1, document)
    slot = (rank[..., None] * size + torch.arange(size, device=device)).flatten(1)
    owner = document.repeat_interleave(size, 1)
    token = (ends - rows).gather(1, owner) - offset + slot
    inside = (slot < rows.gather(1, owner)) & (token >= 0)
    place = (torch.arange(tokens, device=device) + offset).expand(rows.shape[0], -1)
    mine = torch.searchsorted(ends, place.contiguous(), right=True)
    put = place - (ends - rows).gather(1, mine) + (stops - counts).gather(1, mine) * size
    return Chunks(size, tokens, count, offset, rank, document, torch.where(inside, token, tokens), put)


def check_size(size: int) -> None:
    """Checks the number of tokens of a chunk.

    Raises:
        ValueError: For what is no positive integer.

    Example:
        >>> check_size(16)
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"chunk: expected a positive number of tokens, got {size!r}")


def earlier(chunks: Chunks, cached: int = 0) -> tuple[str, tuple[Tensor, Tensor] | None]:
    """The mask under which a chunk sees the chunks before it in its document, itself excluded.

    Args:
        chunks: The chunks; queries are chunks in order, keys are ``cached`` older chunks of the first document and
            then the same chunks.
        cached: How many older chunks there are.

    Returns:
        Text of a mask, and logical positions ``(q_pos, k_pos)`` or None.

    Example:
        >>> earlier(cut(5, 2, None))
        ('causal & ~window(1)', None)
        >>> earlier(cut(5, 2, torch.tensor([3, 2])))[1][0].tolist()    # documents lie far apart
        [0, 1, 5]
    """
    if chunks.document is None:
        return "causal & ~window(1)", None
    reach = cached + chunks.count
    rows = chunks.document.shape[0]
    here = cached + torch.arange(chunks.count, device=chunks.document.device) + chunks.document * reach
    before = torch.arange(cached, device=here.device).expand(rows, -1)
    both = torch.cat([before, here], 1)
    positions = (here[0], both[0]) if rows == 1 else (here, both)
    return f"causal & ~window(1) & window({reach})", positions


def _select(x: Tensor, index: Tensor) -> Tensor:
    """Entries of axis 2 by an index (R, n) that may differ between batch entries."""
    if index.shape[0] == 1:
        return x.index_select(2, index[0])
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[batch, :, index].transpose(1, 2)
