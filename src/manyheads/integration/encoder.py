"""Sentence encoders of transformers on packed documents: every token is computed once, and none in vain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.integration.masking import documents
from manyheads.integration.transformers import is_enabled
from manyheads.method.packing import PackedBatch, Packing, collate, pack


def encode_packed(
    model: nn.Module,
    sequences: Sequence[Any],
    *,
    packing: Packing | str = "spfhp",
    tokens: int = 4096,
    pool: str = "mean",
    normalize: bool = True,
    first_position: int = 0,
) -> Tensor:
    """Embeds documents with an encoder, many documents in one forward pass and no padding.

    Rows of the packing are laid end to end until a forward pass has about ``tokens`` tokens. Positions begin anew in
    each document and a ``Document`` mask keeps documents apart, so that each embedding is what the document alone
    would get.

    Args:
        model: An encoder of transformers that ``enable`` has been called on, in evaluation mode. It must take
            ``position_ids`` and return ``last_hidden_state``.
        sequences: Token ids of each document, special tokens included.
        packing: A packing of their lengths, or the name of an algorithm that makes one with rows as long as the
            longest document.
        tokens: Tokens in a forward pass. Too few waste launches, too many leave the caches of the processor.
        pool: ``"mean"`` over the tokens of the document, or its ``"first"`` token.
        normalize: Whether embeddings are scaled to length 1.
        first_position: Position of the first token: 0, or 2 for the RoBERTa family, which counts from there.

    Returns:
        ``(documents, D)`` in the given order, float32 or the model's own dtype if that is wider.

    Raises:
        ValueError: The model is not enabled, a document is empty or longer than the model's positions, the packing is
            of other lengths, or ``pool`` is another word.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from manyheads.integration.transformers import enable
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = enable(BertModel(tiny).eval())
        >>> encode_packed(model, [[101, 7, 102], [101, 8, 9, 102]]).shape
        torch.Size([2, 8])
    """
    if pool not in ("mean", "first"):
        raise ValueError(f"pool: expected 'mean' or 'first', got {pool!r}")
    if not is_enabled(model):
        raise ValueError("model: call manyheads.integration.transformers.enable(model) first")
    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths, default=1)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest + first_position > limit:
        raise ValueError(f"sequences: the model has {limit} positions, the longest document has {longest} tokens")
    if isinstance(packing, str):
        packing = pack(lengths, longest, algorithm=packing)
    elif list(packing.lengths) != lengths:
        raise ValueError("packing: made for sequences of other lengths")
    parts, order = [], []
    for rows in _passes(packing, tokens):
        batch = collate(sequences, packing, rows=rows, end_to_end=True)
        parts.append(_embed(model, batch, pool, first_position))
        order.append(batch.sequences)
    if not parts:
        return torch.empty(0, model.config.hidden_size)
    with torch.inference_mode():
        found = torch.cat(parts)
        if normalize:
            found = nn.functional.normalize(found, dim=-1)
        return torch.empty_like(found).index_copy_(0, torch.cat(order).to(found.device), found)


def _embed(model: nn.Module, batch: PackedBatch, pool: str, first_position: int) -> Tensor:
    device = next(model.parameters()).device
    with documents(batch.mask()), torch.inference_mode():
        hidden = model(
            input_ids=batch.input_ids.to(device),
            position_ids=(batch.position_ids + first_position).to(device),
        ).last_hidden_state
        if pool == "mean":
            return batch.mean(hidden)
        return batch.first(hidden).to(torch.promote_types(hidden.dtype, torch.float32))


def _passes(packing: Packing, tokens: int) -> list[list[int]]:
    """Groups rows so that each group has at most ``tokens`` tokens, or a single row."""
    found: list[list[int]] = []
    room = 0
    for row, pack_of in enumerate(packing.packs):
        size = sum(packing.lengths[index] for index in pack_of)
        if not found or size > room:
            found.append([])
            room = tokens
        found[-1].append(row)
        room -= size
    return found
