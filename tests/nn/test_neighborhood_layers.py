"""Layers of neighbourhood attention: names, shapes, and what they compute."""

from __future__ import annotations

import pytest
import torch

from manyheads.mechanism.sparse import neighborhood_attention
from manyheads.nn import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

LAYERS = [(NeighborhoodAttention1D, (13,)), (NeighborhoodAttention2D, (5, 8)), (NeighborhoodAttention3D, (4, 3, 5))]


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_a_layer_is_projections_around_the_mechanism(kind, shape, generator):
    layer = kind(24, 3, 3, is_causal=(True,) + (False,) * (len(shape) - 1), qk_scale=0.5).double()
    x = torch.randn(2, *shape, 24, generator=generator, dtype=torch.float64)
    q, k, v = layer.qkv(x).flatten(1, -2).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    causal = (True,) + (False,) * (len(shape) - 1)
    out = neighborhood_attention(q, k, v, shape=shape, window=3, causal=causal, scale=0.5)
    want = layer.proj(out.transpose(1, 2).flatten(-2)).view_as(x)
    torch.testing.assert_close(layer(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_the_state_dict_has_the_published_names_and_sizes(kind, shape):
    plain = {name: tuple(t.shape) for name, t in kind(24, 3, 3).state_dict().items()}
    assert plain == {
        "qkv.weight": (72, 24), "qkv.bias": (72,), "proj.weight": (24, 24), "proj.bias": (24,),
    }  # fmt: skip
    assert "qkv.bias" not in kind(24, 3, 3, qkv_bias=False).state_dict()
    assert kind(24, 3, 3, rel_pos_bias=True).state_dict()["rpb"].shape == (3, *(5,) * len(shape))


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_a_bias_of_zero_changes_nothing_and_learns(kind, shape, generator):
    layer, plain = kind(16, 2, 3, rel_pos_bias=True), kind(16, 2, 3)
    plain.load_state_dict({name: t for name, t in layer.state_dict().items() if name != "rpb"})
    x = torch.randn(1, *shape, 16, generator=generator)
    torch.nn.init.zeros_(layer.rpb)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert layer.rpb.grad.abs().sum() > 0


def test_half_precision_and_gradients():
    layer = NeighborhoodAttention2D(16, 2, (3, 5), stride=(1, 2), dilation=(2, 1)).bfloat16()
    y = layer(torch.randn(2, 6, 7, 16, dtype=torch.bfloat16))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_wrong_input_is_named():
    layer = NeighborhoodAttention2D(16, 2, 5)
    with pytest.raises(ValueError, match=r"x: expected \(B, X, Y, C=16\), got shape \(1, 8, 16\)"):
        layer(torch.ones(1, 8, 16))
    with pytest.raises(ValueError, match=r"window \* dilation: expected at most the grid \(4, 8\)"):
        layer(torch.ones(1, 4, 8, 16))
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of num_heads=3"):
        NeighborhoodAttention1D(16, 3, 5)
    with pytest.raises(ValueError, match="window: expected at least 2"):
        NeighborhoodAttention3D(16, 2, (3, 3, 1))
    with pytest.raises(ValueError, match="window: expected an int or 2 of them"):
        NeighborhoodAttention2D(16, 2, (3, 3, 3))
