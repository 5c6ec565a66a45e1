"""The best tokens of each row of scores, as ids in ascending order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def top_tokens(scores: Tensor, keep: int) -> Tensor:
    """Indices of the highest scores of each row; of equal ones, the earlier.

    On a CPU the threshold of a row is found by numpy's partition, which is several times faster than sorting what is
    kept, and the ids are read off in their order.

    Args:
        scores: ``(R, n)``; ``-inf`` is never taken.
        keep: Most indices of a row.

    Returns:
        int64 ``(R, keep)``, ascending, -1 after the last.

    Example:
        >>> top_tokens(torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, -torch.inf, -torch.inf, -torch.inf]]), 2)
        tensor([[ 1,  3],
                [ 0, -1]])
    """
    rows, n = scores.shape
    if rows == 0 or n == 0:
        return torch.full((rows, keep), -1, device=scores.device)
    if not on_host(scores):
        return _by_sorting(scores, keep)
    if n <= keep:
        return _listed(scores > -torch.inf, keep)
    border = np.partition(scores.numpy(), n - keep, axis=-1)[:, n - keep]
    least = torch.from_numpy(np.maximum(border, np.finfo(border.dtype).min))[:, None]
    taken = scores >= least
    flat = np.flatnonzero(taken.numpy())
    if len(flat) == rows * keep and border.min() > -np.inf:  # no row has fewer, so none has more
        ids = flat.reshape(rows, keep)
        ids -= np.arange(rows)[:, None] * n
        return torch.from_numpy(ids)
    tied = (taken.sum(-1) > keep).nonzero()[:, 0]
    taken[tied] = _earlier_of_equals(scores[tied], least[tied], keep)
    return _listed(taken, keep)


def on_host(x: Tensor) -> bool:
    """Whether numpy can read a tensor, and looking at its values waits for nobody."""
    return x.device.type == "cpu"


def _earlier_of_equals(scores: Tensor, least: Tensor, keep: int) -> Tensor:
    """Everything above the border, and as many at the border as there is room for, the first ones."""
    above, equal = scores > least, scores == least
    room = keep - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def _listed(taken: Tensor, keep: int) -> Tensor:
    """The columns that are true in each row, at most ``keep`` of them."""
    rows, n = taken.shape
    flat, count = torch.from_numpy(np.flatnonzero(taken.numpy())), taken.sum(-1)
    ids = torch.full((rows, keep), -1)
    row = torch.arange(rows).repeat_interleave(count)
    slot = torch.arange(len(flat)) - (count.cumsum(0) - count)[row]
    ids[row, slot] = flat - row * n
    return ids


def _by_sorting(scores: Tensor, keep: int) -> Tensor:
    """The same without looking at any value from the host."""
    n = scores.shape[1]
    kept = min(keep, n)
    best = scores.sort(dim=-1, descending=True, stable=True)
    ids = best.indices[:, :kept].masked_fill(best.values[:, :kept] == -torch.inf, n).sort(-1).values
    ids = ids.masked_fill(ids == n, -1)
    return torch.nn.functional.pad(ids, (0, keep - kept), value=-1)
