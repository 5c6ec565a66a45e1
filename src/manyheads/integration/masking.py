"""What transformers says about a mask, translated into a `Mask` and padding, without an N x N tensor.

transformers describes a mask as a function of indices, built from a handful of factories, plus a padding tensor. The
factories are recognised by name and their parameters read from the closure; anything else is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyheads.common.errors import UnsupportedError
from manyheads.mask import Block, Causal, Document, Full, Mask, Window

_SOURCE = "transformers.masking_utils"
_documents: ContextVar[Document | None] = ContextVar("documents", default=None)


@dataclass(frozen=True)
class Visibility:
    """What may attend to what in one forward pass.

    Attributes:
        mask: The mask, on logical positions.
        positions: ``(q_pos, k_pos)`` when they are not the default ones.
        key_padding: ``(B, Nk)``, True for real keys; None when all are.
    """

    mask: Mask
    positions: tuple[Tensor, Tensor] | None = None
    key_padding: Tensor | None = None


class MaskCarrier(torch.Tensor):
    """A `Visibility` in the shape of the mask that models pass around: ``(B, 1, Nq, Nk)`` without any storage.

    Models hand the mask on untouched; whatever computes with it is refused, because there is nothing to compute with.

    Attributes:
        visibility: What it carries.
    """

    visibility: Visibility

    @staticmethod
    def __new__(cls, visibility: Visibility, shape: tuple[int, ...], device: Any = "cpu") -> MaskCarrier:
        """Wraps a visibility.

        Args:
            visibility: What to carry.
            shape: ``(B, 1, Nq, Nk)``.
            device: The device that it claims to be on.
        """
        found = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        assert isinstance(found, MaskCarrier)
        found.visibility = visibility
        return found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"MaskCarrier({self.visibility.mask!r}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Lets copies and moves pass, refuses the rest."""
        name = func.name() if hasattr(func, "name") else str(func)
        if name.split(".")[0] in ("aten::detach", "aten::alias", "aten::clone", "aten::_to_copy"):
            old = args[0]
            device = (kwargs or {}).get("device") or old.device
            return cls(old.visibility, tuple(old.shape), device)
        raise UnsupportedError(
            f"this model computes with its attention mask ({name}), which is {args[0] if args else 'a carrier'!r} and "
            "has no elements; call disable(model) or use attn_implementation='sdpa'"
        )


@contextmanager
def documents(lengths: Any) -> Iterator[Document]:
    """Tells models with attention from here that their inputs are packed.

    Inside the context, every token of an enabled model attends only within its own document, besides what the model's
    own mask says. Give the model ``position_ids`` that restart in each document, and no ``attention_mask``.

    Args:
        lengths: Document lengths, ``(n,)`` or ``(B, n)`` integers that sum to the tokens of a row, or a ``Document``.

    Yields:
        The mask.

    Raises:
        ValueError: Lengths that are negative or missing; later, when they do not sum to the tokens of a row.

    Example:
        >>> with documents([3, 2]) as mask:
        ...     print(mask)
        document([3, 2])
    """
    mask = document(lengths)
    token = _documents.set(mask)
    try:
        yield mask
    finally:
        _documents.reset(token)


def document(q_lens: Any, k_lens: Any = None) -> Document:
    """Makes a `Document`, also inside ``torch.inference_mode``: masks outlive the pass that they are made in.

    Args:
        q_lens: Document lengths on the query side, or a ``Document``.
        k_lens: Those on the key side when they differ.

    Example:
        >>> with torch.inference_mode():
        ...     print(document([1, 2]))
        document([1, 2])
    """
    if isinstance(q_lens, Document):
        return q_lens
    with torch.inference_mode(False):
        return Document(q_lens, k_lens)


def current_documents() -> Document | None:
    """The packing that `documents` has announced, if any."""
    return _documents.get()


