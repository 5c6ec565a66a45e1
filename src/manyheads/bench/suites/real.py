"""Real queries, keys and values without a file: what a small encoder's layers receive on real text."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from manyheads.bench.workload import Captured, read_captured
from manyheads.common.errors import missing_extra

LAYERS = 6
"""Layers of the encoder."""
NAME = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Layer:
    """One captured layer that a case will need.

    Attributes:
        which: Number of a layer of the encoder, or the name of a layer in a file.
        held: The layer of the file; ``None`` for the encoder, which is run when it is needed.
    """

    which: int | str
    held: Captured | None = None

    @property
    def name(self) -> str:
        """Its place in the names of cases."""
        return str(self.which) if self.held is not None else f"minilm.layer{self.which}"

    def read(self, length: int) -> Captured:
        """The layer, with at least so many tokens.

        Raises:
            ImportError: transformers or safetensors is not installed.
            ValueError: The encoder's package is not installed, or there is not that much text.
        """
        return self.held if self.held is not None else encoder_layers(length)[int(self.which)]


@functools.lru_cache(maxsize=1)
def encoder_layers(length: int) -> tuple[Captured, ...]:
    """Runs the encoder on docstrings of the standard library, laid end to end, and keeps what its attention received.

    Args:
        length: Tokens that are needed.

    Returns:
        The layers, in order, each with at least that many tokens.

    Raises:
        ImportError: transformers or safetensors is not installed.
        ValueError: The encoder's package is not installed, or there is not that much text.
    """
    from manyheads.bench.suites.packing import LONGEST, real_documents
    from manyheads.integration import encoder

    try:
        from manyheads.integration.capture import capture
    except ImportError as error:
        raise missing_extra("hf", "real input") from error
    with encoder.quiet():
        model, tokenizer = encoder.load(attn_implementation="sdpa")
    texts, tokens = [], 0
    for text in real_documents(4 + length // 12):
        if tokens >= length:
            break
        texts.append(text)
        tokens += len(tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"])
    if tokens < length:
        raise ValueError(f"length: the standard library has {tokens} tokens of documents, got {length}")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = capture(model, texts, Path(folder) / "encoder.safetensors", tokenizer=tokenizer, name=NAME)
        return tuple(read_captured(path))
