"""What may be added to scores: biases as values that sum, each with its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """A rectangle of the score matrix, in storage order and in logical positions.

    Attributes:
        b, h: Slices of the batch and of the query heads.
        rows: Slice of the queries.
        cols: int64 ``(C,)`` indices of the keys.
        q_pos, k_pos: int64 logical positions ``(b|1, M)`` and ``(b|1, C)``.
    """

    b: slice
    h: slice
    rows: slice
    cols: Tensor
    q_pos: Tensor
    k_pos: Tensor


class Term:
    """One additive contribution to the scores; its tensor may need gradients.

    Terms add up: ``ALiBi(slopes) + PerKey(importance)`` is a :class:`Bias`.
    """

    kind: ClassVar[str]
    reduces: ClassVar[bool] = False  # many pairs share one entry, so its gradient is summed in float64
    tensor: Tensor

    def __add__(self, other: Term | Bias) -> Bias:
        return Bias((self,)) + other

    def check(self, heads: int, batch: int, nq: int, nk: int) -> None:
        """Raises ValueError when the tensor does not fit the call."""
        raise NotImplementedError

    def values(self, at: Block) -> Tensor:
        """The contribution on a rectangle, broadcastable to ``(b, h, M, C)``."""
        raise NotImplementedError

    def add(self, s: Tensor, at: Block) -> None:
        """Adds the contribution to scores ``(b, h, M, C)``, in place."""
        s += self.values(at).to(s.dtype)

    def accumulate(self, grad: Tensor, ds: Tensor, at: Block) -> None:
        """Adds the gradient of the tensor from ``ds (b, h, M, C)`` on a rectangle into ``grad``."""
        raise NotImplementedError

    def total(self, accumulate: torch.dtype) -> torch.dtype:
        """The dtype in which the gradient is summed."""
        return torch.float64 if self.reduces else accumulate

    def text(self) -> str:
        """Names the kind and its static parameters, so that a term can pass through an operator."""
        return self.kind

    def _expect(self, shape: Sequence[int | tuple[int, ...]], symbolic: str) -> None:
        got = tuple(self.tensor.shape)
        sizes = [(s,) if isinstance(s, int) else s for s in shape]
        if len(got) != len(sizes) or any(g not in s for g, s in zip(got, sizes, strict=True)):
            want = "(" + ", ".join("|".join(map(str, s)) for s in sizes) + ")"
            raise ValueError(f"bias {type(self).__name__}: expected a tensor of shape {symbolic} = {want}, got {got}")
        if not self.tensor.is_floating_point():
            raise TypeError(f"bias {type(self).__name__}: expected a floating tensor, got {self.tensor.dtype}")


@dataclass(frozen=True, slots=True, eq=False)
class Bias:
    """A sum of terms."""

    terms: tuple[Term, ...] = ()

    def __add__(self, other: Term | Bias) -> Bias:
        more = other.terms if isinstance(other, Bias) else (other,)
        return Bias(self.terms + more)

    __radd__ = __add__


def _fold(ds: Tensor, shape: Sequence[int]) -> Tensor:
    """Sums the broadcast dimensions of a gradient away."""
    dims = [i for i, (a, b) in enumerate(zip(ds.shape, shape, strict=True)) if b == 1 and a != 1]
    return ds.sum(dims, keepdim=True) if dims else ds


def _part(size: int, part: slice) -> slice:
    """A slice of a dimension that may be broadcast."""
    return slice(0, 1) if size == 1 else part


@dataclass(frozen=True, slots=True, eq=False)
class ALiBi(Term):
    """Linear penalty on distance: ``-slope_h * |i - j|`` in logical positions.

    Args:
        tensor: Slopes ``(H,)``.

    Source: Press et al., "Train Short, Test Long" (2022), section 3; absolute distance makes it usable without
    a causal mask.
    """

    tensor: Tensor
    kind: ClassVar[str] = "alibi"
    reduces: ClassVar[bool] = True

    def check(self, heads: int, batch: int, nq: int, nk: int) -> None:
        self._expect([heads], "(H,)")

    def _distance(self, at: Block, dtype: torch.dtype) -> Tensor:
        here = at.q_pos.flatten()[:1]  # counted from a position close by, so that float32 holds large ones
        q_pos, k_pos = ((pos - here).to(dtype) for pos in (at.q_pos, at.k_pos))
        return (q_pos[:, :, None] - k_pos[:, None, :]).abs_()[:, None]

    def _slopes(self, at: Block) -> Tensor:
        return self.tensor.to(torch.promote_types(self.tensor.dtype, torch.float32))[at.h, None, None]

    def values(self, at: Block) -> Tensor:
        slopes = self._slopes(at)
        return -slopes * self._distance(at, slopes.dtype)

    def add(self, s: Tensor, at: Block) -> None:
        torch.addcmul(s, self._slopes(at).to(s.dtype), self._distance(at, s.dtype), value=-1, out=s)

    def accumulate(self, grad: Tensor, ds: Tensor, at: Block) -> None:
        grad[at.h] -= (ds * self._distance(at, ds.dtype)).sum((0, 2, 3)).to(grad.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Relative(Term):
    """A learned value per head and relative position: ``table[h, clip(j - i) + R - 1]``.

    Args:
        tensor: Table ``(H|1, 2R - 1)``; distances beyond ``R - 1`` use the last entry on their side.

    Source: Shaw et al. (2018) and Raffel et al. (2020), without bucketing.
    """

    tensor: Tensor
    kind: ClassVar[str] = "relative"
    reduces: ClassVar[bool] = True

    def check(self, heads: int, batch: int, nq: int, nk: int) -> None:
        width = self.tensor.shape[-1] if self.tensor.dim() == 2 else 1
        self._expect([(1, heads), width], "(H|1, 2R-1)")
        if width % 2 == 0:
            raise ValueError(f"bias Relative: the table needs an odd width 2R-1, got {width}")

    def _index(self, at: Block) -> Tensor:
        reach = self.tensor.shape[1] // 2
        return (at.k_pos[:, None, :] - at.q_pos[:, :, None]).clamp_(-reach, reach).add_(reach)

    def values(self, at: Block) -> Tensor:
        table = self.tensor[_part(self.tensor.shape[0], at.h)]
        return table[:, self._index(at)].transpose(0, 1)

    def accumulate(self, grad: Tensor, ds: Tensor, at: Block) -> None:
        index = self._index(at)
        target = grad[_part(grad.shape[0], at.h)]
        folded = ds.sum(1, keepdim=True) if target.shape[0] == 1 else ds
        if index.shape[0] == 1:
            folded = folded.sum(0, keepdim=True)
        flat = folded.transpose(0, 1).reshape(target.shape[0], -1)
        target.index_add_(1, index.reshape(-1), flat.to(grad.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class Pair(Term):
    """A value for every pair: ``tensor[b, h, i, j]`` by storage order.

    Args:
        tensor: ``(B|1, H|1, Nq|1, Nk)``.
    """

    tensor: Tensor
    kind: ClassVar[str] = "pair"

    def check(self, heads: int, batch: int, nq: int, nk: int) -> None:
        self._expect([(1, batch), (1, heads), (1, nq), nk], "(B|1, H|1, Nq|1, Nk)")

    def _view(self, t: Tensor, at: Block) -> Tensor:
        return t[_part(t.shape[0], at.b), _part(t.shape[1], at.h), _part(t.shape[2], at.rows)]

    def values(self, at: Block) -> Tensor:
        return self._view(self.tensor, at)[..., at.cols]

    def accumulate(self, grad: Tensor, ds: Tensor, at: Block) -> None:
        target = self._view(grad, at)
        target.index_add_(3, at.cols, _fold(ds, [*target.shape[:3], ds.shape[3]]).to(grad.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class PerKey(Term):
    """A value for every key: ``tensor[b, h, j]`` by storage order.

    Args:
        tensor: ``(B|1, H|1, Nk)``.
    """

    tensor: Tensor
    kind: ClassVar[str] = "per_key"

    def check(self, heads: int, batch: int, nq: int, nk: int) -> None:
        self._expect([(1, batch), (1, heads), nk], "(B|1, H|1, Nk)")

    def _view(self, t: Tensor, at: Block) -> Tensor:
        return t[_part(t.shape[0], at.b), _part(t.shape[1], at.h)]

    def values(self, at: Block) -> Tensor:
        return self._view(self.tensor, at)[:, :, None, at.cols]

    def accumulate(self, grad: Tensor, ds: Tensor, at: Block) -> None:
        target = self._view(grad, at)
        folded = _fold(ds.sum(2), [*target.shape[:2], ds.shape[3]])
        target.index_add_(2, at.cols, folded.to(grad.dtype))


@dataclass(frozen=True, slots=True, eq=False)
class PerBlock(Term):
    """A value for every block of pairs: ``tensor[b, h, i // bq, j // bk]`` by storage order.

    Args:
        tensor: ``(B|1, H|1, ceil(Nq / bq), ceil(Nk / bk))``.
        block: ``(bq, bk)`` in tokens.
    """

    tensor: Tensor
    block: tuple[int, int] = (64, 64)
    kind: ClassVar[str] = "per_block"

    def check(self, heads: int, batch: int, nq: int, nk: int) -> None:
        bq, bk = self.block
        if bq < 1 or bk < 1:
            raise ValueError(f"bias PerBlock: block must be positive, got {self.block}")
        shape: list[int | tuple[int, ...]] = [(1, batch), (1, heads), -(-nq // bq), -(-nk // bk)]
        self._expect(shape, "(B|1, H|1, ceil(Nq/bq), ceil(Nk/bk))")

    def text(self) -> str:
        return f"{self.kind}:{self.block[0]}:{self.block[1]}"

    def _rows(self, at: Block) -> Tensor:
        return torch.arange(at.rows.start, at.rows.stop, device=at.cols.device) // self.block[0]

    def _view(self, t: Tensor, at: Block) -> Tensor:
        return t[_part(t.shape[0], at.b), _part(t.shape[1], at.h)]

    def values(self, at: Block) -> Tensor:
        return self._view(self.tensor, at)[:, :, self._rows(at)][..., at.cols // self.block[1]]

    def accumulate(self, grad: Tensor, ds: Tensor, at: Block) -> None:
        target = self._view(grad, at)
        folded = _fold(ds, [*target.shape[:2], *ds.shape[2:]]).to(grad.dtype)
        by_row = folded.new_zeros(*target.shape[:3], ds.shape[3]).index_add_(2, self._rows(at), folded)
        target.index_add_(3, at.cols // self.block[1], by_row)


_KINDS: dict[str, Callable[..., Term]] = {c.kind: c for c in (ALiBi, Relative, Pair, PerKey, PerBlock)}


def flatten(bias: object) -> tuple[str, list[Tensor]]:
    """A bias as text and tensors, the form in which it crosses an operator.

    Args:
        bias: What the caller passed.

    Returns:
        Text such as ``"alibi;per_block:64:64"`` and one tensor for each term.

    Raises:
        TypeError: When ``bias`` is neither a term nor a sum of terms.
    """
    if bias is None:
        return "", []
    if isinstance(bias, Tensor):
        raise TypeError(
            "bias: expected ALiBi, Relative, Pair, PerKey, PerBlock or their sum, got a tensor; "
            "wrap a (B|1, H|1, Nq|1, Nk) tensor as Pair(tensor)"
        )
    if not isinstance(bias, Bias | Term):
        raise TypeError(
            f"bias: expected ALiBi, Relative, Pair, PerKey, PerBlock or their sum, got {type(bias).__name__}"
        )
    terms = bias.terms if isinstance(bias, Bias) else (bias,)
    return ";".join(t.text() for t in terms), [t.tensor for t in terms]


def unflatten(text: str, data: Sequence[Tensor]) -> tuple[Term, ...]:
    """The terms that :func:`flatten` wrote."""
    if not text:
        return ()
    terms = []
    for part, tensor in zip(text.split(";"), data, strict=True):
        kind, *sizes = part.split(":")
        terms.append(_KINDS[kind](tensor, tuple(map(int, sizes))) if sizes else _KINDS[kind](tensor))
    return tuple(terms)
