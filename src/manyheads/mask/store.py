"""The data of masks: small host tensors, copied once, shared when equal, never written again."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

INLINE_LIMIT = 256
_by_digest: weakref.WeakValueDictionary[bytes, Datum] = weakref.WeakValueDictionary()
_by_tensor: weakref.WeakValueDictionary[int, Datum] = weakref.WeakValueDictionary()


class Datum:
    """One tensor of mask data with the digest that stands for it in comparisons.

    Attributes:
        tensor: CPU tensor, int64 or uint8.
        array: The same memory as a read-only numpy array.
        digest: 16 bytes over dtype, shape and content.
    """

    __slots__ = ("__weakref__", "array", "digest", "tensor", "version")

    def __init__(self, array: np.ndarray, digest: bytes) -> None:
        """Takes over ``array``; nobody else may hold it."""
        with torch.inference_mode(False):  # data made there would have no version to check
            self.tensor = torch.from_numpy(array)
        self.version = self.tensor._version
        array.flags.writeable = False
        self.array = array
        self.digest = digest

    @property
    def short(self) -> str:
        """Eight hexadecimal digits of the digest, for names."""
        return self.digest[:4].hex()

    def literal(self) -> str:
        """The content as text that parses: ``5`` or ``[3, 4]``."""
        return repr(self.array.tolist())


def digest_of(array: np.ndarray) -> bytes:
    """Digest over dtype, shape and content of an array."""
    found = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.digest()


def intern(array: np.ndarray) -> Datum:
    """Returns the shared `Datum` with this content, copying the array only when it is new."""
    digest = digest_of(array)
    held = _by_digest.get(digest)
    if held is None:
        held = Datum(np.array(array, order="C", copy=True), digest)
        _by_digest[digest] = held
        _by_tensor[id(held.tensor)] = held
    return held


def known(tensor: Any) -> Datum | None:
    """The `Datum` that owns this very tensor object, if one does and nobody wrote to it."""
    held = _by_tensor.get(id(tensor))
    if held is not None and held.tensor is tensor and tensor._version == held.version:
        return held
    return None


def integers(values: Any, argument: str, *, ndim: tuple[int, ...] = (1, 2), low: int | None = 0) -> Datum:
    """Makes mask data of integers.

    Args:
        values: An int, a sequence of ints, an integer array or an integer tensor on any device.
        argument: The argument's name, for messages.
        ndim: The legal numbers of axes.
        low: The smallest legal value, or None.

    Returns:
        The shared `Datum` (int64).

    Raises:
        TypeError: Not integers.
        ValueError: The wrong number of axes, or a value below ``low``.
    """
    held = known(values)
    if held is not None and held.array.dtype == np.int64:
        array = held.array
    else:
        held = None
        array = to_array(values, argument)
        if array.dtype.kind not in "iu" and array.size:
            raise TypeError(f"{argument}: expected integers, got {array.dtype}")
        array = array.astype(np.int64, copy=False)
    if array.ndim not in ndim:
        wanted = " or ".join(f"{n}-D" for n in ndim)
        raise ValueError(f"{argument}: expected {wanted} integers, got shape {tuple(array.shape)}")
    if low is not None and array.size and int(array.min()) < low:
        raise ValueError(f"{argument}: expected values >= {low}, got {int(array.min())}")
    return intern(array) if held is None else held


def to_array(values: Any, argument: str) -> np.ndarray:
    """A numpy array of tensor, array or nested sequence, with the argument named in errors."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, (int, np.integer, Sequence)) and not isinstance(values, str):
        try:
            return np.asarray(values)
        except ValueError as error:
            raise ValueError(f"{argument}: expected rows of equal length ({error})") from error
    raise TypeError(f"{argument}: expected a list, an array or a tensor, got {type(values).__name__}")


def whole(value: Any, argument: str, low: int | None = None) -> int:
    """Checks one plain integer argument and returns it as ``int``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        if isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_floating_point():
            value = int(value)
        else:
            raise TypeError(f"{argument}: expected an int, got {value!r}")
    value = int(value)
    if low is not None and value < low:
        raise ValueError(f"{argument}: expected an int >= {low}, got {value}")
    return value


class Lookup:
    """A table that is indexed by numpy arrays or, on any device, by tensors."""

    __slots__ = ("array", "tensors")

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.ascontiguousarray(array)
        self.tensors: dict[torch.device, torch.Tensor] = {}

    def __getitem__(self, index: Any) -> Any:
        """The entries at an index, or a tuple of indices, of the index's kind."""
        first = index[0] if isinstance(index, tuple) else index
        return self.on(first.device)[index] if isinstance(first, torch.Tensor) else self.array[index]

    def on(self, device: torch.device) -> torch.Tensor:
        """The table as a tensor on a device, kept."""
        found = self.tensors.get(device)
        if found is None:
            found = self.tensors[device] = torch.from_numpy(self.array).to(device)
        return found
