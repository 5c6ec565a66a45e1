"""What a recurrent mechanism can do with a mask: run both ways or one way, and start anew at document borders."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from manyheads.common.tracing import constant
from manyheads.mask import Mask, as_mask
from manyheads.mask.text import parse
from manyheads.spec import Spec

Order = Literal["causal", "full"]

_FORMS = {
    # the text of a mask: whether it is causal, whether it has documents
    "causal": (True, False),
    "full": (False, False),
    "document($0)": (False, True),
    "causal & document($0)": (True, True),
    "document($0) & causal": (True, True),
}


def order(
    spec: Spec, mask: Mask | str | Tensor | None, q: Tensor, *, default: Order = "causal"
) -> tuple[bool, Tensor | None]:
    """Reads the mask of a mechanism whose tokens form one sequence, or packed documents.

    Understood are None, ``Causal()``, ``Full()``, ``Document(lens)`` and ``Document(lens) & Causal()``. What they ask
    for must be declared: ``causal_self`` or ``noncausal_self``. Every other mask asks for ``mask``. Traceable by
    ``torch.compile``; new document lengths compile nothing.

    Args:
        spec: The mechanism that asks.
        mask: A mask value, its text, a bool tensor, or None for the default.
        q: ``(B, H, N, D)``, for the sizes that a mask must fit.
        default: What None means.

    Returns:
        Whether a token sees only itself and earlier ones, and the lengths of packed documents, ``(n,)`` or ``(B, n)``
        on the CPU, or None.

    Raises:
        UnsupportedError: For a mask that the mechanism does not declare.
        ValueError: For documents that do not add up to the tokens, or for another batch size.
        TypeError: For what is no mask.

    Example:
        >>> from manyheads import Causal, Document
        >>> from manyheads.spec import find
        >>> q = torch.ones(1, 1, 5, 4)
        >>> order(find("exact"), Document([2, 3]) & Causal(), q)
        (True, tensor([2, 3]))
        >>> order(find("exact"), None, q)
        (True, None)
    """
    if mask is None:
        mask = default
    if isinstance(mask, str) and mask in ("causal", "full"):
        # equal masks are one object, which a compiler must not meet by two ways: no value is made where none is needed
        spec.require("causal_self" if mask == "causal" else "noncausal_self")
        return mask == "causal", None
    if isinstance(mask, str):
        value = _read(mask)
    elif isinstance(mask, Tensor):
        spec.require("mask")
        raise ValueError("mask: expected a mask with a text, got a tensor")
    else:
        value = as_mask(mask)
    form = _FORMS.get(value.text)
    if form is None or value.shape[1] != 1:
        spec.require("mask")
        raise ValueError(f"mask: expected causal, full or documents, got {value!r}")
    causal, packed = form
    spec.require("causal_self" if causal else "noncausal_self")
    if not packed:
        return causal, None
    lens, tokens = value.data[0], q.shape[2]
    if value.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"mask: its batch size is {value.shape[0]}; q has {q.shape[0]} (shape {tuple(q.shape)})")
    if not torch.compiler.is_compiling() and bool((lens.sum(-1) != tokens).any()):
        sums = lens.sum(-1).tolist()
        raise ValueError(f"mask: documents must sum to the N={tokens} tokens of q, got {sums}")
    return causal, lens


def visible(mask: Mask | str | None, q: Tensor, *, default: Order = "causal") -> Bool[Tensor, "#B 1 N N"]:
    """The pairs that a mask of :func:`order` allows, for references.

    Args:
        mask: As for :func:`order`.
        q: ``(B, H, N, D)``.
        default: What None means.

    Returns:
        bool ``(B|1, 1, N, N)``, rows are queries, on the device of ``q``.

    Example:
        >>> visible("document([1, 2]) & causal", torch.ones(1, 1, 3, 4))[0, 0].int().tolist()
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    """
    return as_mask(default if mask is None else mask).dense(q.shape[2], q.shape[2]).to(q.device)


_read = constant(parse)  # a compiler keeps the mask that a text names
