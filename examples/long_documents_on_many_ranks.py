"""Trains a small decoder on packed documents that span several processes; saves, and goes on where it stopped.

On CPUs: torchrun --nproc-per-node 2 examples/long_documents_on_many_ranks.py run.pt 20
The same line again with more steps resumes. Without torchrun and a file it runs a few steps in one process.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import manyheads as mh
import manyheads.parallel as parallel
from manyheads.common.rope import RoPE
from manyheads.mask.sampling import document_lengths
from manyheads.nn import Attention

TOKENS, VOCABULARY, WIDTH = 512, 32, 64

class Decoder(nn.Module):
    """Two layers of attention, over whatever tokens this rank holds."""

    def __init__(self) -> None:
        """Draws the weights."""
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleList(Attention(WIDTH, 4, batch_first=True, rope=RoPE()) for _ in range(2))

    def forward(self, ids: torch.Tensor, mask: mh.Mask) -> torch.Tensor:
        """Logits of this rank's tokens."""
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (WIDTH,)), mask=mask, need_weights=False)[0]
        return self.head(x)


def packed(step: int) -> tuple[torch.Tensor, list[int]]:
    """Documents of 20 to 300 tokens, each of which counts on from a number of its own."""
    lengths, generator = document_lengths(TOKENS, {(20, 300): 1.0}, seed=step), torch.Generator().manual_seed(step)
    starts = torch.randint(VOCABULARY, (len(lengths),), generator=generator).tolist()
    return torch.cat([torch.arange(a, a + n) % VOCABULARY for a, n in zip(starts, lengths, strict=True)])[None], lengths


def main(file: str = "", steps: str = "6") -> None:
    """Trains until ``steps``, and says how the loss of the whole sequence falls."""
    torch.manual_seed(0)
    model, begin = Decoder(), 0
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)  # imports what would hold the group
    alone = {"init_method": f"file://{tempfile.mktemp()}", "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **({} if "RANK" in os.environ else alone))
    if file and Path(file).exists():
        begin, weights, moments = torch.load(file)
        model.load_state_dict(weights)
        optimiser.load_state_dict(moments)
    for step in range(begin, int(steps)):
        ids, lengths = packed(step)
        mask = mh.Causal() & mh.Document(lengths)
        with parallel.context(dist.group.WORLD, scheme="ring", shard="balanced", mask=mask):
            own, labels = parallel.shard(ids, parallel.next_tokens(ids, lengths=lengths))
            loss = parallel.token_loss(model(own, mask), labels)
        optimiser.zero_grad()
        loss.backward()
        for shared in (total := loss.detach().clone(), *(weight.grad for weight in model.parameters())):
            dist.all_reduce(shared)  # each rank has its share
        optimiser.step()
        print(f"step {step}: loss {total:.5f}") if dist.get_rank() == 0 else None
    if file and dist.get_rank() == 0:
        torch.save((int(steps), model.state_dict(), optimiser.state_dict()), file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:] if "RANK" in os.environ else ())
