"""The two branches of NAtS-L: a memory that some chunks write, and attention to the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.common.errors import UnsupportedError

from . import chunk_attention, chunk_memory
from .chunks import check_size, cut


@dataclass(frozen=True)
class NATSConfig:
    """How NAtS-L cuts and gates.

    Attributes:
        chunk: Tokens of a chunk.
        split: Attention heads made out of each head of the memory, by cutting its channels.
        decay_kept: Whether chunks that attention keeps still fade the memory, though they write nothing.
        both: Whether the types learn from both branches of every chunk; else only from the one that was chosen.
        eps: Epsilon of the norms.

    Raises:
        ValueError: A number out of range.
    """

    chunk: int = 64
    split: int = 1
    decay_kept: bool = True
    both: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_size(self.chunk)
        if self.split < 1:
            raise ValueError(f"split: expected a positive number of heads, got {self.split}")


class Branches(NamedTuple):
    """What the two branches give, before they are mixed.

    Attributes:
        memory: (B, H, N, Dv) read from the gated delta memory.
        attention: (B, H * split, N, Dv / split) softmax attention.
    """

    memory: Tensor
    attention: Tensor


class NATSState(NamedTuple):
    """What NAtS-L remembers: a memory of fixed size, and keys and values of the chunks kept for attention.

    Attributes:
        memory: What the memory branch remembers.
        attention: What the attention branch remembers.
    """

    memory: chunk_memory.MemoryState
    attention: chunk_attention.KeptState


DEFAULT = NATSConfig()
"""As published, one attention head for each head of the memory."""


def branches(
    memory: tuple[Tensor, Tensor, Tensor],
    attention: tuple[Tensor, Tensor, Tensor],
    *,
    decay: Tensor | None,
    beta: Tensor | None,
    attend: Tensor,
    config: NATSConfig = DEFAULT,
    lens: Tensor | None = None,
    state: NATSState | None = None,
    backend: str = "auto",
) -> tuple[Branches, NATSState]:
    """Both branches of :func:`manyheads.mechanism.linear.natsl.natsl`, from queries, keys and values of their own.

    Args:
        memory: Queries, keys (B, H, N, D) and values (B, H, N, Dv) of the memory; keys of length 1, queries scaled.
        attention: Queries, keys (B, Ha, N, Da) and values (B, Ha, N, Dva) of the attention, Ha a multiple of H.
        decay: As there; None for none (DeltaNet).
        beta: As there; None for an additive memory (as in Mamba-2).
        attend: As there, for H heads or a divisor of H.
        config: Sizes, and what learns; its ``split`` is not read.
        lens: Lengths of packed documents, (n,) or (B, n).
        state: What came before.
        backend: As in :func:`manyheads.attention`.

    Returns:
        What the branches give, and the state; that of packed documents is not to be continued.

    Raises:
        UnsupportedError: A state with packed documents.

    Example:
        >>> qkv = tuple(torch.randn(1, 1, 5, 4) for _ in range(3))
        >>> found, _ = branches(qkv, qkv, decay=None, beta=None, attend=torch.ones(1, 1, 5), config=NATSConfig(chunk=2))
        >>> found.memory.shape
        torch.Size([1, 1, 5, 4])
    """
    if lens is not None and state is not None:
        raise UnsupportedError("natsl: a state with packed documents; call the documents one by one")
    tokens, offset = memory[0].shape[2], 0 if state is None else state.attention.k.shape[2]
    if not tokens:
        state = empty(memory, attention) if state is None else state
        return Branches(memory[2], attention[2]), state
    chunks = cut(tokens, config.chunk, lens, offset=offset, device=memory[0].device)
    types = chunks.split(attend.to(torch.promote_types(attend.dtype, torch.float32)))[..., -1]
    types = torch.where(chunks.empty[:, None, :, -1], 0.0, types)  # of chunks that are complete
    state = empty(memory, attention) if state is None else state
    by_memory = types.repeat_interleave(memory[0].shape[1] // types.shape[1], 1)
    by_attention = types.repeat_interleave(attention[0].shape[1] // types.shape[1], 1)
    read, first = chunk_memory.read(
        *memory, decay, beta, by_memory, chunks, state.memory, fade=config.decay_kept, both=config.both, backend=backend
    )
    seen, second = chunk_attention.attend(
        *attention, by_attention, chunks, state.attention, both=config.both, backend=backend
    )
    return Branches(read, seen), NATSState(first, second)


def branches_step(
    memory: tuple[Tensor, Tensor, Tensor],
    attention: tuple[Tensor, Tensor, Tensor],
    state: NATSState | None = None,
    *,
    decay: Tensor | None,
    beta: Tensor | None,
    attend: Tensor | None,
    config: NATSConfig = DEFAULT,
) -> tuple[Branches, NATSState]:
    """One token of :func:`branches`.

    Args:
        memory: (B, H, D), (B, H, D), (B, H, Dv).
        attention: (B, Ha, Da), (B, Ha, Da), (B, Ha, Dva).
        state: What came before; nothing by default.
        decay: (B, H) or None.
        beta: (B, H) or None.
        attend: (B, H), read when this token completes its chunk; None is enough until then.
        config: As for :func:`branches`.

    Returns:
        (B, H, Dv) and (B, Ha, Dva), and the new state.

    Raises:
        ValueError: A chunk is complete and no type was given.

    Example:
        >>> qkv = tuple(torch.randn(1, 1, 4) for _ in range(3))
        >>> found, state = branches_step(qkv, qkv, decay=None, beta=None, attend=None, config=NATSConfig(chunk=2))
        >>> found.attention.shape, state.attention.k.shape[2]
        (torch.Size([1, 1, 4]), 1)
    """
    state = empty(memory, attention) if state is None else state
    complete = state.attention.k.shape[2] + 1 == config.chunk
    chosen: list[Tensor | None] = [None, None]
    if complete:
        if attend is None:
            raise ValueError("attend: this token completes its chunk, whose type is needed")
        chosen = [attend.repeat_interleave(part[0].shape[1] // attend.shape[1], 1) for part in (memory, attention)]
    read, first = chunk_memory.step(*memory, state.memory, decay, beta, chosen[0], fade=config.decay_kept)
    seen, second = chunk_attention.step(*attention, state.attention, chosen[1])
    return Branches(read, seen), NATSState(first, second)


def empty(memory: tuple[Tensor, Tensor, Tensor], attention: tuple[Tensor, Tensor, Tensor]) -> NATSState:
    """The state before the first token.

    Args:
        memory: Queries, keys and values (B, H, N, D) or (B, H, D) of the memory; only shapes and dtypes are read.
        attention: Those of the attention.

    Returns:
        A state without anything.

    Example:
        >>> qkv = tuple(torch.zeros(1, 1, 2, 4) for _ in range(3))
        >>> empty(qkv, qkv).attention.keys.shape
        torch.Size([1, 1, 0, 4])
    """
    return NATSState(chunk_memory.empty(*memory[1:]), chunk_attention.empty(*attention[1:]))


def split_channels(x: Float[Tensor, "B H N D"], split: int) -> Float[Tensor, "B Ha N Da"]:
    """Cuts the channels of every head into heads: ``(B, H, N, D)`` to ``(B, H * split, N, D / split)``.

    Args:
        x: (B, H, N, D).
        split: Heads made of one; divides D.

    Returns:
        The same numbers.

    Example:
        >>> split_channels(torch.arange(4.0).view(1, 1, 1, 4), 2)[0, :, 0].tolist()
        [[0.0, 1.0], [2.0, 3.0]]
    """
    return x.unflatten(-1, (split, -1)).transpose(2, 3).flatten(1, 2)
