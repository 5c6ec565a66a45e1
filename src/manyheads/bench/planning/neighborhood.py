"""What a neighbourhood costs a kernel over tiles, which stride suits its tiles, and what it saves on this machine.

A kernel reads tiles, not pairs. Windows that move by one token end inside tiles; windows that move with the tiles do
not, and then nothing that is read is masked. All counts are exact and are products over the axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from manyheads.attention import attention
from manyheads.bench.timing import interleave
from manyheads.engine.tiled.boxing import Axis, axes_of, cheapest_box
from manyheads.mask import Neighborhood
from manyheads.mask.neighborhood import per_axis, visible_places

PerAxis = int | Sequence[int]


@dataclass(frozen=True)
class Simulation:
    """A neighbourhood in tiles of one shape.

    Attributes:
        mask: The neighbourhood.
        q_tile, kv_tile: Tokens of a tile of queries and of keys, along each axis (one number: of the flattened grid).
        dynamic: Whether tiles of keys begin where the windows of a tile of queries begin, rather than on a fixed grid.
        visited: Pairs of tiles that a kernel computes.
        all: Pairs of tiles of self attention.
        most: Tiles of keys that one tile of queries visits at most.
        flop_speedup: All pairs of tokens over visible ones: what no kernel can beat.
        tile_speedup: All pairs of tiles over visited ones: what a kernel over these tiles can reach.
        perfect: Whether no visited tile has a hidden pair, so that nothing has to be masked.
    """

    mask: Neighborhood
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    dynamic: bool
    visited: int
    all: int
    most: int
    flop_speedup: float
    tile_speedup: float
    perfect: bool


def simulate(mask: Neighborhood, q_tile: PerAxis, kv_tile: PerAxis, *, dynamic: bool = False) -> Simulation:
    """Counts the pairs of tiles that a kernel over boxes of the grid visits.

    Each residue class of a dilation is a grid of its own, tiled by itself.

    Args:
        mask: The neighbourhood.
        q_tile: Queries of a tile along each axis, one number or one per axis.
        kv_tile: Keys of a tile along each axis.
        dynamic: Whether tiles of keys may begin anywhere, as a kernel that gathers can; on a fixed grid by default.

    Returns:
        The counts.

    Raises:
        ValueError: Tiles of other axes or below 1.

    Source:
        Hassani et al., Generalized Neighborhood Attention, arXiv 2504.16922, section 3.3.

    Example:
        >>> video = Neighborhood((30, 48, 80), (18, 24, 24), (16, 8, 8))
        >>> found = simulate(video, (4, 8, 8), (2, 8, 8))
        >>> round(found.tile_speedup, 2), round(found.flop_speedup, 2), found.perfect
        (11.11, 11.11, True)
    """
    n = len(mask.grid)
    q_sizes, kv_sizes = per_axis(q_tile, n, "q_tile"), per_axis(kv_tile, n, "kv_tile")
    axes = [
        _axis(axis, q, kv, dynamic) for axis, q, kv in zip(axes_of(mask), q_sizes, kv_sizes, strict=True)
    ]
    return _simulation(mask, q_sizes, kv_sizes, dynamic, axes)


def flat(mask: Neighborhood, q_tile: int, kv_tile: int) -> Simulation:
    """The same for tiles of the flattened grid: runs of tokens in row-major order, as a kernel without axes has them.

    Args:
        mask: The neighbourhood.
        q_tile: Queries of a tile.
        kv_tile: Keys of a tile.

    Returns:
        The counts.

    Raises:
        ValueError: A tile below 1.

    Example:
        >>> square = Neighborhood((64, 64), 16)
        >>> [round(found.tile_speedup, 2) for found in (flat(square, 64, 64), simulate(square, 8, 8))]
        [4.0, 8.46]
    """
    tokens = math.prod(mask.grid)
    layout = mask.tiles(tokens, tile=(q_tile, kv_tile))
    rows, columns = layout.grid
    most = max(sum(count for _, count, _ in row) for row in layout.spans(0))
    flops = tokens**2 / layout.pairs
    whole = not bool((layout.mask_id != 0).any())
    speedup = rows * columns / layout.visited
    return Simulation(mask, (q_tile,), (kv_tile,), False, layout.visited, rows * columns, most, flops, speedup, whole)


def search(
    shape: PerAxis,
    window: PerAxis,
    q_tile: PerAxis,
    kv_tile: PerAxis,
    *,
    dilation: PerAxis = 1,
    causal: bool | Sequence[bool] = False,
    dynamic: bool = False,
    goal: float | None = None,
) -> Simulation | None:
    """The smallest stride that suits the tiles.

    Args:
        shape, window, dilation, causal: As for :class:`manyheads.mask.Neighborhood`.
        q_tile, kv_tile, dynamic: As for :func:`simulate`.
        goal: Share of the speed-up by operations that the tiles shall reach, up to 1; nothing masked by default.

    Returns:
        The simulation of the stride with the smallest product; None where no stride reaches the goal.

    Raises:
        ValueError: As :func:`simulate`, or a goal that is no share.

    Example:
        >>> found = search(32768, 2048, 256, 128)
        >>> found.mask.stride, found.tile_speedup
        ((256,), 16.0)
    """
    if goal is not None and not 0 < goal <= 1:
        raise ValueError(f"goal: expected a share above 0 and up to 1, got {goal}")
    plain = Neighborhood(shape, window, 1, dilation, causal)
    n = len(plain.grid)
    q_sizes, kv_sizes = per_axis(q_tile, n, "q_tile"), per_axis(kv_tile, n, "kv_tile")
    choices = [
        list(_useful(axis, q, kv, dynamic)) for axis, q, kv in zip(axes_of(plain), q_sizes, kv_sizes, strict=True)
    ]
    best: tuple[int, tuple[int, ...], Simulation] | None = None
    for chosen in itertools.product(*choices):
        stride = tuple(one for one, _ in chosen)
        order = math.prod(stride), stride
        if best is not None and order >= best[:2]:
            continue
        mask = Neighborhood(plain.grid, plain.window, stride, plain.dilation, plain.causal)
        found = _simulation(mask, q_sizes, kv_sizes, dynamic, [one for _, one in chosen])
        if found.perfect if goal is None else found.tile_speedup >= goal * found.flop_speedup:
            best = (*order, found)
    return None if best is None else best[2]


class _Counts(NamedTuple):
    """One axis: pairs of tiles visited and in all, the most of one tile, visible pairs, whether nothing is masked."""

    visited: int
    all: int
    most: int
    pairs: int
    perfect: bool


def _axis(axis: Axis, q_tile: int, kv_tile: int, dynamic: bool) -> _Counts:
    length, window, stride, dilation, causal = axis
    visited, most, pairs, perfect = 0, 0, 0, True
    long = length % dilation
    for residues, cells in ((long, length // dilation + 1), (dilation - long, length // dilation)):
        if not residues or not cells:
            continue
        first, last = visible_places(cells, window, stride, causal)
        starts = np.arange(0, cells, q_tile)
        low, high = np.minimum.reduceat(first, starts), np.maximum.reduceat(last, starts)
        if dynamic:
            tiles = -(-(high - low + 1) // kv_tile)
            aligned = (high - low + 1) % kv_tile == 0
        else:
            tiles = high // kv_tile - low // kv_tile + 1
            aligned = (low % kv_tile == 0) & (((high + 1) % kv_tile == 0) | (high + 1 == cells))
        same = (np.maximum.reduceat(first, starts) == low) & (np.minimum.reduceat(last, starts) == high)
        visited += residues * int(tiles.sum())
        pairs += residues * int((last - first + 1).sum())
        most = max(most, int(tiles.max()))
        perfect &= bool((aligned & same).all())
    return _Counts(visited, -(-length // q_tile) * -(-length // kv_tile), most, pairs, perfect)


def _useful(axis: Axis, q_tile: int, kv_tile: int, dynamic: bool) -> list[tuple[int, _Counts]]:
    """Strides of one axis that visit less, or mask less, than every smaller one."""
    found: list[tuple[int, _Counts]] = []
    length, window, _, dilation, causal = axis
    for stride in range(1, window + 1):
        counts = _axis((length, window, stride, dilation, causal), q_tile, kv_tile, dynamic)
        if all(counts.visited < known.visited or counts.perfect > known.perfect for _, known in found):
            found.append((stride, counts))
    return found


def _simulation(
    mask: Neighborhood, q_tile: tuple[int, ...], kv_tile: tuple[int, ...], dynamic: bool, axes: list[_Counts]
) -> Simulation:
    visited, every, most, pairs = (math.prod(getattr(one, name) for one in axes) for name in _Counts._fields[:4])
    perfect = all(one.perfect for one in axes)
    flops = math.prod(mask.grid) ** 2 / pairs
    return Simulation(mask, q_tile, kv_tile, dynamic, visited, every, most, flops, every / visited, perfect)


# --- on this machine ----------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """What a neighbourhood is predicted to save here.

    Attributes:
        speedup: Time of plain attention over that of the neighbourhood.
        dense_ms: Milliseconds of plain attention.
        near_ms: Milliseconds of the neighbourhood.
        box: Queries of a box of the engine.
    """

    speedup: float
    dense_ms: float
    near_ms: float
    box: tuple[int, ...]


def predict(
    mask: Neighborhood, *, heads: int = 4, width: int = 32, dtype: torch.dtype = torch.float32, rounds: int = 7
) -> Prediction:
    """Predicts the speed-up over plain attention of a forward call on this CPU from small calls of other sizes.

    Plain attention (torch's) is timed at some 2000 tokens and grows with the pairs; the neighbourhood follows the
    cost model that chooses the engine's boxes, whose unit is calibrated on small images.

    Args:
        mask: The neighbourhood; nothing of its size is run.
        heads: Heads of the call.
        width: Width of a head.
        dtype: Of the inputs.
        rounds: Interleaved rounds of the timing.

    Returns:
        Speed-up and times.

    Raises:
        ValueError: A neighbourhood without boxes of a size that fits.
    """
    half = dtype.itemsize == 2
    cost, box = cheapest_box(mask, heads, half)
    if box is None:
        raise ValueError(f"mask: no box of {mask.text} is small enough to be computed at once")
    calls: dict[str, Callable[[], object]] = {"dense": _call(_DENSE, None, heads, width, dtype)}
    for small in _SMALL:
        calls[small.text] = _call(math.prod(small.grid), small, heads, width, dtype)
    with torch.inference_mode():
        times = {name: timing.median_ms for name, timing in interleave(calls, rounds=(rounds, rounds)).items()}
    units = [times[small.text] / cheapest_box(small, heads, half)[0] for small in _SMALL]
    near = cost * math.exp(sum(map(math.log, units)) / len(units))
    dense = times["dense"] * (math.prod(mask.grid) / _DENSE) ** 2
    return Prediction(dense / near, dense, near, box)


_DENSE = 2304
_SMALL = (Neighborhood((40, 44), 9), Neighborhood((56, 48), 13), Neighborhood((60, 60), 11))


def _call(tokens: int, mask: Neighborhood | None, heads: int, width: int, dtype: torch.dtype) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, width, generator=generator).to(dtype) for _ in range(3))
    if mask is None:
        return lambda: scaled_dot_product_attention(q, k, v)
    return lambda: attention(q, k, v, mask=mask, backend="blocked")
