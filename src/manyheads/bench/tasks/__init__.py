"""Tasks that small models are trained on, to see what a mechanism can learn."""

from __future__ import annotations

from collections.abc import Callable

from . import listops, passkey, recall, regression, states, text
from .base import Batch, Task

__all__ = ["TASKS", "Batch", "Task"]

TASKS: dict[str, Callable[..., Task]] = {
    "recall": recall.task,
    "passkey": passkey.task,
    "states": states.task,
    "regression": regression.task,
    "bytes": text.task,
    "listops": listops.task,
}
"""How each task is made; all sizes have defaults."""
