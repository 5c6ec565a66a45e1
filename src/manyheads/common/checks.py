"""Argument checks that several layers share: each names the argument, what came and what is needed."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Checks queries, keys and values against ``(B, Hq, Nq, D)``, ``(B, Hkv, Nk, D)``, ``(B, Hkv, Nk, Dv)``.

    Raises:
        TypeError: For what is not a floating tensor, or for dtypes that differ.
        ValueError: For ranks, sizes or devices that do not fit.

    Example:
        >>> import torch
        >>> attention_inputs(torch.ones(1, 3, 4, 8), torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8))
        Traceback (most recent call last):
        ...
        ValueError: q: its 3 heads must be a multiple of the 2 heads of k
    """
    given: tuple[object, ...] = (q, k, v)
    for name, thing in zip("qkv", given, strict=True):
        if not isinstance(thing, Tensor):
            raise TypeError(f"{name}: expected a tensor (B, H, N, D), got {type(thing).__name__}")
    qs, ks, vs = q.shape, k.shape, v.shape
    if len(qs) != 4 or len(ks) != 4 or len(vs) != 4:
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.dim() != 4:
                raise ValueError(f"{name}: expected 4 dimensions (B, H, N, D), got shape {tuple(t.shape)}")
    dtype = q.dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise TypeError(f"q: expected float16, bfloat16, float32 or float64, got {dtype}")
    if k.dtype != dtype or v.dtype != dtype:
        name, t = ("k", k) if k.dtype != dtype else ("v", v)
        raise TypeError(f"{name}: expected the dtype of q, {dtype}, got {t.dtype}")
    if k.device != q.device or v.device != q.device:
        name, t = ("k", k) if k.device != q.device else ("v", v)
        raise ValueError(f"{name}: expected the device of q, {q.device}, got {t.device}")
    if ks[0] != qs[0] or ks[3] != qs[3]:
        raise ValueError(f"k: expected shape (B={qs[0]}, Hkv, Nk, D={qs[3]}) to match q {tuple(qs)}, got {tuple(ks)}")
    if vs[:3] != ks[:3]:
        raise ValueError(f"v: expected shape (B={ks[0]}, Hkv={ks[1]}, Nk={ks[2]}, Dv) to match k, got {tuple(vs)}")
    if qs[1] != ks[1] and (ks[1] == 0 or qs[1] % ks[1]):
        raise ValueError(f"q: its {qs[1]} heads must be a multiple of the {ks[1]} heads of k")


def options(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None,
    softcap: float | None,
    sink: Tensor | None,
    dropout_p: float,
    skip_threshold: float | None = None,
) -> None:
    """Checks what changes the scores.

    Raises:
        ValueError: For a number out of its range or a tensor of the wrong shape.
        TypeError: For a sink that is not a floating tensor.
    """
    if scale is not None and not abs(float(scale)) < float("inf"):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p}")
    if skip_threshold is not None and not 0.0 <= skip_threshold < 1.0:
        raise ValueError(f"skip_threshold: expected a number in [0, 1), got {skip_threshold}")
    if sink is not None:
        if not isinstance(sink, Tensor) or not sink.is_floating_point():
            got = sink.dtype if isinstance(sink, Tensor) else type(sink).__name__
            raise TypeError(f"sink: expected a floating tensor (Hq={q.shape[1]},), got {got}")
        if tuple(sink.shape) != (q.shape[1],):
            raise ValueError(f"sink: expected shape (Hq={q.shape[1]},), got {tuple(sink.shape)}")
        if sink.device != q.device:
            raise ValueError(f"sink: expected the device of q, {q.device}, got {sink.device}")


def positions(given: tuple[Tensor, Tensor], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Checks logical positions ``(q_pos, k_pos)``.

    Returns:
        The two tensors, int64.

    Raises:
        TypeError: For what is not a pair of integer tensors.
        ValueError: For shapes other than ``(N,)`` or ``(B, N)``.
    """
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"positions: expected a pair (q_pos, k_pos), got {type(given).__name__}")
    for name, pos, t in (("q_pos", given[0], q), ("k_pos", given[1], k)):
        if not isinstance(pos, Tensor) or pos.is_floating_point() or pos.is_complex() or pos.dtype == torch.bool:
            got = pos.dtype if isinstance(pos, Tensor) else type(pos).__name__
            raise TypeError(f"positions: {name} must be an integer tensor, got {got}")
        if tuple(pos.shape) not in ((t.shape[2],), (t.shape[0], t.shape[2])):
            raise ValueError(
                f"positions: {name} must have shape (N={t.shape[2]},) or (B={t.shape[0]}, N={t.shape[2]}), "
                f"got {tuple(pos.shape)}"
            )
    return given[0].long(), given[1].long()


def key_padding(padding: Tensor, k: Tensor) -> None:
    """Checks a key padding mask, ``(B, Nk)`` with True for real keys.

    Raises:
        TypeError: When it is not a boolean tensor.
        ValueError: For another shape.
    """
    if not isinstance(padding, Tensor) or padding.dtype.is_floating_point or str(padding.dtype) != "torch.bool":
        got = padding.dtype if isinstance(padding, Tensor) else type(padding).__name__
        raise TypeError(f"key_padding: expected a bool tensor (B, Nk), True for real keys, got {got}")
    if tuple(padding.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_padding: expected shape (B={k.shape[0]}, Nk={k.shape[2]}), got {tuple(padding.shape)}")
