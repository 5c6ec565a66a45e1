"""One call of the engine as the backends see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True, eq=False)
class Problem:
    """Everything that defines the result of one call.

    Scores are ``s = cap(scale * q k^T)`` in float32 (float64 for float64 inputs), with ``cap(x) = c * tanh(x / c)``
    when ``softcap = c > 0``; the softmax of each query runs over the keys that its ids name, and over the sink.

    Attributes:
        q, k, v: ``(B, Hq, Nq, D)``, ``(B, Hkv, Nk, D)``, ``(B, Hkv, Nk, Dv)``.
        ids: ``(B|1, 1|Hkv|Hq, Nq, K)`` integers, -1 where there is none.
        sink: ``(Hq,)`` logit of one more key whose value is zero, or None.
        scale: Multiplies the dot products.
        softcap: 0 for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    sink: Tensor | None
    scale: float
    softcap: float = 0.0

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of scores and statistics."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def units(self) -> int:
        """Sets of query heads that read the same rows: of a key head, or one head where each has ids of its own."""
        own = self.ids.shape[1] not in (1, self.k.shape[1])
        return self.q.shape[1] if own else self.k.shape[1]

    @property
    def group(self) -> int:
        """Query heads of a unit."""
        return self.q.shape[1] // max(1, self.units)


@dataclass(slots=True)
class Grads:
    """Gradients of one problem, in the order of its inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink: Tensor | None = None


def listed(ids: Tensor, keys: int) -> Tensor:
    """Which ids name a key; on a GPU, where they are not checked, ids beyond the keys do not."""
    return ids >= 0 if ids.device.type == "cpu" else (ids >= 0) & (ids < keys)


def check_range(ids: Tensor, keys: int) -> None:
    """Checks ids, where reading them does not wait for a device.

    Raises:
        ValueError: For an id that is neither -1 nor that of a key.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < -1 or high >= keys:
        raise ValueError(f"ids: expected -1 (none) or 0 to Nk - 1 = {keys - 1}, got {low} to {high}")
