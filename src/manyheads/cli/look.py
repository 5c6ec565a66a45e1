"""``manyheads show``, ``explain`` and ``capture``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.bench.workload import DTYPES
from manyheads.common.errors import missing_extra, unknown
from manyheads.mask import as_mask

MOST_CELLS = 512
"""Cells in a row that are still drawn as text."""


def show(text: str, queries: int, keys: int, tile: str | None, png: Path | None) -> int:
    """Draws a mask.

    Args:
        text: The mask.
        queries: Query tokens.
        keys: Key tokens.
        tile: Queries and keys in a cell of the drawing, ``"128x128"``; as many as fit by default.
        png: The file to draw into; the terminal if ``None``.

    Returns:
        The exit status.

    Raises:
        ValueError: A text that does not parse, a tile of another form, a file that cannot be written.
        ImportError: Pictures need matplotlib.
    """
    mask = as_mask(text)
    cell: dict[str, Any] = {"size": 32 if png is None else 256}
    if tile is not None:
        rows, columns = numbers(tile, 2, "tile", "128x128")
        cell = {"tile": (rows, columns)}
        if png is None and -(-keys // columns) > MOST_CELLS:
            raise ValueError(f"tile: more than {MOST_CELLS} cells of {tile} in a row do not fit; try --png")
    try:
        drawn = mask.show(queries, keys, png=png, **cell)
    except OSError as error:
        raise ValueError(f"png: cannot write {png}: {error.strerror or error}") from None
    print(drawn if png is None else png)
    layout = mask.tiles(queries, keys, tile=cell.get("tile", (128, 128)))
    rows, columns = layout.tile
    print(
        f"tiles of {rows} x {columns}: {layout.density:.2%} visited, {layout.area:.2%} of the pairs visible, "
        f"{len(layout.bits)} unique bitmaps"
    )
    if layout.cost_note:
        print(f"note: {layout.cost_note}")
    return 0


def explain(
    query: str,
    kv: str | None,
    mask: str,
    dtype: str,
    *,
    grad: bool = False,
    lse: bool = False,
    backend: str = "auto",
) -> int:
    """Says which backend takes a call; nothing of the size of the call is allocated.

    Args:
        query: Shape of q, ``"1x8x4096x64"``.
        kv: Shape of k and v.
        mask: The mask.
        dtype: Name of the dtype.
        grad: Whether the inputs need gradients.
        lse: Whether the call returns lse too.
        backend: ``"auto"`` or a backend by name.

    Returns:
        The exit status.

    Raises:
        ValueError: A shape of another form, an unknown dtype, or what the call itself would raise.
    """
    from manyheads.attention import explain as explanation

    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    q_shape = numbers(query, 4, "query", "1x8x4096x64")
    kv_shape = q_shape if kv is None else numbers(kv, 4, "kv", "1x2x4096x64")

    def unallocated(shape: tuple[int, ...]) -> Tensor:
        one = torch.zeros((), dtype=getattr(torch, dtype), requires_grad=grad)
        return one.expand(shape)

    q, k, v = unallocated(q_shape), unallocated(kv_shape), unallocated(kv_shape)
    print(explanation(q, k, v, mask=as_mask(mask), return_lse=lse, backend=backend))
    return 0


def capture(model: str, text: Path, out: Path, tokens: int, layers: list[int]) -> int:
    """Records q, k, v of a model on a text.

    Args:
        model: Folder or name of a transformers model.
        text: A text file; it is read as one sequence.
        out: The safetensors file to write.
        tokens: Most tokens to read, if the model takes as many.
        layers: Which layers; empty for all.

    Returns:
        The exit status.

    Raises:
        ValueError: No such model or text, or an output that cannot be written.
        ImportError: The extra with transformers is not installed.
    """
    if any(importlib.util.find_spec(name) is None for name in ("transformers", "safetensors")):
        raise missing_extra("hf", "capturing a model")
    from transformers import AutoModel, AutoTokenizer

    from manyheads.integration.capture import capture as record

    try:
        read = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text: cannot read {text}: {getattr(error, 'strerror', None) or error}") from None
    if not read.strip():
        raise ValueError(f"text: {text} is empty")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot load {model}: {str(error).splitlines()[0]}") from None
    most = min(tokens, getattr(loaded.config, "max_position_embeddings", tokens), tokenizer.model_max_length)
    inputs = tokenizer(read, return_tensors="pt", truncation=True, max_length=int(most))
    written = record(loaded, dict(inputs), out, layers=layers or None)
    count = inputs["input_ids"].shape[1]
    print(f"{count} tokens: {written}; measure them with `manyheads bench --suite masks --input {written}`")
    return 0


def numbers(text: str, count: int, name: str, example: str) -> tuple[int, ...]:
    """Reads positive numbers joined by ``x``.

    Args:
        text: What came.
        count: How many there must be.
        name: Of the argument, for the message.
        example: A good one, for the message.

    Returns:
        The numbers.

    Raises:
        ValueError: Another form.

    Example:
        >>> numbers("128x64", 2, "tile", "128x128")
        (128, 64)
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != count or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"{name}: expected {count} positive numbers as {example}, got {text!r}")
    return tuple(int(p) for p in parts)
