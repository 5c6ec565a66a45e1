"""Layouts as text and tensors, which is all that an engine op can carry."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .layout import TileLayout

FIELDS = (
    "index",
    "rows",
    "first",
    "count",
    "mask_id",
    "bits",
    "q_pos",
    "k_pos",
    "ids",
    "ids_count",
    "ids_mask",
)
_live: weakref.WeakValueDictionary[tuple[int, ...], TileLayout] = weakref.WeakValueDictionary()


def flatten(layout: TileLayout) -> tuple[str, tuple[torch.Tensor, ...]]:
    """Text without sizes, and one tensor of sizes before the layout's own."""
    known = layout.__dict__.get("_flat")
    if known is None:
        tensors = layout._tensors()
        sizes = (layout.nq, layout.nk, *layout.tile, layout.batch, layout.heads)
        known = f"layout({', '.join(tensors)})", (torch.tensor(sizes, dtype=torch.int64), *tensors.values())
        _remember(layout, known)
    return known


def unflatten(text: str, data: Sequence[torch.Tensor]) -> TileLayout:
    """The layout of a text and its tensors; the object that owns these very tensors, while it lives.

    Raises:
        ValueError: If text and tensors do not belong together.
    """
    from .layout import TileLayout

    names = text.removeprefix("layout(").removesuffix(")").split(", ")
    if not text.startswith("layout(") or len(data) != len(names) + 1 or not set(names) <= set(FIELDS):
        raise ValueError(f"text: expected 'layout(field, ...)' with {len(data) - 1} fields, got {text!r}")
    found = _live.get(_identity(data))
    if found is not None:
        own_text, own = found.flatten()
        if own_text == text and _alike(own, data):
            return found
    nq, nk, bm, bn, batch, heads = data[0].tolist()
    tensors: dict[str, Any] = dict(zip(names, data[1:], strict=True))
    made = TileLayout(nq=nq, nk=nk, tile=(bm, bn), batch=batch, heads=heads, **tensors)
    _remember(made, (text, tuple(data)))
    return made


def _remember(layout: TileLayout, flat: tuple[str, tuple[torch.Tensor, ...]]) -> None:
    layout.__dict__["_flat"] = flat
    _live[_identity(flat[1])] = layout


def _identity(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


def _alike(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(a, b, strict=True))
