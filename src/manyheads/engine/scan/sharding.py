"""Sharded tensors: every rank runs the recurrences of its batch entries and heads, which know nothing of each other."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import sharding as shared
from ..sharding import Operand, entries
from ..sharding import plan_of as plan_of
from ..sharding import replicated as replicated
from ..tiled.reference import recording


def seen(*tensors: object) -> bool:
    """Whether a tensor is a DTensor; the first one has the operators' rules registered.

    Example:
        >>> seen(torch.ones(2), None)
        False
    """
    if not shared.seen(*tensors):
        return False
    _register()
    return True


@functools.cache
def _register() -> None:
    shared.register({"scan": _forward, "scan_backward": _backward})


def _forward(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``scan`` on DTensors: results are put together as q is; what is kept for the backward stays with its rank."""
    with recording(), torch.no_grad():  # collectives are autograd functions; nothing of them is recorded
        call = _Call(func, args, kwargs)
        out, state, m, *kept = func(*call.local)
        q = call.operands["q"]
        return q.joined(out), q.joined(state), q.joined(m) if m.numel() else m, *kept


def _backward(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """``scan_backward`` on DTensors: every gradient is placed as its input is."""
    with recording(), torch.no_grad():  # collectives are autograd functions; nothing of them is recorded
        call = _Call(func, args, kwargs)
        found = func(*call.local)
        wants = call.given["wants"]
        return [
            call.operands[name].gradient(grad) if want else grad
            for name, grad, want in zip(_TENSORS, found, wants, strict=True)
        ]


_TENSORS = ("q", "k", "v", "decay", "beta", "gate", "state")
_RESULTS = ("dout", "dstate", "out")


class _Call:
    """The arguments of one call, and what this rank's call of the same operator gets instead of each."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [argument.name for argument in func._schema.arguments]
        given = self.given = dict(zip(names, args, strict=False)) | kwargs
        plan = plan_of(given["q"], given["k"], given["v"])
        self.operands: dict[str, Operand] = {}
        for name in (*_TENSORS, "m", *_RESULTS):
            if (t := given.get(name)) is not None:
                dims = (None, 0) if name == "decay" and t.dim() == 1 else (0, 1)
                self.operands[name] = Operand(name, t, plan, dims, strict=name not in _RESULTS)
        local = given | {name: operand.local() for name, operand in self.operands.items()}
        lens = given["lens"]
        if lens is not None and lens.dim() > 1 and lens.shape[0] > 1:
            local["lens"] = entries(lens, plan)
        self.local = [local[name] for name in names]
