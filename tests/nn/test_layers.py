"""What every layer in place of attention promises: one graph, autocast, state dicts, no tokens from the future."""

from __future__ import annotations

import copy

import pytest
import torch

from manyheads.common import scopes
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.linear.natsl import NATSConfig
from manyheads.nn import MLSTM, NATSL, RAT, GatedDeltaNet

LAYERS = {
    "mlstm": lambda: MLSTM(24, 2),
    "mlstm-sigmoid": lambda: MLSTM(24, 2, gate="sigmoid"),
    "gated-delta": lambda: GatedDeltaNet(24, 2, head_dim=4),
    "rat": lambda: RAT(24, 2, chunk=4),
    "natsl": lambda: NATSL(24, 2, head_dim=4, config=NATSConfig(chunk=8, split=2)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    """A layer whose gates let something through."""
    torch.manual_seed(0)
    made = LAYERS[request.param]()
    if isinstance(made, MLSTM):
        torch.nn.init.zeros_(made.i_proj.bias)
    return made


def test_compiles_to_one_graph_with_gradients(layer, generator):
    x = torch.randn(2, 19, 24, generator=generator)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    weights = list(layer.parameters())
    grads = []
    for form in (compiled, layer):
        y = form(x)
        grads.append((y, *torch.autograd.grad(y.square().sum(), weights, allow_unused=True)))
    for got, want in zip(*grads, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_autocast_is_close_and_steps_agree_with_it(layer, generator):
    x = torch.randn(2, 11, 24, generator=generator)
    with torch.no_grad():
        plain = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            outs, cache = [], None
            for t in range(11):
                out, cache = layer.step(x[:, t], cache)
                outs.append(out)
    size = plain.abs().max()
    assert (y.float() - plain).abs().max() < 0.1 * size
    assert (torch.stack(outs, 1).float() - plain).abs().max() < 0.1 * size


def test_a_copy_computes_the_same(layer, generator):
    x = torch.randn(1, 9, 24, generator=generator)
    other = copy.deepcopy(layer)
    for p in other.parameters():
        torch.nn.init.zeros_(p)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_the_future_does_not_reach_the_past(layer, generator):
    x = torch.randn(1, 21, 24, generator=generator, dtype=torch.float64)
    other = torch.cat([x[:, :10], x[:, 10:].flip(1)], 1)
    layer = layer.double()
    torch.testing.assert_close(layer(x)[:, :10], layer(other)[:, :10], rtol=1e-9, atol=1e-9)
    assert (layer(x)[:, 20] != layer(other)[:, 20]).any()


def test_shards_of_tokens_are_refused_inside_a_parallel_context(layer, monkeypatch):
    monkeypatch.setattr(scopes, "active", [object()])
    with pytest.raises(UnsupportedError, match="inside a parallel context"):
        layer(torch.zeros(1, 12, 24))


def test_a_pass_without_tokens_gives_none(layer):
    y, cache = layer(torch.zeros(2, 0, 24), return_cache=True)
    assert y.shape == (2, 0, 24)
    one, _ = layer.step(torch.ones(2, 24), cache)
    torch.testing.assert_close(one, layer(torch.ones(2, 1, 24))[:, 0], rtol=1e-4, atol=1e-5)
