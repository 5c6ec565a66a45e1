"""Documents of any length in one row: no padding, no leak from one to the next, one call."""

from __future__ import annotations

import torch

import manyheads as mh


def main() -> None:
    """Packs four documents, and compares with a loop over them, gradients included."""
    torch.manual_seed(0)
    lengths = [37, 250, 5, 108]
    q, k, v = (torch.randn(1, 4, sum(lengths), 32, requires_grad=True) for _ in range(3))

    packed = mh.attention(q, k, v, mask=mh.Causal() & mh.Document(lengths))

    documents = zip(*(t.split(lengths, dim=2) for t in (q, k, v)), strict=True)
    looped = torch.cat([mh.attention(*one, mask="causal") for one in documents], dim=2)
    print(f"largest difference to one call per document: {(packed - looped).abs().max():.1e}")
    assert (packed - looped).abs().max() < 1e-5

    # the first document hears nothing from the others: its gradient does not depend on their outputs
    (grad,) = torch.autograd.grad(packed[:, :, : lengths[0]].sum(), k, retain_graph=True)
    print(f"gradient beyond the first document: {grad[:, :, lengths[0] :].abs().max():.1f}")
    assert (grad[:, :, lengths[0] :] == 0).all()


if __name__ == "__main__":
    main()
