"""Combinations of masks: and, or, not, one mask per head, one mask per batch entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .base import Box, Coords, Mask, _set
from .store import Datum


def both(*masks: Mask) -> Mask:
    """Allowed by every mask: ``a & b & ...``, flattened, without repetitions and without ``full``."""
    parts = _flat(And, masks)
    if len(parts) > 1:
        parts = tuple([part for part in parts if part.text != "full"]) or parts[:1]
    return parts[0] if len(parts) == 1 else And(*parts)


def either(*masks: Mask) -> Mask:
    """Allowed by any mask: ``a | b | ...``, flattened and without repetitions."""
    parts = _flat(Or, masks)
    return parts[0] if len(parts) == 1 else Or(*parts)


def negated(mask: Mask) -> Mask:
    """Allowed where ``mask`` is not; twice gives the mask back."""
    return mask.inner if isinstance(mask, Not) else Not(mask)


def _flat(kind: type[_Several], masks: Iterable[Mask]) -> tuple[Mask, ...]:
    parts: dict[Mask, None] = {}
    for mask in masks:
        for part in mask.parts if isinstance(mask, kind) else (mask,):
            parts[part] = None
    return tuple(parts)


def merged_data(masks: Iterable[Mask]) -> tuple[Datum, ...]:
    """The data of several masks in order, equal data once."""
    found: dict[bytes, Datum] = {}
    for mask in masks:
        for datum in mask._data:
            found.setdefault(datum.digest, datum)
    return tuple(found.values())


def joint_shape(masks: Iterable[Mask], what: str) -> tuple[int, int]:
    """The common ``(B|1, H|1)`` of several masks.

    Raises:
        ValueError: Two masks have different batch sizes or numbers of heads.
    """
    sizes = [1, 1]
    for mask in masks:
        for axis, size in enumerate(mask.shape):
            if size != 1 and sizes[axis] not in (1, size):
                name = ("batch entries", "heads")[axis]
                raise ValueError(f"{what}: one mask is for {sizes[axis]} {name}, another for {size}")
            sizes[axis] = max(sizes[axis], size)
    return sizes[0], sizes[1]


class _Several(Mask):
    """Masks joined by one operator."""

    __slots__ = ("parts",)
    parts: tuple[Mask, ...]
    _sign: str

    def __init__(self, *parts: Mask) -> None:
        _set(self, "parts", parts)
        shape = (1, 1)
        data: tuple[Datum, ...] = ()
        for part in parts:
            if part.shape != (1, 1):
                shape = joint_shape(parts, self._sign)
            if part._data:
                data = merged_data(parts)
        text = None if data else self._sign.join([self._braced(part, part.text) for part in parts])
        self._finish(shape, data, text)

    def _braced(self, part: Mask, text: str) -> str:
        return text

    def _children(self) -> tuple[Mask, ...]:
        return self.parts

    def _write(self, name: Callable[[Datum], str]) -> str:
        return self._sign.join([self._braced(part, part._write(name)) for part in self.parts])


class And(_Several):
    """Allowed by every part; built by ``&``."""

    __slots__ = ()
    _sign = " & "

    def _braced(self, part: Mask, text: str) -> str:
        return f"({text})" if isinstance(part, Or) else text

    def _allows(self, q: Coords, k: Coords) -> Any:
        result = self.parts[0]._allows(q, k)
        for part in self.parts[1:]:
            result = result & part._allows(q, k)
        return result

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        may, must = self.parts[0]._classify(q, k)
        for part in self.parts[1:]:
            other = part._classify(q, k)
            may, must = may & other[0], must & other[1]
        return may, must

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        return both(*[part._narrow(axis, i, j) for part in self.parts])


class Or(_Several):
    """Allowed by any part; built by ``|``."""

    __slots__ = ()
    _sign = " | "

    def _allows(self, q: Coords, k: Coords) -> Any:
        result = self.parts[0]._allows(q, k)
        for part in self.parts[1:]:
            result = result | part._allows(q, k)
        return result

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        may, must = self.parts[0]._classify(q, k)
        for part in self.parts[1:]:
            other = part._classify(q, k)
            may, must = may | other[0], must | other[1]
        return may, must

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        return either(*[part._narrow(axis, i, j) for part in self.parts])


class Not(Mask):
    """Allowed where the inner mask is not; built by ``~``."""

    __slots__ = ("inner",)
    inner: Mask

    def __init__(self, inner: Mask) -> None:
        _set(self, "inner", inner)
        self._finish(inner.shape, inner._data)

    def _children(self) -> tuple[Mask, ...]:
        return (self.inner,)

    def _write(self, name: Callable[[Datum], str]) -> str:
        text = self.inner._write(name)
        return f"~({text})" if isinstance(self.inner, _Several) else f"~{text}"

    def _allows(self, q: Coords, k: Coords) -> Any:
        return ~self.inner._allows(q, k)

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        may, must = self.inner._classify(q, k)
        return ~must, ~may

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        return negated(self.inner._narrow(axis, i, j))


class _Each(Mask):
    """One mask per index along one axis of the shape."""

    __slots__ = ("parts",)
    parts: tuple[Mask, ...]
    _axis: int
    _name: str

    def __new__(cls, parts: Iterable[Mask]) -> Any:
        """One part stands for itself."""
        parts = tuple(parts)
        if not parts:
            raise ValueError(f"{cls._name}: expected at least one mask")
        for part in parts:
            if not isinstance(part, Mask):
                raise TypeError(f"{cls._name}: expected masks, got {type(part).__name__}")
            if part.shape[cls._axis] != 1:
                raise ValueError(f"{cls._name}: a part already has shape (batch, heads) = {part.shape}")
        if len(parts) == 1:
            return parts[0]
        self = super().__new__(cls)
        _set(self, "parts", parts)
        shape = list(joint_shape(parts, cls._name))
        shape[cls._axis] = len(parts)
        self._finish((shape[0], shape[1]), merged_data(parts))
        return self

    def __init__(self, parts: Iterable[Mask]) -> None:
        """Everything happens in ``__new__``."""

    def _children(self) -> tuple[Mask, ...]:
        return self.parts

    def _write(self, name: Callable[[Datum], str]) -> str:
        return f"{self._name}({', '.join([part._write(name) for part in self.parts])})"

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        parts = self.parts[i:j] if axis == self._axis else [part._narrow(axis, i, j) for part in self.parts]
        return type(self)(parts)


class PerHead(_Each):
    """One mask per query head.

    Args:
        parts: The masks, one per query head; each may still differ between batch entries.

    Raises:
        TypeError: A part is not a mask.
        ValueError: No parts, or a part that already differs between heads.

    Example:
        >>> from manyheads.mask import Causal, PerHead, Window
        >>> m = Causal() & PerHead([Window(2), Window(4)])
        >>> m.shape, m.at(0, 1)
        ((1, 2), causal & window(4))
    """

    __slots__ = ()
    _axis = 1
    _name = "per_head"


class PerBatch(_Each):
    """One mask per batch entry.

    Args:
        parts: The masks, one per batch entry; each may still differ between heads.

    Raises:
        TypeError: A part is not a mask.
        ValueError: No parts, or a part that already differs between batch entries.

    Example:
        >>> from manyheads.mask import Document, PerBatch
        >>> PerBatch([Document([3, 2]), Document([5])]).dense(5).shape
        torch.Size([2, 1, 5, 5])
    """

    __slots__ = ()
    _axis = 0
    _name = "per_batch"
