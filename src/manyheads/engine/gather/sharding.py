"""Sharded tensors: every rank gathers for its batch entries and heads, from what its queries may list."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import sharding as shared
from ..sharding import HEADS, Operand, plan_of
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
    shared.register({"gather": _forward, "gather_backward": _backward})


def _forward(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``gather`` on DTensors: results are put together as q is."""
    with recording(), torch.no_grad():  # collectives are autograd functions; nothing of them is recorded
        operands, local = _parts(func, args, kwargs)
        return tuple(operands["q"].joined(t) for t in func(*local))


def _backward(cls: type, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """``gather_backward`` on DTensors: every gradient is placed as its input is."""
    with recording(), torch.no_grad():  # collectives are autograd functions; nothing of them is recorded
        operands, local = _parts(func, args, kwargs)
        names = [name for name in ("q", "k", "v", "sink") if name in operands]
        return [operands[name].gradient(t) for name, t in zip(names, func(*local), strict=True)]


_RESULTS = ("dout", "dlse", "out", "lse")


def _parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Operand], list[Any]]:
    """The tensors of a call, and what this rank's call of the same operator gets instead of each argument."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    plan = plan_of(given["q"], given["k"], given["v"])
    found: dict[str, Operand] = {}
    for name in ("q", "k", "v", "ids", "sink", *_RESULTS):
        if (t := given.get(name)) is not None:
            dims = (None, 0) if name == "sink" else (0, 1)
            found[name] = Operand(name, t, plan, dims, strict=name not in _RESULTS, broadcasts=name == "ids")
    if given["ids"].shape[1] == given["k"].shape[1]:
        found["ids"].wanted[HEADS] = plan.kv
    return found, [found[name].local() if name in found else given[name] for name in names]
