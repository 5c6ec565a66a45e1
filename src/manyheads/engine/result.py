"""What an attention engine returns when asked for more than its output."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Attn(NamedTuple):
    """A weighted average and the logarithm of its normaliser.

    Attributes:
        out: ``(B, H, Nq, Dv)``, in the dtype of the values.
        lse: ``(B, H, Nq)``, natural log of the sum of weights, float32 (float64 for float64 inputs);
            ``-inf`` where a row may attend to nothing.
    """

    out: Tensor
    lse: Tensor
