"""Blocks of tokens: cutting documents into whole ones, averaging each, and which may meet which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from manyheads.common.errors import unknown
from manyheads.mask import Document, Mask

POOLS = ("mean", "max", "norm")
_CACHED = 1 << 18  # numbers


@dataclass(frozen=True, eq=False)
class Cut:
    """Packed documents, each padded to whole blocks, so that no block holds tokens of two documents.

    Made by :func:`cut`. Without documents nothing was padded and everything here is the identity.

    Attributes:
        tensors: What was given, its token axis now ``length`` long; padding is zero.
        block: Tokens of a block.
        length: Tokens, padding included.
        place: int64 ``(B|1, N)``: where each token went; None without documents.
        document: int64 ``(B|1, length)``: the document of each place, -1 for what belongs to none; None without
            documents.
        real: bool ``(B|1, length)``, True for tokens, False for padding; None without documents. It is what
            ``key_padding=`` of the engines takes, see :meth:`key_padding`.
        lens: The padded lengths, ``(n,)`` or ``(B, n)``; None without documents.
    """

    tensors: tuple[Tensor, ...]
    block: int
    length: int
    place: Tensor | None = None
    document: Tensor | None = None
    real: Tensor | None = None
    lens: Tensor | None = None

    @property
    def mask(self) -> Mask | None:
        """The documents of the padded lengths; None without documents. Not for traced code.

        A causal mechanism need not ask for it: blocks of :func:`block_documents` lie in one document, so ``Causal()``
        is all that remains, and it hides the padding at the end of a document from its tokens.
        """
        return None if self.lens is None else Document(self.lens)

    def key_padding(self, batch: int) -> Bool[Tensor, "B L"] | None:
        """What hides the padding from queries that look both ways: bool ``(B, length)``, or None without documents."""
        return None if self.real is None else self.real.expand(batch, -1)

    def restore(self, x: Tensor, *, dim: int = 2) -> Tensor:
        """Takes the padding out again.

        Args:
            x: Tokens of the padded length along ``dim``: an output ``(B, H, length, D)`` or an lse.
            dim: The axis of tokens.

        Returns:
            The same with the N tokens of what was cut, in their old order.

        Raises:
            ValueError: Another number of tokens.
        """
        if x.shape[dim] != self.length:
            raise ValueError(f"x: expected {self.length} tokens along dimension {dim}, got shape {tuple(x.shape)}")
        if self.place is None:
            return x
        if self.place.shape[0] == 1:
            return x.index_select(dim, self.place[0])
        return x.gather(dim, _spread(self.place, x, dim))


def cut(
    lens: Integer[Tensor, "*B n"] | Sequence[int] | None, *tensors: Tensor, block: int, dim: int = 2
) -> Cut:
    """Pads every document of a packed sequence to whole blocks.

    Selectors then cut blocks per document, and a packed call equals a loop over its documents. Where queries and keys
    have blocks of two sizes, cut with the larger one; the smaller divides it. Traced by ``torch.compile`` the padded
    length is an upper bound for so many documents, so that new lengths compile nothing; what is too many belongs to no
    document.

    Args:
        lens: Tokens of each document, ``(n,)`` or ``(B, n)``, on the CPU; zeros are legal. None: nothing is packed.
        tensors: Each with N tokens along ``dim``, N the sum of the lengths: q, k, v, gates. All have the same batch
            axis, their first.
        block: Tokens of a block.
        dim: The axis of tokens.

    Returns:
        A :class:`Cut`.

    Raises:
        ValueError: A block below 1, no tensor, tensors of different lengths, or documents that do not sum to them.

    Example:
        >>> parts = cut(torch.tensor([1, 3]), torch.arange(1.0, 5.0).reshape(1, 1, 4, 1), block=2)
        >>> parts.tensors[0].flatten().int().tolist()
        [1, 0, 2, 3, 4, 0]
        >>> parts.restore(parts.tensors[0]).flatten().int().tolist(), parts.lens.tolist()
        ([1, 2, 3, 4], [2, 4])
    """
    check_block(block)
    if not tensors:
        raise ValueError("tensors: expected at least one to cut, got none")
    tokens = tensors[0].shape[dim]
    for i, t in enumerate(tensors):
        if t.shape[dim] != tokens:
            raise ValueError(f"tensors[{i}]: expected {tokens} tokens along dimension {dim}, got {tuple(t.shape)}")
    if lens is None:
        return Cut(tensors, block, tokens)
    own = torch.as_tensor(lens).long()
    own = own[None] if own.dim() == 1 else own
    tracing = torch.compiler.is_compiling()
    if not tracing and (own.dim() != 2 or bool((own.sum(-1) != tokens).any()) or bool((own < 0).any())):
        raise ValueError(f"lens: expected lengths >= 0 that sum to the {tokens} tokens, got {own.tolist()}")
    padded = (own + block - 1) // block * block
    most = (tokens + own.shape[1] * (block - 1)) // block * block
    length = most if tracing else int(padded.sum(-1).max())
    ends, starts = own.cumsum(-1), padded.cumsum(-1) - padded
    at = torch.arange(tokens).expand(own.shape[0], -1).contiguous()
    document = torch.searchsorted(ends, at, right=True)
    place = at + (starts - ends + own).gather(1, document)
    device = tensors[0].device
    spots = torch.arange(length).expand(own.shape[0], -1).contiguous()
    owner = torch.searchsorted(padded.cumsum(-1), spots, right=True)
    owner = torch.where(owner < own.shape[1], owner, -1)
    real = torch.zeros(own.shape[0], length, dtype=torch.bool).scatter(1, place, True)
    place, owner, real = (t.to(device, non_blocking=True) for t in (place, owner, real))
    moved = tuple(_put(t, place, length, dim) for t in tensors)
    return Cut(moved, block, length, place, owner, real, padded if torch.as_tensor(lens).dim() == 2 else padded[0])


def pool(
    x: Float[Tensor, "B H N D"],
    block: int,
    how: str = "mean",
    *,
    real: Bool[Tensor, "#B N"] | None = None,
) -> Float[Tensor, "B H T D"]:
    r"""One vector for each block of tokens.

    Args:
        x: (B, H, N, D). A last block that is not full counts its own tokens only.
        block: Tokens of a block; N / block, rounded up, are T.
        how: ``"mean"``; ``"max"``, channel by channel; ``"norm"``: the sum over :math:`\sqrt n` of n tokens, whose
            length does not shrink with n as that of a mean does.
        real: bool (B|1, N), True for tokens that count, such as ``Cut.real``. A block without any gives 0.

    Returns:
        (B, H, T, D), summed in float32 (float64 for float64). Differentiable.

    Raises:
        ValueError: A block below 1, or no such way.

    Example:
        >>> x = torch.tensor([1.0, 3.0, 5.0]).reshape(1, 1, 3, 1)
        >>> [pool(x, 2, how).flatten().tolist() for how in ("mean", "max", "norm")]
        [[2.0, 5.0], [3.0, 5.0], [2.8284270763397217, 5.0]]
    """
    check_block(block)
    if how not in POOLS:
        raise unknown("way of pooling", how, POOLS)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    hidden = None if real is None else ~real[:, None, :, None]
    if how == "max":
        x = x if hidden is None else x.masked_fill(hidden, float("-inf"))
        top = _blockwise(x, block, lambda each: each.amax(3)).to(wide)
        return top.masked_fill(top == float("-inf"), 0.0)
    if hidden is not None:
        x = x.masked_fill(hidden, 0.0)
    heads, tokens = _at_once(x, block)
    parts = [part.split(tokens, 2) for part in x.split(heads, 1)]
    sums = [[_blockwise(some, block, lambda each: each.sum(3, dtype=wide)) for some in part] for part in parts]
    total = torch.cat([torch.cat(part, 2) for part in sums], 1)
    if real is None:
        first = torch.arange(0, x.shape[2], block, device=x.device)
        counts = (x.shape[2] - first).clamp(max=block).to(wide)[:, None]
    else:
        counts = _blockwise(real[:, None, :, None].to(wide), block, lambda each: each.sum(3)).clamp(min=1)
    return total / (counts if how == "mean" else counts.sqrt())


def block_causal(
    nq: int, nk: int, q_block: int, k_block: int, device: torch.device | str | None = None
) -> Bool[Tensor, "Tq Tk"]:
    """Which blocks of queries and keys hold a causal pair; the last query stands at the last key.

    Args:
        nq: Queries.
        nk: Keys; query i stands at position ``nk - nq + i``.
        q_block: Queries of a block.
        k_block: Keys of a block.
        device: Where to make it.

    Returns:
        bool (Tq, Tk): the block's last query sees its first key.

    Raises:
        ValueError: A block below 1.

    Example:
        >>> block_causal(4, 6, 2, 2).int().tolist()
        [[1, 1, 0], [1, 1, 1]]
    """
    last = _last(nq, q_block, device) + (nk - nq)
    check_block(k_block, "k_block")
    return torch.arange(0, nk, k_block, device=device) <= last[:, None]


def own_blocks(
    nq: int, nk: int, q_block: int, k_block: int, device: torch.device | str | None = None
) -> Bool[Tensor, "Tq Tk"]:
    """Which key blocks hold a position of each query block; the last query stands at the last key.

    Args:
        nq, nk, q_block, k_block, device: As for :func:`block_causal`.

    Returns:
        bool (Tq, Tk).

    Raises:
        ValueError: A block below 1.

    Example:
        >>> own_blocks(4, 6, 4, 2).int().tolist()
        [[0, 1, 1]]
    """
    first = torch.arange(0, nq, q_block, device=device) + (nk - nq)
    end = torch.arange(0, nk, k_block, device=device) + k_block - 1
    return block_causal(nq, nk, q_block, k_block, device) & (end >= first[:, None])


def block_documents(parts: Cut, q_block: int, k_block: int, *, causal: bool = True) -> Bool[Tensor, "#B 1 Tq Tk"]:
    """Which blocks of queries and keys may meet after a cut: those of one document, and causal ones if wanted.

    Args:
        parts: What :func:`cut` gave.
        q_block: Queries of a block; it divides the block of the cut.
        k_block: Keys of a block, likewise.
        causal: Whether a query sees no later key.

    Returns:
        bool (B|1, 1, Tq, Tk); without documents those of :func:`block_causal`, or all.

    Raises:
        ValueError: A block that does not divide that of the cut, where there are documents.

    Example:
        >>> parts = cut(torch.tensor([2, 3]), torch.ones(1, 1, 5, 1), block=2)
        >>> block_documents(parts, 2, 2)[0, 0].int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    device, n = parts.tensors[0].device, parts.length
    seen = block_causal(n, n, q_block, k_block, device)[None, None]
    if not causal:
        seen = torch.ones_like(seen)
    if parts.document is None:
        return seen
    for name, size in (("q_block", q_block), ("k_block", k_block)):
        if parts.block % size:
            raise ValueError(f"{name}: expected a divisor of the block={parts.block} of the cut, got {size}")
    q_doc, k_doc = parts.document[:, ::q_block], parts.document[:, ::k_block]
    return seen & ((q_doc[:, :, None] == k_doc[:, None]) & (q_doc >= 0)[:, :, None])[:, None]


