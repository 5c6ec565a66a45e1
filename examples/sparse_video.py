"""A video whose tokens look at their neighbours in time and space: the stride that suits the tiles, and a call."""

from __future__ import annotations

import torch

import manyheads as mh
from manyheads.bench.planning.neighborhood import flat, search, simulate
from manyheads.mechanism.sparse import neighborhood_attention
from manyheads.nn import NeighborhoodAttention3D

VIDEO, WINDOW = (30, 48, 80), (18, 24, 24)
Q_TILE, KV_TILE = (4, 8, 8), (2, 8, 8)


def main() -> None:
    """Plans a long video, then computes a short one."""
    moving = mh.Neighborhood(VIDEO, WINDOW)
    print(f"a video of {VIDEO} tokens, windows of {WINDOW}")
    for name, found in {
        "every token its own window": simulate(moving, Q_TILE, KV_TILE),
        "the same, keys gathered": simulate(moving, Q_TILE, KV_TILE, dynamic=True),
        "windows that move with the tiles": search(VIDEO, WINDOW, Q_TILE, KV_TILE),
    }.items():
        masked = "nothing masked" if found.perfect else "edges masked"
        print(f"{name}: stride {found.mask.stride}, {found.tile_speedup:.2f}x of {found.flop_speedup:.2f}x, {masked}")
    short = mh.Neighborhood((8, 32, 32), (5, 7, 7))
    print(f"a shorter one by 64 flattened tokens a tile: {flat(short, 64, 64).tile_speedup:.2f}x, ", end="")
    print(f"by boxes of 4 x 4 x 4: {simulate(short, 4, 4).tile_speedup:.2f}x")

    torch.manual_seed(0)
    shape, tokens = (8, 16, 16), 2048
    q, k, v = (torch.randn(1, 2, tokens, 32) for _ in range(3))
    options = {"window": (3, 7, 7), "causal": (True, False, False)}
    out = neighborhood_attention(q, k, v, shape=shape, **options)

    # the past does not change when later frames do
    later = v.clone()
    later[:, :, tokens // 2 :] += 1.0
    other = neighborhood_attention(q, k, later, shape=shape, **options)
    same = torch.equal(out[:, :, : tokens // 2], other[:, :, : tokens // 2])
    print(f"the first four frames are the same whatever follows: {same}")
    assert same and not torch.equal(out, other)

    layer = NeighborhoodAttention3D(32, 2, kernel_size=(3, 5, 5), is_causal=(True, False, False))
    print(f"a layer: {tuple(layer(torch.randn(1, 6, 10, 12, 32)).shape)}")


if __name__ == "__main__":
    main()
