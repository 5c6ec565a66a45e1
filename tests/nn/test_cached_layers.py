"""The layers of local linear attention and of Parallax: sizes, caches, windows, names."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.rope import RoPE
from manyheads.engine.solve import Solver
from manyheads.mechanism.regression import local_linear_attention, parallax
from manyheads.nn import LocalLinearAttention, Parallax

LAYERS = {"lla": LocalLinearAttention, "parallax": Parallax}
OPTIONS = {
    "plain": {},
    "grouped": {"kv_heads": 2, "head_dim": 10, "bias": True, "qk_norm": True},
    "rotated": {"rope": RoPE(), "kv_heads": 1},
    "window": {"window": 4, "rope": RoPE()},
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def kind(request):
    """One kind of layer."""
    return request.param


def built(kind, **options):
    """A layer in float64 with fixed weights."""
    torch.manual_seed(0)
    return kind(24, 4, **options).double()


def tokens(batch=2, n=11):
    """Tokens in float64."""
    return torch.randn(batch, n, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_steps_and_chunks_equal_one_call(kind, options):
    layer, x = built(kind, **options), tokens()
    y = layer(x)
    first, cache = layer(x[:, :5], return_cache=True)
    middle, cache = layer(x[:, 5:8], cache=cache, return_cache=True)
    outs = [first, middle]
    for t in range(8, 11):
        out, cache = layer.step(x[:, t], cache)
        outs.append(out[:, None])
    torch.testing.assert_close(torch.cat(outs, dim=1), y, rtol=1e-6, atol=1e-6)
    assert cache.seen == 11 and cache.k.shape[2] == (3 if "window" in options else 11)


def test_later_tokens_change_nothing_before(kind):
    layer, x = built(kind), tokens()
    y = layer(x)
    x[:, 7:] += 1.0
    torch.testing.assert_close(layer(x)[:, :7], y[:, :7])


def test_packed_documents_equal_a_loop(kind):
    layer, x = built(kind, rope=RoPE()), tokens(batch=1)
    packed = layer(x, mask=Document([4, 7]) & Causal())
    torch.testing.assert_close(packed, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], dim=1), rtol=1e-7, atol=1e-7)


def test_padding_on_the_left_is_a_shorter_sequence(kind):
    layer, x = built(kind, rope=RoPE()), tokens()
    real = torch.arange(11)[None] >= torch.tensor([0, 3])[:, None]
    x[1, :3] = 5.0
    padded = layer(x, key_padding=real)
    torch.testing.assert_close(padded[1:, 3:], layer(x[1:, 3:]), rtol=1e-7, atol=1e-7)


def test_every_parameter_learns(kind):
    layer = built(kind, kv_heads=2, bias=True, qk_norm=True)
    layer(tokens()).square().sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in layer.parameters())


def test_parameters_are_those_of_attention_and_one_projection_more():
    count = sum(p.numel() for p in Parallax(64, 4, kv_heads=2).parameters())
    assert count == 3 * 64 * 64 + 2 * 64 * 32  # q, r and o; k and v
    assert sum(p.numel() for p in LocalLinearAttention(64, 4, qk_norm=False).parameters()) == 4 * 64 * 64 + 4
    wide = Parallax(64, 4, head_dim=32)
    attention = 4 * 64 * 128
    assert sum(p.numel() for p in wide.parameters()) - attention == 64 * 4 * 32


def test_the_layer_computes_what_its_mechanism_does():
    layer, x = built(Parallax), tokens()

    def heads(name, n=4):
        return getattr(layer, f"{name}_proj")(x).unflatten(-1, (n, -1)).transpose(1, 2)

    out = parallax(heads("q"), heads("k"), heads("v"), r=heads("r"), mask="causal")
    torch.testing.assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)))
    layer = built(LocalLinearAttention, qk_norm=False, ridge=0.25, solver=Solver("direct"))
    ridge = torch.full((4,), 0.25, dtype=torch.float64)
    out = local_linear_attention(heads("q"), heads("k"), heads("v"), ridge=ridge, mask="causal")
    torch.testing.assert_close(layer(x), layer.o_proj(out.transpose(1, 2).flatten(2)), rtol=1e-6, atol=1e-6)


def test_state_dicts_go_to_flash_linear_attention_and_back():
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fla.layers.parallax import Parallax as Theirs
    ours = Parallax(64, 4, kv_heads=2, bias=True, qk_norm=True, rope=RoPE())
    theirs = Theirs(hidden_size=64, num_heads=4, num_kv_heads=2, qkv_bias=True, qk_norm=True)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "embed_dim: expected a multiple of num_heads=5"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor of num_heads=4"),
        ({"head_dim": 0}, "head_dim: expected at least 1"),
        ({"window": 0}, "window: expected at least 1 key"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**({"embed_dim": 24, "num_heads": 4} | options))


def test_wrong_input_is_named(kind):
    layer = kind(24, 4)
    with pytest.raises(ValueError, match=r"x: expected tokens \(B, N, C=24\)"):
        layer(torch.ones(2, 3, 8))
    with pytest.raises(ValueError, match=r"x: expected one token"):
        layer.step(torch.ones(2, 3, 24))
    with pytest.raises(ValueError, match="key_padding: has no meaning beside a cache"):
        layer(torch.ones(2, 3, 24), key_padding=torch.ones(2, 3, dtype=torch.bool), return_cache=True)
    with pytest.raises(ValueError, match="ridge: expected a positive number"):
        LocalLinearAttention(24, 4, ridge=0.0)
