"""Neighbourhood attention: on a grid of tokens, every query sees the window of keys nearest to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.attention import attention
from manyheads.common.tracing import constant
from manyheads.engine.merge import merge
from manyheads.engine.result import Attn
from manyheads.engine.tiled import tiled
from manyheads.mask import Mask, Neighborhood, grid_permutation
from manyheads.mechanism import exact
from manyheads.spec import Case, Size, Spec, qkv

PerAxis = int | Sequence[int]
Extra = tuple[Float[Tensor, "B Hkv E D"], Float[Tensor, "B Hkv E Dv"]]


def neighborhood_attention(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    shape: Sequence[int],
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | Sequence[bool] = False,
    extra: Extra | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq N Dv"] | Attn:
    r"""Softmax attention of each token of a grid over its nearest keys, along one, two or three axes.

    $$o_i = \sum_{j \in \mathcal{N}(i)} \mathrm{softmax}_j(\mathrm{scale}\; q_i \cdot k_j)\, v_j$$

    where $\mathcal{N}(i)$ is a product of windows, one per axis. A window that would leave the grid is
    shifted inward, so that every query sees equally many keys; on a causal axis it ends at the query and
    shrinks instead.

    Args:
        q: (B, Hq, N, D), N the product of ``shape``, last axis fastest.
        k: (B, Hkv, N, D).
        v: (B, Hkv, N, Dv).
        shape: Sizes of the grid, 1 to 3 of them.
        window: Keys seen along each axis, one number or one per axis, at least 2.
        stride: So many neighbouring queries share one window; 1 for one window each, the window for blocks.
        dilation: Distance between neighbouring keys of a window.
        causal: Whether a query sees only itself and what lies before it, along every axis or each.
        extra: Keys ``(B, Hkv, E, D)`` and values ``(B, Hkv, E, Dv)`` that every query sees too, such as the tokens of
            a text beside an image. They are attended to apart and merged by lse, exactly, gradients included.
        scale: Multiplies the scores; default D ** -0.5.
        return_lse: Whether to return the logarithm of the normaliser too.
        backend: As in :func:`manyheads.attention`.

    Returns:
        (B, Hq, N, Dv), or :class:`manyheads.Attn` with lse (B, Hq, N).

    Raises:
        ValueError: A shape that does not make N tokens; a window below 2, a stride above the window, a window times
            its dilation above the axis; extra keys that do not fit.
        TypeError: Numbers that are no integers.
        UnsupportedError: Queries and keys of different lengths.

    Conventions:
        A stride of the window is attention in blocks, a window of the whole grid is plain attention and computed as
        such. On a CPU queries are computed in boxes of the grid; on a GPU tokens are put in the order of boxes first.
        Grids of several sizes are one call each: a batch holds one shape. For a relative position bias see
        :func:`neighborhood_scores`.

    Source:
        Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143; Hassani et al., Faster Neighborhood
        Attention, arXiv 2403.04690; strides after Hassani et al., Generalized Neighborhood Attention, arXiv
        2504.16922, section 3.

    Example:
        >>> q = k = v = torch.ones(1, 2, 6 * 5, 8)
        >>> result = neighborhood_attention(q, k, v, shape=(6, 5), window=3, scale=0.0, return_lse=True)
        >>> result.lse.exp().round().unique()        # keys seen, corners included
        tensor([9.])
    """
    mask = grid_mask(q, shape, window, stride, dilation, causal)
    axes = causal if isinstance(causal, Sequence) else (causal,)
    SPEC.check(q, k, v, causal=all(axes) and extra is None, lse=return_lse)
    if extra is None:
        return _near(q, k, v, mask, scale, return_lse, backend)
    _check_extra(extra, k, v)
    near = _near(q, k, v, mask, scale, True, backend)
    far = attention(q, *extra, scale=scale, return_lse=True, backend=backend)
    assert isinstance(near, Attn)
    both = merge(near, far)
    return both if return_lse else both.out


def reference(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    *,
    shape: Sequence[int],
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | Sequence[bool] = False,
    extra: Extra | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B Hq N Dv"] | Attn:
    """Exact attention under a matrix of visible pairs, built axis by axis from the definition."""

    def per_axis(value: PerAxis | Sequence[bool]) -> Sequence[int]:
        return value if isinstance(value, Sequence) else [value] * len(shape)

    options = zip(shape, *map(per_axis, (window, stride, dilation, causal)), strict=True)
    visible = functools.reduce(torch.kron, (_axis(*one).to(torch.uint8) for one in options)).bool()
    if extra is not None:
        k, v = (torch.cat((t, more), dim=2) for t, more in zip((k, v), extra, strict=True))
        visible = torch.cat((visible, visible.new_ones(len(visible), extra[0].shape[2])), dim=1)
    return exact.reference(q, k, v, mask=visible[None, None], scale=scale, return_lse=return_lse)


def grid_mask(
    q: Float[Tensor, "B Hq N D"],
    shape: Sequence[int],
    window: PerAxis,
    stride: PerAxis = 1,
    dilation: PerAxis = 1,
    causal: bool | Sequence[bool] = False,
) -> Neighborhood:
    """The mask of a call, checked against its tokens; a constant to a compiler.

    Args:
        q: Its tokens are the cells of the grid.
        shape, window, stride, dilation, causal: As for :func:`neighborhood_attention`.

    Raises:
        ValueError: A shape that does not make N tokens, or windows, strides, dilations out of range.

    Example:
        >>> grid_mask(torch.ones(1, 1, 12, 8), (3, 4), 3)
        neighborhood((3, 4), (3, 3))
    """
    if math.prod(shape) != q.shape[2]:
        raise ValueError(f"shape: expected a grid of N={q.shape[2]} tokens, got {tuple(shape)}")
    return _mask(shape, window, stride, dilation, causal)


@constant
def _mask(
    shape: Sequence[int],
    window: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    causal: bool | Sequence[bool],
) -> Neighborhood:
    return Neighborhood(shape, window, stride=stride, dilation=dilation, causal=causal)


def _near(
    q: Tensor, k: Tensor, v: Tensor, mask: Neighborhood, scale: float | None, return_lse: bool, backend: str
) -> Tensor | Attn:
    simple: Mask | str | None = mask
    if mask.window == mask.grid and not any(mask.causal):
        simple = None
    elif mask.window == mask.grid and len(mask.grid) == 1:
        simple = "causal"
    elif q.device.type == "cuda" and backend in ("auto", "triton") and len(mask.grid) > 1:
        return in_order_of_boxes(q, k, v, mask, scale=scale, return_lse=return_lse, backend=backend)
    return attention(q, k, v, mask=simple, scale=scale, return_lse=return_lse, backend=backend)


def in_order_of_boxes(
    q: Float[Tensor, "B Hq N D"],
    k: Float[Tensor, "B Hkv N D"],
    v: Float[Tensor, "B Hkv N Dv"],
    mask: Neighborhood,
    *,
    box: PerAxis | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "B Hq N Dv"] | Attn:
    """The same attention with tokens put in the order of boxes, so that a tile of tokens is a box of the grid.

    For an engine that visits tiles of tokens: in the usual order a tile is a piece of a line, which sees far more
    keys that its neighbours do not.

    Args:
        q, k, v: As for :func:`neighborhood_attention`.
        mask: The neighbourhood.
        box: Cells of a box along each axis; 8 x 8, or 4 x 4 x 4, by default.
        scale, return_lse, backend: As for :func:`manyheads.engine.tiled.tiled`.

    Returns:
        As :func:`neighborhood_attention`.

    Example:
        >>> q = k = v = torch.ones(1, 1, 24, 8)
        >>> in_order_of_boxes(q, k, v, Neighborhood((4, 6), 3), box=2).shape
        torch.Size([1, 1, 24, 8])
    """
    side = {1: 64, 2: 8, 3: 4}[len(mask.grid)] if box is None else box
    order, inverse, positions = _order(mask, side, q.device)
    q, k, v = (t.index_select(2, order) for t in (q, k, v))
    found = tiled(q, k, v, mask, positions=positions, scale=scale, return_lse=return_lse, backend=backend)
    if isinstance(found, Attn):
        return Attn(*(t.index_select(2, inverse) for t in found))
    return found.index_select(2, inverse)


@functools.lru_cache(maxsize=32)
def _order(mask: Neighborhood, box: PerAxis, device: torch.device) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Order, its inverse, and the positions by which the mask knows the tokens, which stay on the host."""
    order, inverse = (torch.from_numpy(t) for t in grid_permutation(mask.grid, box, mask.dilation))
    return order.to(device), inverse.to(device), (order, order)