def carry_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **others: Any,
) -> MaskCarrier:
    """The mask function that transformers calls once per forward pass and kind of layer.

    Args:
        batch_size: Rows.
        q_length: Number of queries.
        kv_length: Number of keys, those of a static cache that are not written yet included.
        q_offset: Position of the first query.
        kv_offset: Position of the first key.
        mask_function: Which pairs are visible, built from the factories of transformers.
        attention_mask: ``(B, tokens)`` bool, True for real tokens, from position 0.
        device: Where the model runs.
        **others: What other implementations of this interface take; without meaning here.

    Returns:
        The carrier.

    Raises:
        UnsupportedError: A mask function that is none of those known.
    """
    mask = Causal() if mask_function is None else translate(mask_function)
    if (packed := current_documents()) is not None:
        mask = mask & packed if not isinstance(mask, Full) else packed
    first = int(q_offset)
    aligned = first + q_length == kv_offset + kv_length
    if isinstance(mask, Full) or (aligned and (kv_offset == 0 or _slides(mask))):
        positions = None
    else:
        positions = torch.arange(first, first + q_length), torch.arange(kv_offset, kv_offset + kv_length)
    visibility = Visibility(mask, positions, _key_padding(attention_mask, kv_length, kv_offset))
    return MaskCarrier(visibility, (batch_size, 1, q_length, kv_length), device)


def translate(function: Callable[..., Any]) -> Mask:
    """Recognises a mask function of transformers.

    Args:
        function: ``(batch, head, q_index, kv_index) -> bool``, built from the factories of ``masking_utils``.

    Returns:
        The same mask, on positions that begin at 0.

    Raises:
        UnsupportedError: A function that comes from elsewhere, or a combination that has no equivalent.
    """
    kind = getattr(function, "__qualname__", "").split(".")[0]
    if getattr(function, "__module__", "") != _SOURCE or kind not in _RULES:
        raise UnsupportedError(
            f"mask function {getattr(function, '__qualname__', function)!r} is not one of transformers' own "
            f"({', '.join(sorted(_RULES))}); use attn_implementation='sdpa' for it"
        )
    return _RULES[kind](dict(inspect.getclosurevars(function).nonlocals))


def _all_of(given: dict[str, Any]) -> Mask:
    masks = [translate(each) for each in given["mask_functions"]]
    kept = [each for each in masks if not isinstance(each, Full)] or [Full()]
    found = kept[0]
    for each in kept[1:]:
        found = found & each
    return found


def _any_of(given: dict[str, Any]) -> Mask:
    masks = [translate(each) for each in given["mask_functions"]]
    found = masks[0]
    for each in masks[1:]:
        found = found | each
    return found


def _chunked(given: dict[str, Any]) -> Mask:
    if bool((given["left_padding"] != 0).any()):
        raise UnsupportedError("chunked attention over rows padded on the left; pad on the right")
    return Block(Window(1), int(given["chunk_size"]))


def _packed(given: dict[str, Any]) -> Mask:
    owners = given["packed_sequence_mask"].cpu()
    lengths = torch.stack([torch.bincount(row, minlength=int(owners.max()) + 1) for row in owners])
    return document(lengths[0] if bool((lengths == lengths[0]).all()) else lengths)


def _remapped(given: dict[str, Any]) -> Mask:
    """Positions counted inside each document: the same mask, if only differences of positions matter."""
    mask = translate(given["mask_function"])
    if not _slides(mask):
        raise UnsupportedError(f"packed sequences under {mask!r}, which depends on more than the distance of tokens")
    return mask


_RULES: dict[str, Callable[[dict[str, Any]], Mask]] = {
    "causal_mask_function": lambda given: Causal(),
    "bidirectional_mask_function": lambda given: Full(),
    "and_masks": _all_of,
    "or_masks": _any_of,
    "sliding_window_overlay": lambda given: Window(left=int(given["sliding_window"])),
    "sliding_window_bidirectional_overlay": lambda given: Window(int(given["sliding_window"]) + 1),
    "chunked_overlay": _chunked,
    "packed_sequence_mask_function": _packed,
    "remap_positions_for_packed_sequence": _remapped,
}


def _slides(mask: Mask) -> bool:
    """Whether the mask depends on the difference of positions only."""
    return all(isinstance(leaf, Causal | Full | Window) for leaf in mask.leaves())


def _key_padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise UnsupportedError(f"attention_mask: expected (B, tokens), got shape {tuple(attention_mask.shape)}")
    missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
    real = torch.nn.functional.pad(attention_mask.bool(), (0, missing))[:, kv_offset : kv_offset + kv_length]
    return None if bool(real.all()) else real
