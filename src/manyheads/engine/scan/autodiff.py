"""Gradients inside the operator: a part of the forward is run again with recording, then differentiated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..tiled.reference import recording
from .problem import Problem


def gradients(
    p: Problem,
    run: Callable[[Problem], Sequence[Tensor]],
    seeds: Sequence[Tensor | None],
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of a problem's tensors through what ``run`` returns.

    Args:
        p: The problem.
        run: From a problem to results, one for each seed.
        seeds: Gradients of the results; None for none.
        wants: Which of ``p.tensors`` take gradients.

    Returns:
        One gradient for each of ``p.tensors``, None where not wanted.
    """
    with recording():
        leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(p.tensors, wants, strict=True)]
        fresh = replace(p, **dict(zip(_NAMES, leaves, strict=True)))  # type: ignore[arg-type]
        pairs = [(r, s) for r, s in zip(run(fresh), seeds, strict=True) if s is not None and r.requires_grad]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        if not pairs or not wanted:
            return [torch.zeros_like(t) if t is not None and w else None for t, w in zip(p.tensors, wants, strict=True)]
        got = torch.autograd.grad([r for r, _ in pairs], wanted, [s for _, s in pairs], allow_unused=True)
    found = iter(got)
    grads: list[Tensor | None] = []
    for leaf in leaves:
        if leaf is None or not leaf.requires_grad:
            grads.append(None)
        else:
            grad = next(found)
            grads.append(torch.zeros_like(leaf, requires_grad=False) if grad is None else grad)
    return grads


_NAMES = ("q", "k", "v", "decay", "beta", "gate", "state")
