"""Trains a small decoder that reads chosen blocks of its text: densely while its index learns, then sparsely.

The first layer chooses blocks by a learned index (MSA), the second by compressed windows (NSA).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from manyheads import Document
from manyheads.mechanism.select import Warmup
from manyheads.mechanism.sparse import MSAConfig, msa
from manyheads.mechanism.sparse.msa import selection
from manyheads.model import Config, Decoder
from manyheads.nn.msa import index_loss, warm_up

TEXT = "what the index scores, the query reads; what no index scores, nobody reads. the window sees what is near. " * 8


def main() -> None:
    """Trains for a few seconds and prints what came of it."""
    torch.manual_seed(0)
    mixers = ("msa(block=8, keep=4)", "nsa(kernel=8, stride=4, block=8, keep=4, local=1, window=16)")
    model = Decoder(Config(128, width=32, heads=4, kv_heads=2, mixers=mixers, conv=3))
    print(f"{' + '.join(model.config.layers)}: {model.parameter_count():,} parameters")

    data = torch.tensor(list(TEXT.encode()))
    optimizer, schedule = torch.optim.AdamW(model.parameters(), lr=5e-3), Warmup(dense=30)
    for step in range(60):
        warm_up(model, schedule.is_dense(step))
        starts = torch.randint(len(data) - 129, (4, 1))
        window = data[starts + torch.arange(129)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # the index adds its own gradient here, and gets no other
        optimizer.step()
        if step % 15 == 14:
            phase = "dense" if schedule.is_dense(step) else "sparse"
            print(f"step {step + 1}, {phase}: loss {loss.detach():.3f}, index off by {index_loss(model):.4f}")

    start = torch.tensor([list(b"what the index ")])
    print("continued:", bytes(model.eval().generate(start, 40)[0].tolist()).decode(errors="replace"))

    # two documents in one row give what each gives alone: blocks and windows begin anew
    packed = model(data[None, :90], mask=Document([30, 60]))
    alone = model(data[None, 30:90])
    print("packed equals alone:", torch.allclose(packed[:, 30:], alone, atol=1e-4))

    # the mechanism by itself, on longer input, and what it visits
    q, k, v = (torch.randn(1, heads, 4096, 32) for heads in (8, 2, 2))
    index = {"index_q": torch.randn(1, 2, 4096, 16), "index_k": torch.randn(1, 4096, 16)}
    config = MSAConfig(block=64, keep=6)
    with torch.no_grad():
        out = msa(q, k, v, **index, config=config)
        layout = selection(q, k, v, **index, config=config)
    share = layout.pairs / (8 * 4096 * 4097 / 2)
    print(f"{tuple(out.shape)}: {share:.0%} of the causal pairs, {layout}")


if __name__ == "__main__":
    main()
