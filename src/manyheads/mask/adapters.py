"""Masks from and to the forms of other libraries, each with its own meaning of window and alignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .base import Mask, resolve
from .data import Dense
from .documents import Document
from .neighborhood import Neighborhood
from .predicate import Predicate
from .primitives import Causal, Full, Window
from .rectangles import CAUSAL, Rectangles
from .store import to_array, whole


def from_bool(allowed: torch.Tensor) -> Mask:
    """A mask from booleans.

    Args:
        allowed: ``(Nq, Nk)``, ``(H, Nq, Nk)`` or ``(B, H, Nq, Nk)``, True where attention is allowed.

    Returns:
        `Dense`.

    Raises:
        TypeError: Not booleans.
        ValueError: Fewer than two or more than four axes.

    Example:
        >>> from_bool(torch.tensor([[True, False], [True, True]]))
        dense([[1, 0], [1, 1]])
    """
    return Dense(allowed)


def from_sdpa(
    attn_mask: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    nq: int | None = None,
    nk: int | None = None,
) -> Mask:
    """A mask from the arguments of ``F.scaled_dot_product_attention``.

    Args:
        attn_mask: Booleans broadcastable to ``(B, H, Nq, Nk)``, True where attention is allowed.
        is_causal: SDPA's causal rule: row r sees columns up to r whatever the lengths (upper-left).
        nq: Number of queries; needed when the mask's query axis is 1, and for ``is_causal``.
        nk: Number of keys, likewise.

    Returns:
        The mask on default positions, where the last query stands at the last key.

    Raises:
        TypeError: A floating-point mask: that is a bias.
        ValueError: Both arguments, or lengths that are missing.

    Example:
        >>> from_sdpa(is_causal=True, nq=2, nk=3).dense(2, 3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0]]
    """
    if is_causal:
        if attn_mask is not None:
            raise ValueError("from_sdpa: give attn_mask or is_causal, not both")
        if nq is None or nk is None:
            raise ValueError("nq, nk: needed for is_causal, which is upper-left aligned")
        return Causal() if nq == nk else _upper_left(nq, nk)
    if attn_mask is None:
        return Full()
    if attn_mask.is_floating_point():
        raise TypeError(f"attn_mask: expected booleans, got {attn_mask.dtype}: an additive mask is a bias=")
    array = to_array(attn_mask, "attn_mask")
    sizes = [nq if nq is not None else array.shape[-2], nk if nk is not None else array.shape[-1]]
    for axis, size, what in ((-2, sizes[0], "nq"), (-1, sizes[1], "nk")):
        if array.shape[axis] not in (1, size):
            raise ValueError(f"{what}: attn_mask has {array.shape[axis]}, expected {size}")
    return Dense(np.broadcast_to(array, (*array.shape[:-2], *sizes)))


def _upper_left(nq: int, nk: int) -> Mask:
    n = min(nq, nk)
    start = nk - nq
    q = [[start, start + n]] + ([[start + n, nk]] if nq > nk else [])
    return Rectangles(q, [[0, n]] * len(q), [CAUSAL, 0][: len(q)])


def from_cu_seqlens(cu_seqlens_q: Any, cu_seqlens_k: Any = None, *, causal: bool = False) -> Mask:
    """A mask from cumulative lengths of packed sequences.

    Args:
        cu_seqlens_q: ``(n + 1,)`` integers from 0, each at least the one before.
        cu_seqlens_k: The same of the keys, when they differ.
        causal: Whether each sequence is causal (bottom-right inside each, as in FlashAttention since 2.1).

    Returns:
        ``Document(lengths)``, with ``Causal() &`` when asked.

    Raises:
        TypeError: Not integers.
        ValueError: Values that do not begin at 0 or that decrease.

    Example:
        >>> from_cu_seqlens(torch.tensor([0, 3, 5]), causal=True)
        causal & document([3, 2])
    """
    lens = [_lengths(cu_seqlens_q, "cu_seqlens_q")]
    if cu_seqlens_k is not None:
        lens.append(_lengths(cu_seqlens_k, "cu_seqlens_k"))
    mask = Document(*lens)
    return Causal() & mask if causal else mask


def _lengths(values: Any, argument: str) -> np.ndarray:
    array = to_array(values, argument)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{argument}: expected integers, got {array.dtype}")
    if array.ndim != 1 or len(array) < 2 or array[0] != 0 or (np.diff(array) < 0).any():
        raise ValueError(f"{argument}: expected 0, then values that never decrease, got {array.tolist()[:8]}")
    return np.diff(array.astype(np.int64))


def from_hf_window(sliding_window: int, *, causal: bool = True) -> Mask:
    """A mask from ``sliding_window`` of a transformers configuration.

    Args:
        sliding_window: Causal models see that many keys, self included. Bidirectional ones see distances up
            to and including it.
        causal: Which of the two.

    Returns:
        ``Causal() & Window(w)``, or ``Window(w + 1)``.

    Raises:
        TypeError: Not an integer.
        ValueError: Below 1.

    Example:
        >>> from_hf_window(4), from_hf_window(4, causal=False)
        (causal & window(4), window(5))
    """
    sliding_window = whole(sliding_window, "sliding_window", 1)
    return Causal() & Window(sliding_window) if causal else Window(sliding_window + 1)


def from_flash_window(window_size: tuple[int, int], *, causal: bool = False) -> Mask:
    """A mask from ``window_size=(left, right)`` of FlashAttention, which counts neighbours without self.

    Args:
        window_size: Keys before and after the query; -1 for no limit.
        causal: Whether nothing after the query is visible.

    Returns:
        ``Window(left=left + 1, right=right + 1)``, with ``Causal() &`` when asked.

    Raises:
        TypeError: Not integers.
        ValueError: Below -1.

    Example:
        >>> from_flash_window((3, 0)), from_flash_window((-1, -1))
        (window(left=4, right=1), full)
        >>> from_flash_window((3, -1), causal=True)
        causal & window(left=4)
    """
    left, right = (whole(n, "window_size", -1) for n in window_size)
    right = -1 if causal else right
    reach = {side: n + 1 for side, n in (("left", left), ("right", right)) if n >= 0}
    mask: Mask = Window(**reach) if reach else Full()
    return Causal() & mask if causal else mask


def from_natten(
    shape: int | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Mask:
    """A mask from the arguments of ``na1d``, ``na2d`` and ``na3d`` of NATTEN, whose kernel size counts all
    keys.

    Args:
        shape: Token layout.
        kernel_size: Keys per axis.
        stride: See `Neighborhood`.
        dilation: See `Neighborhood`.
        is_causal: See `Neighborhood`.

    Returns:
        The `Neighborhood`.

    Raises:
        ValueError: Arguments that NATTEN refuses.

    Example:
        >>> from_natten((4, 4), 3)
        neighborhood((4, 4), (3, 3))
    """
    return Neighborhood(shape, kernel_size, stride, dilation, is_causal)


class _FlexRule:
    """A ``mask_mod`` over indices, as a rule over positions; equal for equal functions."""

    def __init__(self, mask_mod: Callable[..., torch.Tensor], shift: int) -> None:
        self.mask_mod, self.shift = mask_mod, shift
        self.__name__ = getattr(mask_mod, "__name__", "mask_mod")

    def __call__(self, b: Any, h: Any, q_pos: torch.Tensor, k_pos: torch.Tensor) -> torch.Tensor:
        return self.mask_mod(b, h, q_pos - self.shift, k_pos)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FlexRule) and (self.mask_mod, self.shift) == (other.mask_mod, other.shift)

    def __hash__(self) -> int:
        return hash((self.mask_mod, self.shift))


def from_flex(
    mask_mod: Callable[..., torch.Tensor],
    nq: int,
    nk: int | None = None,
    *,
    batch: int = 1,
    heads: int = 1,
) -> Mask:
    """A mask from a ``mask_mod`` of FlexAttention.

    Args:
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``, elementwise; tensors that it reads must be on the CPU.
        nq: Number of queries: a ``mask_mod`` counts rows from 0, not positions.
        nk: Number of keys; as many as queries by default.
        batch: Batch size, when the rule reads ``b``.
        heads: Number of query heads, when the rule reads ``h``.

    Returns:
        A `Predicate`, which costs its area: where the rule has a name here, use that.

    Raises:
        TypeError: ``mask_mod`` cannot be called.

    Example:
        >>> from_flex(lambda b, h, q, k: q >= k, 2, 3).dense(2, 3)[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0]]
    """
    if not callable(mask_mod):
        raise TypeError(f"mask_mod: expected a function, got {type(mask_mod).__name__}")
    shift = (nq if nk is None else nk) - nq
    return Predicate(_FlexRule(mask_mod, shift), (batch, heads), (0, 0))


def to_flex(
    mask: Mask,
    nq: int,
    nk: int | None = None,
    *,
    positions: tuple[Any, Any] | None = None,
    device: Any = "cpu",
) -> Callable[..., torch.Tensor]:
    """The mask as a ``mask_mod`` for ``torch.nn.attention.flex_attention.create_block_mask``.

    Args:
        mask: The mask.
        nq: Number of queries.
        nk: Number of keys; as many as queries by default.
        positions: ``(q_pos, k_pos)``; see `Mask.default_positions`.
        device: Where the coordinate tables live; the device of the block mask.

    Returns:
        ``mask_mod(b, h, q_idx, kv_idx)``.

    Raises:
        ValueError: The mask does not fit ``nq`` and ``nk``.

    Example:
        >>> from manyheads.mask import Causal, to_flex
        >>> rule = to_flex(Causal(), 2, 3)
        >>> bool(rule(0, 0, torch.tensor(0), torch.tensor(1)))
        True
    """
    nk = nq if nk is None else nk
    q_pos, k_pos = resolve(mask, nq, nk, positions)
    batch = max(mask.shape[0], len(q_pos), len(k_pos))
    heads = mask.shape[1]
    rules: dict[tuple[Mask, int, int], Callable[[Any, Any], Any]] = {}
    which = torch.zeros(batch, heads, dtype=torch.int64)
    for b in range(batch):
        for h in range(heads):
            key = (mask.at(b, h), b % len(q_pos), b % len(k_pos))
            if key not in rules:
                rules[key] = _flex_rule(key[0], q_pos[key[1]], k_pos[key[2]], device)
            which[b, h] = list(rules).index(key)
    parts = list(rules.values())
    if len(parts) == 1:
        only = parts[0]
        return lambda b, h, q_idx, kv_idx: only(q_idx, kv_idx)
    which = which.to(device)

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        mine = which[b if batch > 1 else 0, h if heads > 1 else 0]
        result = (mine == 0) & parts[0](q_idx, kv_idx)
        for n, part in enumerate(parts[1:], 1):
            result = result | ((mine == n) & part(q_idx, kv_idx))
        return result

    return mask_mod


def _flex_rule(mask: Mask, q_pos: np.ndarray, k_pos: np.ndarray, device: Any) -> Callable[[Any, Any], Any]:
    tables = []
    for pos, side in ((q_pos, "q"), (k_pos, "k")):
        record = mask.coords(pos, "q" if side == "q" else "k", len(pos))
        tables.append({name: torch.from_numpy(np.array(a)).to(device) for name, a in record.items()})
    q, k = tables

    def rule(q_idx: Any, kv_idx: Any) -> Any:
        q_record = {name: a[q_idx] for name, a in q.items()}
        return mask._allows(q_record, {name: a[kv_idx] for name, a in k.items()})

    if len(q_pos) and len(k_pos):
        first = torch.zeros((), dtype=torch.int64, device=device)
        rule(first, first)  # puts look-up tables on the device before anything is traced
    return rule
