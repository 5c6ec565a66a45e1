"""Trains a small hybrid decoder, recurrence and windowed attention in turn, and lets it continue a text.

Every layer names its mixer; anything else about the network stays the same when the mechanism changes.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from manyheads import Document
from manyheads.model import Config, Decoder

TEXT = "the scan reads, the scan writes, the window sees what is near. " * 6


def main() -> None:
    """Trains for a few seconds and prints what came of it."""
    torch.manual_seed(0)
    config = Config(256, width=32, depth=2, heads=2, mixers=("rat(chunk=8)", "softmax(window=16)"), conv=3)
    model = Decoder(config)
    print(f"{' + '.join(config.layers)}: {model.parameter_count():,} parameters")

    data = torch.tensor(list(TEXT.encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        starts = torch.randint(len(data) - 65, (8, 1))
        window = data[starts + torch.arange(65)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.detach():.3f}")

    start = torch.tensor([list(b"the scan ")])
    print("continued:", bytes(model.generate(start, 40)[0].tolist()).decode(errors="replace"))

    # two documents in one row give what each gives alone
    packed = model(data[None, :50], mask=Document([20, 30]))
    alone = model(data[None, 20:50])
    print("packed equals alone:", torch.allclose(packed[:, 20:], alone, atol=1e-4))


if __name__ == "__main__":
    main()
