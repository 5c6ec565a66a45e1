"""A causal sliding window: what the mask says, what it costs, and that it equals masking by hand."""

from __future__ import annotations

import torch

import manyheads as mh


def main() -> None:
    """Attends to the last 64 tokens of 2048 and compares with a boolean matrix."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 2048, 32) for _ in range(3))
    mask = mh.Causal() & mh.Window(64)

    out = mh.attention(q, k, v, mask=mask)

    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.dense(2048))
    print(f"mask: {mask!r}")
    print(f"largest difference to a dense boolean mask: {(out - dense).abs().max():.1e}")
    assert (out - dense).abs().max() < 1e-5

    layout = mask.tiles(2048, tile=(128, 128))
    print(f"visible pairs: {layout.pairs}, tiles visited: {layout.density:.1%} of all")
    print(mh.explain(q, k, v, mask=mask))


if __name__ == "__main__":
    main()
