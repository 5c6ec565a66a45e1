"""The RAT layer: steps, documents, initial gates, what every parameter is for."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document
from manyheads.nn import RAT

F64 = torch.float64


@pytest.mark.parametrize("options", [{"chunk": 4}, {"chunk": 1}, {"chunk": 5, "whole": True, "rope": None}])
def test_pieces_and_steps_equal_one_call(generator, options):
    layer = RAT(24, 4, **options).double()
    x = torch.randn(2, 13, 24, generator=generator, dtype=F64)
    first, cache = layer(x[:, :3], return_cache=True)
    second, cache = layer(x[:, 3:8], cache=cache, return_cache=True)
    outs = [first, second]
    for t in range(8, 13):
        y, cache = layer.step(x[:, t], cache)
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), rtol=1e-9, atol=1e-9)


def test_documents_do_not_see_each_other(generator):
    layer = RAT(16, 2, chunk=4).double()
    x = torch.randn(1, 12, 16, generator=generator, dtype=F64)
    packed = layer(x, mask=Document([5, 7]) & Causal())
    torch.testing.assert_close(packed, torch.cat([layer(x[:, :5]), layer(x[:, 5:])], 1), rtol=1e-9, atol=1e-9)


def test_the_published_layer_adds_its_input(generator):
    layer = RAT(16, 2, chunk=4, whole=True)
    torch.nn.init.zeros_(layer.out_proj.weight)
    x = torch.randn(1, 5, 16, generator=generator)
    assert torch.equal(layer(x), x)


def test_gates_start_between_one_token_and_a_chunk():
    odds = RAT(512, 2, chunk=16).gate_bias.exp()
    assert odds.min() >= 1 - 1e-6 and odds.max() <= 15 + 1e-4 and odds.std() > 3
    assert RAT(8, 2, chunk=1).gate_bias.sigmoid().max() < 1e-4


def test_half_precision_and_gradients():
    layer = RAT(16, 2, chunk=4, whole=True).bfloat16()
    y = layer(torch.randn(1, 9, 16, dtype=torch.bfloat16))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"x: expected tokens \(B, N, C=16\)"):
        RAT(16, 2)(torch.ones(1, 4, 8))
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of num_heads=3"):
        RAT(16, 3)
    with pytest.raises(ValueError, match="groups: expected a divisor of num_heads=4, got 3"):
        RAT(16, 4, groups=3)
    with pytest.raises(ValueError, match="chunk: expected a positive number"):
        RAT(16, 4, chunk=0)
