"""What one rank computes between two exchanges: the engine on some queries and some keys, by explicit positions.

A scheme decides which keys meet which queries when; here is what all schemes share: the call's options cut to the
heads and tokens of a step, the merging of partial results, and the gradients of what every rank holds whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..engine.tiled import bias as biases
from ..engine.tiled import launch
from ..engine.tiled.bias import Pair, PerBlock, PerKey, Term
from ..engine.tiled.op import op
from ..engine.tiled.problem import AUTO
from ..mask import Mask
from ..mask.build import build

_backward = torch.ops.manyheads.tiled_backward.default
_PROBE = (64, 64)  # tile of the layouts that only say whether anything is visible


@dataclass(eq=False)
class Call:
    """One call of attention over the whole sequence, as every rank knows it.

    Attributes:
        mask: Over all heads and tokens; the logical position of a token is its place in the sequence.
        scale, softcap, dropout_p: As for attention; 0 for none.
        seed: Of dropout, the same on all ranks.
        terms: Biases, each over all heads and tokens.
        sink: ``(Hq,)`` or None.
        padding: bool ``(B, N)``, True for real keys, or None.
        backend: ``"blocked"`` or ``"triton"``.
        heads: Query heads that this rank computes.
        kv: Key heads that these read.
        bias_grads: Whether some bias needs gradients.
    """

    mask: Mask
    scale: float
    softcap: float
    dropout_p: float
    seed: Tensor | None
    terms: tuple[Term, ...]
    sink: Tensor | None
    padding: Tensor | None
    backend: str
    heads: range
    kv: range
    bias_grads: bool = True
    _seen: dict[tuple[int, int], bool] = field(default_factory=dict)

    def on_heads(self, heads: range, kv: range) -> Call:
        """The same call for some of its heads."""
        mask = self.mask if self.mask.shape[1] == 1 else self.mask.heads(heads.start, heads.stop)
        backend = "blocked" if self.dropout_p and heads.start else self.backend  # kernels count heads from 0
        rest = (self.scale, self.softcap, self.dropout_p, self.seed, self.terms, self.sink, self.padding, backend)
        return Call(mask, *rest, heads, kv, self.bias_grads)

    def sees(self, q_index: Tensor, k_index: Tensor) -> bool:
        """Whether some query may see some key."""
        if not len(q_index) or not len(k_index):
            return False
        key = (id(q_index), id(k_index))
        if key not in self._seen:
            layout = build(self.mask, len(q_index), len(k_index), tile=_PROBE, positions=(q_index, k_index))
            self._seen[key] = layout.visited > 0
        return self._seen[key]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-normaliser of some queries over some keys, in the accumulation dtype, without the sink.

        Args:
            q: ``(B, h, n, D)``: this rank's heads of some queries.
            k: ``(B, hkv, m, D)`` and ``v (B, hkv, m, Dv)``: the key heads that they read, of some keys.
            v: Values.
            q_index: int64 ``(n,)``: which tokens of the sequence the queries are.
            k_index: int64 ``(m,)``: which the keys are.
        """
        acc = accumulation(q)
        if not self.sees(q_index, k_index):
            out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=acc)
            return out, q.new_full(q.shape[:3], -torch.inf, dtype=acc)
        with _plain(q.device):
            return op(*self._arguments(q, k, v, q_index, k_index)[0])

    def backward(
        self,
        tensors: tuple[Tensor, Tensor, Tensor],
        index: tuple[Tensor, Tensor],
        result: tuple[Tensor, Tensor],
        grads: tuple[Tensor, Tensor | None],
        shared: Shared,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gradients of some queries and keys, given the final result of the queries over all keys.

        Args:
            tensors: ``q, k, v`` as in :meth:`forward`.
            index: ``q_index, k_index``.
            result: Output and log-normaliser over all keys, the sink included.
            grads: Of the output, and of the log-normaliser or None.
            shared: Where gradients of biases are added up.

        Returns:
            Gradients of ``q, k, v`` in the accumulation dtype, or None where nothing is visible.
        """
        q, k, v = tensors
        if not self.sees(*index):
            return None
        arguments, cuts = self._arguments(q, k, v, *index)
        with _plain(q.device):
            dq, dk, dv, *dterms = _backward(grads[0], grads[1], *result, self.bias_grads, *arguments)
        for number, (cut, grad) in enumerate(zip(cuts, dterms, strict=True)):
            if self.bias_grads:
                cut.add(shared.terms[number], grad)
        return dq, dk, dv

    def _arguments(
        self, q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor
    ) -> tuple[tuple[Any, ...], list[Cut]]:
        """What the engine's operator takes for a step."""
        padding = None if self.padding is None else self.padding[:, placed(k_index, self.padding.device)]
        cuts = [Cut(term, self.heads, q_index, k_index) for term in self.terms]
        text, data = biases.flatten(biases.Bias(tuple(cut.term for cut in cuts)) if cuts else None)
        seed = self.seed if self.dropout_p else None
        options = (self.scale, self.softcap, self.dropout_p, seed, 0.0, "softmax", AUTO)
        where = ((0, 0), (0, self.heads.start), True, self.backend)
        mask = (self.mask.text, list(self.mask.data), q_index, k_index, padding)
        return (q, k, v, *mask, text, data, None, *options, *where), cuts

    def closed(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """A result over all keys with the sink counted in."""
        if self.sink is None:
            return out, lse
        wider = torch.logaddexp(lse, self._own_sink(lse.dtype))
        return out * torch.exp(lse - wider)[..., None], wider

    def sink_grad(
        self, result: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor | None], shared: Shared
    ) -> None:
        """Adds this rank's share of the sink's gradient: that of its heads and queries."""
        if self.sink is None or shared.sink is None:
            return
        out, lse = result
        delta = (grads[0].double() * out).sum(-1)
        if grads[1] is not None:
            delta = delta - grads[1]
        share = torch.exp(self._own_sink(torch.float64) - lse)
        shared.sink[self.heads.start : self.heads.stop] -= (share * delta).sum((0, 2))

    def _own_sink(self, dtype: torch.dtype) -> Tensor:
        assert self.sink is not None
        return self.sink.detach()[self.heads.start : self.heads.stop].to(dtype)[:, None]

    def nothing(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros in the accumulation dtype: the gradients of what nobody sees."""
        dq, dk, dv = (torch.zeros_like(t, dtype=accumulation(t)) for t in (q, k, v))
        return dq, dk, dv

    def shared(self) -> Shared:
        """Zeros for the gradients of biases and sink."""
        kinds = [torch.promote_types(torch.float32, t.tensor.dtype) for t in self.terms]
        terms = [torch.zeros_like(t.tensor, dtype=t.total(kind)) for t, kind in zip(self.terms, kinds, strict=True)]
        return Shared(terms, None if self.sink is None else torch.zeros_like(self.sink, dtype=torch.float64))


@dataclass(eq=False)
class Shared:
    """Gradients of what every rank holds whole: a rank's share, in the order of the call."""

    terms: list[Tensor]
    sink: Tensor | None


class Cut:
    """A bias term for some heads, queries and keys of the sequence, and the way back for its gradient.

    Terms of positions keep their tensors; those that name tokens by their place in the sequence are cut to the step.
    A term by blocks becomes one by pairs, because the tokens of a step need not begin at a block.
    """

    def __init__(self, term: Term, heads: range, q_index: Tensor, k_index: Tensor) -> None:
        tensor = term.tensor.detach()
        at = 0 if term.kind in ("alibi", "relative") else 1
        self.heads = slice(heads.start, heads.stop) if tensor.shape[at] > 1 else slice(None)
        self.at = at
        own = tensor[(slice(None),) * at + (self.heads,)]
        self.rows: Tensor | None = None
        self.cols: Tensor | None = None
        device = tensor.device
        if isinstance(term, PerBlock):
            self.rows, self.cols = (
                placed(x, device) // size for x, size in zip((q_index, k_index), term.block, strict=True)
            )
        elif isinstance(term, Pair):
            self.rows = placed(q_index, device) if tensor.shape[2] > 1 else None
            self.cols = placed(k_index, device)
        elif isinstance(term, PerKey):
            self.cols = placed(k_index, device)
        if self.rows is not None:
            own = own.index_select(2, self.rows)
        if self.cols is not None:
            own = own.index_select(-1, self.cols)
        kind: type[Term] = Pair if isinstance(term, PerBlock) else type(term)
        self.term = kind(own)  # type: ignore[call-arg]

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Adds the gradient of the step's term to that of the whole."""
        own = total[(slice(None),) * self.at + (self.heads,)]
        grad = grad.to(total.dtype)
        if self.cols is None:
            own += grad
            return
        if self.rows is not None:
            wide = grad.new_zeros(*grad.shape[:-1], own.shape[-1]).index_add_(-1, self.cols, grad)
            own.index_add_(2, self.rows, wide)
        else:
            own.index_add_(own.dim() - 1, self.cols, grad)


class Partial:
    """A result that grows by what other keys add to it: the rule of ``engine.merge``, in place.

    Statistics are summed in float64, so that the error of many parts is that of one.
    """

    def __init__(self) -> None:
        self.parts: tuple[Tensor, Tensor] | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Merges the result over more keys, in the accumulation dtype; ``out`` may be written."""
        if self.parts is None:
            self.parts = out, lse.double()
            return
        total, before = self.parts
        both = torch.logaddexp(before, lse)
        share = torch.exp(lse - both.masked_fill(both == -torch.inf, 0.0))
        self.parts = total.lerp_(out, share.to(total.dtype)[..., None]), both

    def whole(self) -> tuple[Tensor, Tensor]:
        """What was merged."""
        assert self.parts is not None
        out, lse = self.parts
        return out, lse.to(out.dtype)


def placed(index: Tensor, device: torch.device) -> Tensor:
    """Indices on a device; kept there for as long as they live here."""
    if index.device == device:
        return index
    known = _places.setdefault(index, {})
    if device not in known:
        known[device] = index.to(device)
    return known[device]


_places: Any = WeakTensorKeyDictionary()


def accumulation(t: Tensor) -> torch.dtype:
    """The dtype of statistics and partial results."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other, as one message."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unpacked(flat: Tensor, *shapes: Sequence[int]) -> tuple[Tensor, ...]:
    """The tensors of a message, as views."""
    pieces = flat.split([torch.Size(s).numel() for s in shapes])
    return tuple(piece.view(*shape) for piece, shape in zip(pieces, shapes, strict=True))


def refuse(backend: str, q: Tensor, v: Tensor, terms: Sequence[Term]) -> tuple[str, list[str]]:
    """The engine's backend that computes the steps of a call, and why there is none.

    Args:
        backend: What the caller asked for.
        q, v: Queries and values.
        terms: Biases.

    Returns:
        A name, and reasons, empty where the name can run.
    """
    reasons = launch.refuse(q.device.type) + launch.refuse_call(q, v, terms)
    if backend == "auto":
        return ("triton" if q.device.type == "cuda" and not reasons else "blocked"), []
    if backend == "triton":
        return backend, reasons
    if backend == "blocked":
        return backend, []
    return backend, [f"backend {backend!r}: inside a parallel context expected 'auto', 'blocked' or 'triton'"]


def _plain(device: torch.device) -> torch.autocast:
    """Without autocast: tensors have their dtype already."""
    return torch.autocast(device.type, enabled=False)
