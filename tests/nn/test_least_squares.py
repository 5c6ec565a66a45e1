"""The least-squares layer: steps equal one call, documents stay apart, and one layer recalls."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.nn.least_squares import LeastSquares


@pytest.fixture
def layer(generator):
    torch.manual_seed(0)
    return LeastSquares(12, 3).double()


def test_steps_equal_one_call(layer, generator):
    x = torch.randn(2, 11, 12, generator=generator, dtype=torch.float64)
    want = layer(x)
    cache, rows = None, []
    for t in range(11):
        row, cache = layer.step(x[:, t], cache)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, 1), want)


def test_pieces_that_carry_the_cache_equal_one_call(layer, generator):
    x = torch.randn(2, 11, 12, generator=generator, dtype=torch.float64)
    first, cache = layer(x[:, :4], return_cache=True)
    torch.testing.assert_close(torch.cat([first, layer(x[:, 4:], cache=cache)], 1), layer(x))


def test_documents_stay_apart(layer, generator):
    x = torch.randn(2, 11, 12, generator=generator, dtype=torch.float64)
    packed = layer(x, mask=Document([5, 6]) & Causal())
    torch.testing.assert_close(packed, torch.cat([layer(x[:, :5]), layer(x[:, 5:])], 1))


def test_parameters_are_those_of_the_docs():
    count = {name: sum(p.numel() for p in LeastSquares(32, 4, **options).parameters()) for name, options in
             {"plain": {"conv": 0}, "conv": {}, "no decay": {"conv": 0, "forget": False}}.items()}  # fmt: skip
    assert count["plain"] == 4 * 32**2 + 2 * 4 + 8
    assert count["conv"] == count["plain"] + 3 * 32 * 4
    assert count["no decay"] == count["plain"] - 4


def test_gradients_reach_every_parameter(layer, generator):
    layer(torch.randn(2, 11, 12, generator=generator, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_a_convolution_that_shifts_keys_makes_one_layer_recall_what_followed(generator):
    d, pairs = 24, 5
    layer = LeastSquares(d, 1, conv=2, activation="none", ridge=1e-6, forget=False).double()
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            projection.weight.copy_(torch.eye(d))
        for conv, now in zip(layer.convs, (1.0, 0.0, 1.0), strict=True):  # only keys come from the token before
            conv.weight.copy_(torch.tensor([1.0 - now, now]).expand(d, 2))
    table = torch.nn.functional.normalize(0.5 + torch.randn(30, d, generator=generator, dtype=torch.float64), dim=-1)
    tokens = torch.randperm(30, generator=generator)[: 2 * pairs].view(pairs, 2)
    asked = torch.randperm(pairs, generator=generator)
    x = table[torch.cat([tokens.flatten(), tokens[asked, 0]])][None]
    answers = (layer(x)[0, 2 * pairs :] @ table.T).argmax(-1)
    assert answers.tolist() == tokens[asked, 1].tolist()


def test_wrong_input_is_named(layer):
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of num_heads=5"):
        LeastSquares(12, 5)
    with pytest.raises(ValueError, match="ridge: expected a positive number"):
        LeastSquares(12, 3, ridge=0.0)
    with pytest.raises(ValueError, match="conv: expected a number of tokens"):
        LeastSquares(12, 3, conv=-1)
    with pytest.raises(ValueError, match=r"x: expected tokens \(B, N, C=12\)"):
        layer(torch.zeros(2, 3, 11))
    with pytest.raises(UnsupportedError, match="does not support mask"):
        layer(torch.zeros(2, 3, 12, dtype=torch.float64), mask="window(2)")