def check_block(block: Any, name: str = "block") -> None:
    """Checks the size of a block.

    Raises:
        ValueError: Below 1.
        TypeError: Not an integer.
    """
    if isinstance(block, bool) or not isinstance(block, int | torch.SymInt):
        raise TypeError(f"{name}: expected a number of tokens, got {type(block).__name__}")
    if block < 1:
        raise ValueError(f"{name}: expected at least 1 token, got {block}")


def _last(tokens: int, block: int, device: torch.device | str | None) -> Tensor:
    """The last token of each block."""
    check_block(block, "q_block")
    return (torch.arange(0, tokens, block, device=device) + block).clamp(max=tokens) - 1


def _at_once(x: Tensor, block: int) -> tuple[int, int]:
    """Heads and tokens that are pooled together: on a CPU so many that what is converted stays in the cache."""
    batch, heads, tokens, width = x.shape
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return heads or 1, tokens or 1
    some = max(1, _CACHED // max(1, batch * width * block)) * block
    return max(1, _CACHED // max(1, batch * width * tokens)), some


def _blockwise(x: Tensor, block: int, reduce: Any) -> Tensor:
    """Reduces each block of the third axis, the ragged last one by itself."""
    whole = x.shape[2] // block * block
    parts = []
    if whole:
        parts.append(reduce(x[:, :, :whole].unflatten(2, (whole // block, block))))
    if whole < x.shape[2] or not whole:
        parts.append(reduce(x[:, :, None, whole:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _put(x: Tensor, place: Tensor, length: int, dim: int) -> Tensor:
    """Moves tokens to their places, zeros elsewhere."""
    empty = x.new_zeros(*x.shape[:dim], length, *x.shape[dim + 1 :])
    if place.shape[0] == 1:
        return empty.index_copy(dim, place[0], x)
    return empty.scatter(dim, _spread(place, x, dim), x)


def _spread(place: Tensor, x: Tensor, dim: int) -> Tensor:
    """Places per batch entry, (B, N), in the shape of tensors with N tokens along an axis."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = place.shape
    return place.reshape(shape).expand(*x.shape[:dim], place.shape[1], *x.shape[dim + 1 :])
