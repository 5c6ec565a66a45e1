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
from manyheads.engine.result import Attn
from manyheads.mask import Mask, Neighborhood
from manyheads.mechanism import exact
from manyheads.spec import Case, Size, Spec, qkv

PerAxis = int | Sequence[int]


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
        scale: Multiplies the scores; default D ** -0.5.
        return_lse: Whether to return the logarithm of the normaliser too.
        backend: As in :func:`manyheads.attention`.

    Returns:
        (B, Hq, N, Dv), or :class:`manyheads.Attn` with lse (B, Hq, N).

    Raises:
        ValueError: A shape that does not make N tokens, or windows, strides, dilations out of range.
        UnsupportedError: Queries and keys of different lengths.

    Source:
        Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143; strides after Hassani et al.,
        Generalized Neighborhood Attention, arXiv 2504.16922, section 3.

    Example:
        >>> q = k = v = torch.ones(1, 2, 6 * 5, 8)
        >>> result = neighborhood_attention(q, k, v, shape=(6, 5), window=3, scale=0.0, return_lse=True)
        >>> result.lse.exp().round().unique()        # keys seen, corners included
        tensor([9.])
    """
    axes = causal if isinstance(causal, Sequence) else (causal,)
    SPEC.check(q, k, v, causal=all(axes), lse=return_lse)
    if math.prod(shape) != q.shape[2]:
        raise ValueError(f"shape: expected a grid of N={q.shape[2]} tokens, got {tuple(shape)}")
    mask = _mask(shape, window, stride, dilation, causal)
    return attention(q, k, v, mask=mask, scale=scale, return_lse=return_lse, backend=backend)


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
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B Hq N Dv"] | Attn:
    """Exact attention under a matrix of visible pairs, built axis by axis from the definition."""

    def per_axis(value: PerAxis | Sequence[bool]) -> Sequence[int]:
        return value if isinstance(value, Sequence) else [value] * len(shape)

    options = zip(shape, *map(per_axis, (window, stride, dilation, causal)), strict=True)
    visible = functools.reduce(torch.kron, (_axis(*one).to(torch.uint8) for one in options)).bool()
    return exact.reference(q, k, v, mask=visible[None, None], scale=scale, return_lse=return_lse)


@constant
def _mask(
    shape: Sequence[int],
    window: PerAxis,
    stride: PerAxis,
    dilation: PerAxis,
    causal: bool | Sequence[bool],
) -> Mask:
    return Neighborhood(shape, window, stride=stride, dilation=dilation, causal=causal)


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
