"""Autocast for the operators of all engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def casting(device: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """What an operator does under autocast: queries, keys and values in its dtype, everything else as it came.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        op: The operator; its first three arguments are cast, unless they are float64.

    Returns:
        The kernel to register for the device's autocast.
    """
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def cast(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            if q.dtype != torch.float64:
                q, k, v = (t.to(dtype) for t in (q, k, v))
            return op(q, k, v, *args)

    return cast
