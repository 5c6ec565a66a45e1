"""Chosen key tiles on their way into an operator: what a compiler carries in place of a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .layout import TileLayout

_NAMES = ("counts", "q_pos", "k_pos")


class Deferred:
    """A choice of key tiles whose layout is made where the tensors are, inside an operator.

    Checking ids and building the layout of a mask read values, which a compiler does not have. While it traces,
    ``TileLayout.from_ids`` returns one of these: a text without sizes and tensors, as every mask is.

    Args:
        nq: Queries.
        nk: Keys.
        tile: ``(BM, BN)``.
        ids: As for ``TileLayout.from_ids``.
        named: ``counts``, ``q_pos`` and ``k_pos``, as far as there are any.
        mask: What else must hold, as text; empty for nothing.
        data: Tensors of that mask.
    """

    def __init__(
        self,
        nq: int,
        nk: int,
        tile: tuple[int, int],
        ids: torch.Tensor,
        named: dict[str, torch.Tensor | None],
        mask: str,
        data: Sequence[torch.Tensor],
    ) -> None:
        self.nq, self.nk = nq, nk
        given: dict[str, torch.Tensor] = {}
        for name in _NAMES:  # in a form that a compiler traces
            t = named.get(name)
            if t is not None:
                given[name] = t
        self.text = f"ids({', '.join([str(tile[0]), str(tile[1]), *given])}) {mask}"
        self.tensors = [ids, *given.values(), *data]

    def __and__(self, mask: Any) -> Deferred:
        """Keeps what ``mask`` also allows."""
        both = object.__new__(Deferred)
        both.nq, both.nk = self.nq, self.nk
        head, _, own = self.text.partition(") ")
        if own:
            raise NotImplementedError("a layout takes one mask while torch.compile traces; combine masks with & first")
        both.text, both.tensors = f"{head}) {mask.text}", [*self.tensors, *mask.data]
        return both


def layout_of(text: str, tensors: Sequence[torch.Tensor], q: torch.Tensor, k: torch.Tensor) -> TileLayout:
    """The layout of a deferred choice, for queries and keys that are there.

    Args:
        text: Of a :class:`Deferred`.
        tensors: Its tensors.
        q, k: The call's queries and keys; only their shapes are read.

    Returns:
        The :class:`~manyheads.mask.layout.TileLayout`.

    Raises:
        ValueError: As ``TileLayout.from_ids``.
    """
    from .layout import TileLayout
    from .text import parse

    head, _, mask = text.removeprefix("ids(").partition(") ")
    bm, bn, *given = head.split(", ")
    ids, named = tensors[0], dict(zip(given, tensors[1:], strict=False))
    data = tuple(tensors[1 + len(given) :])
    positions = (named.get("q_pos"), named.get("k_pos"))
    return TileLayout.from_ids(
        ids,
        named.get("counts"),
        nq=q.shape[2],
        nk=k.shape[2],
        tile=(int(bm), int(bn)),
        mask=parse(mask, data) if mask else None,
        positions=positions if given and positions != (None, None) else None,
        batch=q.shape[0],
        heads=q.shape[1],
    )
