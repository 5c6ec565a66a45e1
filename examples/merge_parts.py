"""Attention in parts: two calls over different keys merge to exactly the result of one."""

from __future__ import annotations

import torch

import manyheads as mh


def main() -> None:
    """Splits the keys into a shared prefix and a suffix, as a server with a prefix cache does."""
    torch.manual_seed(0)
    q = torch.randn(2, 8, 16, 64)
    k, v = (torch.randn(2, 2, 500, 64) for _ in range(2))  # two key heads serve eight query heads
    prefix = 384

    first = mh.attention(q, k[:, :, :prefix], v[:, :, :prefix], return_lse=True)
    second = mh.attention(q, k[:, :, prefix:], v[:, :, prefix:], mask="causal", return_lse=True)
    merged = mh.merge(first, second)

    whole = mh.attention(q, k, v, mask="causal", return_lse=True)
    print(f"largest difference of outputs: {(merged.out - whole.out).abs().max():.1e}")
    print(f"largest difference of log-normalisers: {(merged.lse - whole.lse).abs().max():.1e}")
    assert (merged.out - whole.out).abs().max() < 1e-5


if __name__ == "__main__":
    main()
