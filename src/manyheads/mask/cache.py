"""A least-recently-used cache bounded in bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What the cache holds: anything that knows how many bytes it keeps alive, which may grow."""

    @property
    def held_bytes(self) -> int:
        """Bytes that the value keeps alive now."""


V = TypeVar("V", bound=Sized)


class ByteCache(Generic[V]):
    """Keeps the values used last, as long as they fit in ``limit`` bytes together.

    Args:
        limit: Bytes.

    Example:
        >>> class Blob:
        ...     held_bytes = 60
        >>> cache = ByteCache(100)
        >>> first, second = cache.get("a", Blob), cache.get("b", Blob)
        >>> cache.get("b", Blob) is second, len(cache)
        (True, 1)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: OrderedDict[Hashable, V] = OrderedDict()
        self._known = self._new = 0  # bytes when last counted and of values since, and how many these are
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes held now."""
        return sum(value.held_bytes for value in self._held.values())

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Returns the value of ``key``, made if it is new, and kept unless it is larger than the limit."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        value = make()
        with self._lock:
            if value.held_bytes <= self.limit:
                self._held[key] = value
                self._held.move_to_end(key)
                self._known, self._new = self._known + value.held_bytes, self._new + 1
                # counting all again for each new value would take quadratic time
                if self._known > self.limit or 8 * self._new > len(self._held):
                    self._shrink()
        return value

    def clear(self) -> None:
        """Drops everything."""
        with self._lock:
            self._held.clear()
            self._known = self._new = 0

    def _shrink(self) -> None:
        sizes = {key: value.held_bytes for key, value in self._held.items()}
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total <= self.limit:
                break
            del self._held[key]
            total -= size
        self._known, self._new = total, 0