def _check_extra(extra: Extra, k: Tensor, v: Tensor) -> None:
    if not isinstance(extra, (tuple, list)) or len(extra) != 2:
        raise TypeError(f"extra: expected a pair of keys and values, got {type(extra).__name__}")
    for t, own, name in zip(extra, (k, v), ("keys", "values"), strict=True):
        if not isinstance(t, Tensor) or t.dtype != own.dtype or t.device != own.device:
            got = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"extra: expected {name} in {own.dtype} on {own.device}, got {got}")
        if t.dim() != 4 or (*t.shape[:2], t.shape[3]) != (*own.shape[:2], own.shape[3]):
            want = f"({own.shape[0]}, {own.shape[1]}, E, {own.shape[3]})"
            raise ValueError(f"extra: expected {name} of shape {want}, got {tuple(t.shape)}")
    if extra[0].shape[2] != extra[1].shape[2]:
        raise ValueError(f"extra: expected as many values as keys, got {extra[1].shape[2]} and {extra[0].shape[2]}")


def _axis(length: int, window: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """Which keys (columns) a query (row) sees along one axis, each residue of the dilation by itself."""
    token = torch.arange(length)
    group, at = token % dilation, token // dilation
    size = (length - 1 - group) // dilation + 1
    leader = at // stride * stride + (stride - 1 if causal else stride // 2)
    leader = torch.minimum(leader, size - 1)
    if causal:
        first, last = leader - window + 1, at
    else:
        after = window - 1 - window // 2
        centre = torch.minimum(leader, size - 1 - after).clamp(min=window // 2)
        first, last = centre - window // 2, centre + after
    seen = (at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None])
    return seen & (group[None, :] == group[:, None])


def _grid(size: Size) -> tuple[int, ...]:
    return (3, size.queries // 3) if size.queries % 3 == 0 and size.queries > 6 else (size.queries,)


def _window(size: Size) -> tuple[int, ...]:
    return tuple(min(axis, (6, 3)[axis < 6]) for axis in _grid(size))


def _as_exact(case: Case) -> Case:
    names = ("stride", "dilation", "causal")
    more = {name: case.options[name] for name in names if name in case.options}
    return case._replace(options={"mask": Neighborhood(case.options["shape"], case.options["window"], **more)})


SPEC = Spec(
    "neighborhood",
    fn=neighborhood_attention,
    reference=reference,
    paper="Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143",
    inputs=qkv(shape=_grid, window=_window, causal=lambda size: size.causal),
    backends=("reference", "blocked", "triton"),
    supports={"noncausal_self", "causal_self", "gqa", "value_width", "lse", "backward"},
    invariances=("batch", "heads"),
    axes={"carrier": "nearest keys on a grid", "kernel": "exp", "estimator": "average", "execution": "tiles"},
    flops=lambda case: exact.flops(_as_exact(case)),
    bytes=exact.traffic,
)
