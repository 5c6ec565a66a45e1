"""What is each part of softmax attention for? Small language models that lack one part or another.

The exponential in orders of its series, and the denominator as a norm, as a gate, or not at all. So small a model on
so short a text shows how to ask, not what the paper found.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from manyheads.common.rope import RoPE
from manyheads.mechanism.linear import Expansion, taylor_attention

TEXT = "a state of fixed size forgets, a state of every order remembers: what divides it keeps it in its place. " * 4
VARIANTS = {
    "softmax": Expansion(None, "softmax"),
    "exponential over its l2 norm": Expansion(None, "l2"),
    "exponential over the length, gated": Expansion(None, "length"),
    "orders 0 to 4 over the l2 norm": Expansion((0, 1, 2, 3, 4), "l2"),
    "orders 0 to 2 over the l2 norm": Expansion((0, 1, 2), "l2"),
    "order 1 over the l2 norm": Expansion((1,), "l2"),
    "order 1 over nothing": Expansion((1,), "none"),
}


class Layer(nn.Module):
    """One block: attention with an expansion, then two linear maps."""

    def __init__(self, width: int, heads: int, config: Expansion, gated: bool) -> None:
        super().__init__()
        self.config, self.heads, self.rope = config, heads, RoPE()
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.project, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, heads) if gated else None
        self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, N, C)`` to the same."""
        y, at = self.norms[0](x), torch.arange(x.shape[1])
        q, k, v = self.project(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        gate = None if self.gate is None else self.gate(y).sigmoid().mT
        y = taylor_attention(self.rope(q, at), self.rope(k, at), v, config=self.config, gate=gate, mask="causal")
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mix(self.norms[1](x))


def train(config: Expansion, gated: bool, *, steps: int = 40, width: int = 32) -> float:
    """Trains one model on bytes and returns its loss over the last steps, in nats a byte."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(128, width), Layer(width, 2, config, gated), nn.Linear(width, 128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data, losses = torch.tensor(list(TEXT.encode())), []
    for _ in range(steps):
        window = data[torch.randint(len(data) - 49, (8, 1)) + torch.arange(49)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


if __name__ == "__main__":
    for name, config in VARIANTS.items():
        print(f"{train(config, 'gated' in name):.3f}  {name}")
