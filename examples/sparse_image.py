"""An image whose tokens look at their neighbours: what it costs, and that it is exact."""

from __future__ import annotations

import time

import torch

import manyheads as mh
from manyheads.mechanism.sparse import neighborhood_attention
from manyheads.nn import NeighborhoodAttention2D

SIDE, WINDOW = 48, 7


def main() -> None:
    """Compares windows of 7 x 7 with a dense mask, then uses them in a layer beside tokens of a text."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, SIDE * SIDE, 32) for _ in range(3))
    mask = mh.Neighborhood((SIDE, SIDE), WINDOW)

    near = neighborhood_attention(q, k, v, shape=(SIDE, SIDE), window=WINDOW)
    visible = mask.dense(SIDE * SIDE)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    print(f"every token sees {int(visible[0, 0, 0].sum())} of {SIDE * SIDE}, corners included")
    print(f"largest difference to a dense mask: {(near - dense).abs().max():.1e}")
    assert torch.allclose(near, dense, atol=1e-5)
    print(mh.explain(q, k, v, mask=mask).notes[0])

    for name, call in {
        "boxes": lambda: mh.attention(q, k, v, mask=mask),
        "dense mask": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible),
    }.items():
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        print(f"{name}: {min(times):.1f} ms")

    # sixteen tokens of a text that every pixel sees too, merged exactly
    text = tuple(torch.randn(1, 4, 16, 32) for _ in range(2))
    both = neighborhood_attention(q, k, v, shape=(SIDE, SIDE), window=WINDOW, extra=text, return_lse=True)
    print(f"with a text of 16 tokens: {tuple(both.out.shape)}")

    # windows that four pixels share, in a layer with the parameters of NATTEN's module
    layer = NeighborhoodAttention2D(64, 4, kernel_size=(8, 8), stride=(4, 4))
    image = torch.randn(2, 24, 32, 64, requires_grad=True)
    layer(image).square().mean().backward()
    print(f"{layer}")
    print(f"gradients reach every pixel: {bool((image.grad != 0).any(-1).all())}")


if __name__ == "__main__":
    main()
