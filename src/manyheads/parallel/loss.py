"""Labels and losses of sequences whose tokens lie on many ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from .context import current

IGNORE = -100
"""The label of a token that does not count, as in torch."""


def next_tokens(ids: Tensor, *, lengths: Sequence[int] | Tensor | None = None, ignore: int = IGNORE) -> Tensor:
    """The label of every token, its successor: to be made before sharding, because successors may be elsewhere after.

    Args:
        ids: Integer ``(..., N)``, the whole sequence.
        lengths: Lengths of packed documents, which sum to N; the last token of each has no successor.
        ignore: The label of tokens without a successor.

    Returns:
        int64 ``(..., N)``.

    Raises:
        ValueError: Lengths that do not sum to N.

    Example:
        >>> next_tokens(torch.tensor([5, 6, 7, 8]), lengths=[1, 3]).tolist()
        [-100, 7, 8, -100]
    """
    n = ids.shape[-1]
    labels = ids.new_full(ids.shape, ignore, dtype=torch.int64)
    labels[..., :-1] = ids[..., 1:]
    if lengths is not None:
        ends = torch.as_tensor(lengths, device=ids.device).cumsum(0)
        if len(ends) and int(ends[-1]) != n:
            raise ValueError(f"lengths: expected a sum of {n} tokens, got {int(ends[-1])}")
        labels[..., ends[ends > 0] - 1] = ignore
    return labels


def token_loss(
    logits: Tensor, labels: Tensor, *, ignore: int = IGNORE, groups: Sequence[object] = (), averaged: int = 1
) -> Tensor:
    """Cross entropy of this rank's tokens over the number of tokens of all ranks.

    The sum over ranks is the mean loss of the whole sequence, however many labels each rank happens to hold.

    Args:
        logits: ``(..., n, V)``.
        labels: int64 ``(..., n)``, made by :func:`next_tokens` and sharded.
        ignore: Label of tokens that do not count.
        groups: More process groups over whose ranks labels are counted, such as that of data parallelism.
        averaged: Over how many ranks gradients will be averaged rather than summed: FSDP2 and DDP divide by the
            ranks of their mesh, which this undoes.

    Returns:
        Scalar, differentiable, float32 (float64 for float64).

    Raises:
        ValueError: Outside a context.
    """
    link = current("token_loss").link
    count = link.total((labels != ignore).sum().to(torch.float64))
    for group in groups:
        dist.all_reduce(count, group=group)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=ignore, reduction="sum")
    return total * (averaged / count.clamp(min=1.0)).to(total.dtype)
