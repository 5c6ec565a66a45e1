"""One recurrence as the backends see it: tensors, borders, and how its output is normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NORMALISERS = ("", "sum", "abs", "max1")
"""How an output is divided: not at all, by ``q.n``, by ``|q.n|``, by ``max(|q.n|, 1)``."""


class State(NamedTuple):
    """What a recurrence remembers, in the accumulation dtype (float32; float64 for float64 inputs).

    With an input gate ``S`` and ``n`` are kept divided by ``exp(m)``: what is meant is ``exp(m) * S``.

    Attributes:
        S: ``(B, H, D, Dv)``, the weighted sum of ``k v^T``.
        n: ``(B, H, D)``, the weighted sum of ``k``, of a normalised recurrence; else None.
        m: ``(B, H)``, the running maximum of the log weights, with an input gate; else None. ``-inf`` where nothing
            was written. It takes no gradient: no result depends on it.
    """

    S: Tensor
    n: Tensor | None = None
    m: Tensor | None = None


@dataclass(slots=True, eq=False)
class Problem:
    """Everything that defines the result of one call of the engine.

    Attributes:
        q, k, v: ``(B, H, N, D)``, ``(B, Hkv, N, D)``, ``(B, Hkv, N, Dv)``.
        decay: Log decay ``(H,)``, ``(B, H, N)`` or ``(B, H, N, D)``, or None.
        beta: Step of the delta rule ``(B, H, N)``, or None for additive updates.
        gate: Log input gate ``(B, H, N)``, or None.
        state: ``(B, H, D, E)`` in the accumulation dtype: ``S``, and ``n`` as one more column when normalised.
        m: ``(B, H)``, the running maximum that belongs to ``state``.
        starts: bool ``(1, N)`` or ``(B, N)``, True where a document begins; or None.
        scale: Multiplies the queries.
        normalise: One of ``NORMALISERS``.
        chunk: Tokens per chunk, a power of two.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    beta: Tensor | None
    gate: Tensor | None
    state: Tensor
    m: Tensor | None
    starts: Tensor | None
    scale: float
    normalise: str
    chunk: int

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of states and sums."""
        return accumulate(self.q.dtype)

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def tensors(self) -> list[Tensor | None]:
        """What may take gradients, in the order of the operator."""
        return [self.q, self.k, self.v, self.decay, self.beta, self.gate, self.state]


def accumulate(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for inputs of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_token(p: Problem) -> Tensor | None:
    """The log decay in the accumulation dtype, every document's first token forgetting everything.

    Args:
        p: The problem.

    Returns:
        ``(H,)`` for a decay per head without borders, else ``(1|B, 1|H, N)`` or ``(B, H, N, D)``; or None.
    """
    decay = None if p.decay is None else p.decay.to(p.accumulate)
    if p.starts is None:
        return decay
    starts = p.starts[:, None]
    if decay is None:
        return p.state.new_zeros(starts.shape).masked_fill(starts, -torch.inf)
    if decay.dim() == 1:
        decay = decay[None, :, None]
    if decay.dim() == 4:
        starts = starts[..., None]
    return torch.where(starts, -torch.inf, decay)


def finite(m: Tensor) -> Tensor:
    """A running maximum to subtract: 0 where nothing was written yet."""
    return m.masked_fill(m == -torch.inf, 0.0)


def divide(total: Tensor, normalise: str, m: Tensor | None) -> Tensor:
    """Outputs from sums: the last column, when normalised, is the denominator.

    Args:
        total: ``(..., E)``, divided by ``exp(m)`` when there is a gate.
        normalise: One of ``NORMALISERS``.
        m: ``(...)`` finite maximum of the log weights, or None.

    Returns:
        ``(..., Dv)``; 0 where the denominator is 0.

    Raises:
        ValueError: For a negative sum of weights under ``"sum"``, where reading it does not wait for a device.
    """
    if not normalise:
        return total if m is None else total * m.exp()[..., None]
    out, weight = total[..., :-1], total[..., -1:]
    if normalise == "sum":
        _positive(weight)
    else:
        weight = weight.abs()
    if normalise == "max1":
        floor = torch.ones((), dtype=total.dtype, device=total.device) if m is None else (-m).exp()[..., None]
        weight = torch.maximum(weight, floor)
    nothing = weight == 0
    return (out / weight.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _positive(weight: Tensor) -> None:
    if torch.compiler.is_compiling() or weight.device.type != "cpu" or not weight.numel():
        return
    if bool((low := weight.detach().amin()) < 0):
        raise ValueError(
            f"normalise: 'sum' needs features with q.k >= 0, but a sum of weights is {float(low):.4g}; "
            "use positive features, 'abs' or 'max1'"
        )


def unpacked(total: Tensor, m: Tensor | None, normalise: str) -> State:
    """A state from the matrix that the backends carry, whose last column is ``n`` when normalised."""
    return State(total[..., :-1], total[..., -1], m) if normalise else State(total, None, m)


def with_ones(v: Tensor) -> Tensor:
    """Values with a column of ones, whose weighted sum is the denominator."""
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)


def starts_of(lens: Tensor, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Where documents after the first begin.

    Args:
        lens: Document lengths, ``(n,)`` or ``(B, n)``, integers.
        batch: Batch size.
        tokens: Number of tokens N.
        device: Where to put the result.

    Returns:
        bool ``(1, N)`` or ``(B, N)``. Empty documents at the end begin nowhere.

    Raises:
        ValueError: Negative lengths (borders out of order), or lengths that do not sum to the tokens.
    """
    rows = torch.atleast_2d(lens).to("cpu", torch.int64)
    if rows.dim() != 2 or rows.shape[0] not in (1, batch) or rows.shape[1] == 0:
        raise ValueError(f"lens: expected shape (n,) or (B={batch}, n) with n >= 1, got {tuple(lens.shape)}")
    if bool((rows < 0).any()):
        raise ValueError(f"lens: borders out of order: a document of {int(rows.min())} tokens; lengths are >= 0")
    if bool((rows.sum(1) != tokens).any()):
        raise ValueError(f"lens: documents must sum to the N={tokens} tokens, got {rows.sum(1).tolist()}")
    starts = torch.zeros(rows.shape[0], tokens + 1, dtype=torch.bool)
    starts.scatter_(1, rows.cumsum(1)[:, :-1], True)
    return starts[:, :tokens].to(device)
