"""A mask given as a Python function of positions, for rules that no other mask can say."""

from __future__ import annotations

import secrets
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .base import Box, Coords, Leaf, Mask, _set
from .store import Datum, whole

_RECENT = 256
_alive: weakref.WeakValueDictionary[str, _Held] = weakref.WeakValueDictionary()
_by_function: weakref.WeakValueDictionary[Any, _Held] = weakref.WeakValueDictionary()
_recent: OrderedDict[str, _Held] = OrderedDict()


class _Held:
    """A function under its token."""

    __slots__ = ("__weakref__", "fn", "token")

    def __init__(self, token: str, fn: Callable[..., Any]) -> None:
        self.token, self.fn = token, fn


def _hold(fn: Callable[..., Any], token: str | None = None) -> _Held:
    """The entry of a function: the existing one for an equal function, otherwise a new one."""
    key: Any = fn
    try:
        hash(fn)
    except TypeError:
        key = id(fn)
    held = _by_function.get(key) if token is None else _alive.get(token)
    if held is not None:
        return held
    if token is None:
        name = "".join(c if c.isalnum() else "_" for c in getattr(fn, "__name__", type(fn).__name__)).strip("_")
        token = f"$fn:{name or 'function'}_{secrets.token_hex(4)}"
    held = _Held(token, fn)
    _alive[token] = held
    _by_function.setdefault(key, held)
    _recent[token] = held
    if len(_recent) > _RECENT:
        _recent.popitem(last=False)
    return held


def adopt(token: str, fn: Callable[..., Any]) -> None:
    """Registers an unpickled function under the token that its text names."""
    _hold(fn, token)


class Predicate(Leaf):
    """A rule in Python.

    Args:
        fn: ``fn(q_pos, k_pos) -> bool tensor`` on int64 CPU tensors of logical positions that broadcast; it
            must be elementwise and pure. With ``shape``, ``fn(b, h, q_pos, k_pos)``.
        shape: ``(B|1, H|1)`` when the rule differs between batch entries or heads.
        start: The first batch entry and head, when this is a part of a larger mask.

    Raises:
        TypeError: ``fn`` cannot be called.
        ValueError: A shape below 1, or (on use) a result that is not a boolean tensor of the broadcast shape.

    Conventions:
        Nothing is known about the rule, so every tile is evaluated: it costs its area. Two predicates are
        equal when their functions are the same object. The text names the function in a registry of this
        process; pickling takes the function along.

    Example:
        >>> from manyheads.mask import Predicate
        >>> Predicate(lambda q, k: (q + k) % 2 == 0).dense(3)[0, 0].int().tolist()
        [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    """

    __slots__ = ("_held", "start")
    keyed = False
    relative = False
    start: tuple[int, int] | None
    _held: _Held

    def __init__(
        self,
        fn: Callable[..., Any] | str,
        shape: tuple[int, int] = (1, 1),
        start: tuple[int, int] | None = None,
    ) -> None:
        if isinstance(fn, str):
            held = _alive.get(fn)
            if held is None:
                raise ValueError(f"fn: the function {fn} is not known to this process any more")
        elif callable(fn):
            held = _hold(fn)
        else:
            raise TypeError(f"fn: expected a function, got {type(fn).__name__}")
        b, h = (whole(n, "shape", 1) for n in shape)
        if start is None and (b, h) != (1, 1):
            start = (0, 0)
        _set(self, "_held", held)
        _set(
            self,
            "start",
            None if start is None else (whole(start[0], "start", 0), whole(start[1], "start", 0)),
        )
        _set(self, "shape", (b, h))
        self._finish((b, h), ())

    @property
    def fn(self) -> Callable[..., Any]:
        """The function."""
        return self._held.fn

    @property
    def token(self) -> str:
        """The function's name in this process's registry."""
        return self._held.token

    def _write(self, name: Callable[[Datum], str]) -> str:
        shape = "" if self.shape == (1, 1) else f", shape={self.shape}"
        start = "" if self.start is None else f", start={self.start}"
        return f"predicate({self.token}{shape}{start})"

    def _slice(self, axis: int, i: int, j: int) -> Mask:
        shape, start = list(self.shape), list(self.start or (0, 0))
        shape[axis], start[axis] = j - i, start[axis] + i
        return Predicate(self.token, (shape[0], shape[1]), (start[0], start[1]))

    def _allows(self, q: Coords, k: Coords) -> Any:
        q_pos, k_pos = q["position"], k["position"]
        where = () if self.start is None else tuple(torch.tensor(n) for n in self.start)
        if isinstance(q_pos, torch.Tensor):
            return self.fn(*where, q_pos, k_pos)
        result = self.fn(*where, _tensor(q_pos), _tensor(k_pos))
        wanted = np.broadcast_shapes(q_pos.shape, k_pos.shape)
        if not isinstance(result, torch.Tensor) or result.dtype != torch.bool:
            what = result.dtype if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(f"fn: expected a boolean tensor from {self.token}, got {what}")
        try:
            return np.broadcast_to(result.numpy(), wanted)
        except ValueError:
            raise ValueError(f"fn: expected shape {wanted} from {self.token}, got {tuple(result.shape)}") from None

    def _classify(self, q: Box, k: Box) -> tuple[Any, Any]:
        return np.True_, np.False_


def _tensor(positions: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(positions, dtype=np.int64, copy=True))
