"""Another mask for every head: local heads, a strided head and a global one in the same call."""

from __future__ import annotations

import torch

import manyheads as mh


def main() -> None:
    """Runs four heads with four masks and compares each with a call of its own."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 600, 32) for _ in range(3))
    causal = mh.Causal()
    masks = [
        causal & mh.Window(16),
        causal & (mh.Window(128) | mh.Sink(4)),
        causal & (mh.Window(16) | mh.Periodic(32)),
        causal,
    ]

    out = mh.attention(q, k, v, mask=mh.PerHead(masks))

    for head, mask in enumerate(masks):
        here = slice(head, head + 1)
        alone = mh.attention(q[:, here], k[:, here], v[:, here], mask=mask)
        share = mask.tiles(600).area
        print(f"head {head}: {mask!r} sees {share:.1%} of all pairs")
        assert (out[:, here] - alone).abs().max() < 1e-5


if __name__ == "__main__":
    main()
