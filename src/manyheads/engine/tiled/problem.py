"""One attention problem as the backends see it: tensors, a layout, and what changes the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...mask.layout import TileLayout
from .bias import Term
from .boxing import BoxPlan
from .weight import Weight

ORDERS = ("auto", "queries", "keys")
"""Which loop of the engine is the outer one."""

PRECISIONS = ("exact", "int8", "int4")
"""In what the products of queries and keys are computed."""

HOW = {f"{order} {qk}": (order, qk) for order in ORDERS for qk in PRECISIONS}
"""Order and precision by the one text in which they cross the operator."""

AUTO = "auto exact"


@dataclass(slots=True, eq=False)  # not frozen: that would cost microseconds on every call
class Problem:
    """Everything that defines the result of one call of the engine.

    Scores are ``s = cap(scale * q k^T) + bias`` in float32 (float64 for float64 inputs), where
    ``cap(x) = c * tanh(x / c)`` when ``softcap = c > 0``; weights are ``weight(s)`` on the pairs that the
    layout allows, and zero elsewhere.

    Attributes:
        q, k, v: ``(B, Hq, Nq, D)``, ``(B, Hkv, Nk, D)``, ``(B, Hkv, Nk, Dv)``.
        layout: Which pairs may interact, cut into tiles.
        q_pos, k_pos: int64 logical positions ``(B|1, Nq)``, ``(B|1, Nk)``; read by positional biases and dropout.
        weight: How a score becomes a weight.
        scale: Multiplies the dot products.
        softcap: 0 for none.
        terms: What is added to the scores.
        sink: ``(Hq,)`` logit of an extra key whose value is zero, or None.
        dropout_p: Share of weights dropped after normalisation.
        seed: Keys the dropout pattern.
        skip_threshold: Tiles whose best score lies below the running maximum by more than ``-log`` of it are
            skipped; 0 for none.
        bias_grads: Whether the backward should find the gradients of the terms; zeros otherwise.
        own_tiles: Whether the caller chose the layout's tiles, rather than the engine.
        origin: Where the first batch entry and the first query head lie in a larger call; dropout depends on it.
        wide: Whether output and gradients keep the dtype they are summed in, as parts of a larger sum should.
        order: One of ``ORDERS``.
        qk: One of ``PRECISIONS``.
        boxes: Where a neighbourhood is computed by boxes of a grid; ``layout`` is not read then.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: TileLayout
    q_pos: Tensor
    k_pos: Tensor
    weight: Weight
    scale: float
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    sink: Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    skip_threshold: float = 0.0
    bias_grads: bool = True
    own_tiles: bool = False
    origin: tuple[int, int] = (0, 0)
    wide: bool = False
    order: str = "auto"
    qk: str = "exact"
    boxes: BoxPlan | None = None

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of scores and statistics."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def result(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a result that is given back in ``dtype`` unless the call is wide."""
        return self.accumulate if self.wide else dtype

    def term_result(self, term: Term) -> torch.dtype:
        """The dtype of the gradient of a term."""
        return term.total(self.accumulate) if self.wide else term.tensor.dtype

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def plain(self) -> bool:
        """Whether this is softmax over masked scores and nothing else (a sink is applied afterwards)."""
        return self.plain_but_skipping and not self.skip_threshold and self.qk == "exact"

    @property
    def plain_but_skipping(self) -> bool:
        """Whether scores are products times a scale, for a softmax, however they are computed and chosen."""
        return not (self.terms or self.softcap or self.dropout_p) and self.weight.softmax


@dataclass(slots=True)
class Grads:
    """Gradients of one problem, in the order of its inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None = None
    terms: Sequence[Tensor] = ()
