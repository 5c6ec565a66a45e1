"""The layer of DeepSeek Sparse Attention: dense it is latent attention, and the divergence moves its indexer alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.sparse import HISA, MISA
from manyheads.mechanism.sparse.indexer import Flat
from manyheads.nn.dsa import DSA, DSAConfig

SIZES = DSAConfig(20, 12, 8, 4, 6, index_heads=4, index_dim=10, keep=7)
METHODS = {
    "flat": Flat(),
    "hisa": HISA(block=4, blocks=3, flat_below=0),
    "misa": MISA(heads=2, block=4, rerank=9, flat_below=0),
}


def layer_of(method=None, *, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = dataclasses.replace(SIZES, **changes)
    return DSA(32, 3, config=config, indexer=Flat() if method is None else method).to(dtype)


def tokens(n=50, batch=2, dtype=torch.float64):
    return torch.randn(batch, n, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)


def latent_attention(layer, x):
    """Keys and values of every head, spelt out, and a softmax over all earlier tokens."""
    config, at = layer.config, torch.arange(x.shape[1])
    q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x))).unflatten(-1, (3, -1)).transpose(1, 2)
    given, shared = layer.kv_a_proj_with_mqa(x).split([config.latent_dim, config.rope_dim], -1)
    both = layer.kv_b_proj(layer.kv_a_layernorm(given)).unflatten(-1, (3, -1)).transpose(1, 2)
    k, v = both.split([config.nope_dim, config.value_dim], -1)
    turned = layer.rope(q[..., config.nope_dim :], at)
    q = torch.cat([q[..., : config.nope_dim], turned], -1)
    k = torch.cat([k, layer.rope(shared[:, None], at).expand(-1, 3, -1, -1)], -1)
    scores = (q @ k.mT * layer.scale).masked_fill(torch.ones(len(at), len(at)).triu(1).bool(), -torch.inf)
    return layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_keeping_every_token_is_latent_attention_with_its_gradients():
    layer, x = layer_of(keep=50).eval(), tokens()
    names = [n for n, _ in layer.named_parameters() if not n.startswith("indexer")]
    found = []
    for out in (layer(x), latent_attention(layer, x)):
        grads = torch.autograd.grad(out.sin().sum(), [layer.get_parameter(n) for n in names])
        found.append([out.detach(), *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_warming_up_attention_is_dense():
    layer, x = layer_of(), tokens()
    layer.warm = True
    torch.testing.assert_close(layer(x), latent_attention(layer, x), rtol=1e-9, atol=1e-10)
    dense = layer.index_loss
    layer.warm = False
    layer(x)
    assert dense > 0 and layer.index_loss > 0 and dense != layer.index_loss


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_packed_documents_equal_a_loop_over_them(method):
    layer, x, lens = layer_of(method).eval(), tokens(batch=1), [20, 1, 0, 29]
    packed = layer(x, mask=Document(lens) & Causal())
    looped = torch.cat([layer(part) for part in x.split(lens, 1) if part.shape[1]], 1)
    torch.testing.assert_close(packed, looped, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_pieces_and_steps_with_a_cache_equal_one_call(method):
    layer, x = layer_of(method).eval(), tokens()
    with torch.no_grad():
        whole, parts, cache = layer(x), [], None
        for part in x.split([17, 1, 1, 25, 6], 1):
            out, cache = layer(part, cache=cache, return_cache=True)
            parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)
    assert cache.latent.shape == (2, 1, 50, 16) and len(cache.pooled) == 50


@pytest.mark.parametrize("warm", [False, True])
def test_the_divergence_moves_the_indexer_and_nothing_else(warm):
    x, found = tokens(), {}
    for weight in (0.0, 1.0):
        layer = layer_of()
        layer.loss_weight, layer.warm = weight, warm
        layer(x).sin().sum().backward()
        found[weight] = {n: p.grad for n, p in layer.named_parameters()}
    for name in found[0.0]:
        without, given = found[0.0][name], found[1.0][name]
        if name.startswith("indexer"):
            assert (without == 0).all() and given.norm() > 0, name
        else:
            assert torch.equal(without, given), name


def test_an_input_takes_no_gradient_through_the_indexer():
    grads = []
    for weight in (0.0, 1.0):
        layer, x = layer_of(), tokens().requires_grad_()
        layer.loss_weight = weight
        layer(x).sin().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_training_the_indexer_lowers_its_divergence_and_raises_the_kept_mass():
    layer, x = layer_of(dtype=torch.float32, keep=6), 2 * tokens(dtype=torch.float32)
    with torch.no_grad():
        layer.q_b_proj.weight.mul_(4)  # attention worth following
    layer.warm = True
    at = torch.arange(50)

    @torch.no_grad()
    def kept():
        q, latent, _ = layer._inputs(x, None)
        weights = (q @ latent.mT * layer.scale).masked_fill(at > at[:, None], -torch.inf).softmax(-1).mean(1)
        ids = layer.chosen(x)[:, 0].long()
        return float((weights.gather(2, ids.clamp(min=0)) * (ids >= 0))[:, 10:].sum(-1).mean())

    before, losses = kept(), []
    optimiser = torch.optim.Adam(layer.indexer.parameters(), lr=0.01)
    for _ in range(60):
        optimiser.zero_grad()
        layer(x).sum().backward()
        optimiser.step()
        losses.append(float(layer.index_loss))
    assert losses[-1] < 0.5 * losses[0]
    assert kept() > before + 0.1


def test_learning_stops_in_evaluation_and_without_gradients():
    layer, x = layer_of(), tokens()
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert layer.index_loss is None


def test_default_sizes_are_those_of_the_released_model():
    with torch.device("meta"):
        layer = DSA(7168, 128)
    count = {n: p.numel() for n, p in layer.named_parameters()}
    assert count["kv_a_proj_with_mqa.weight"] == 7168 * 576
    assert count["q_b_proj.weight"] == 1536 * 128 * 192 and count["kv_b_proj.weight"] == 512 * 128 * 256
    assert sum(n for name, n in count.items() if name.startswith("indexer.")) == 1536 * 64 * 128 + 7168 * 192 + 2 * 128


WRONG = {
    "rope": ({"rope_dim": 3}, "rope_dim: expected an even width"),
    "rope-wide": ({"rope_dim": 12}, "rope_dim"),
    "keep": ({"keep": 0}, "keep: expected a positive integer"),
    "heads": ({"index_heads": True}, "index_heads"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_wrong_sizes_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SIZES, **change)


def test_wrong_layers_and_inputs_are_refused_by_name():
    with pytest.raises(ValueError, match="keep: expected at most the tokens of the candidate blocks"):
        layer_of(HISA(block=2, blocks=3))
    with pytest.raises(ValueError, match="embed_dim"):
        DSA(32, 0, config=SIZES)
    layer, x = layer_of(), tokens()
    _, cache = layer(x, return_cache=True)
    with pytest.raises(UnsupportedError, match="cache: it holds one document"):
        layer(x, mask=Document([20, 30]) & Causal(), cache=cache)
    with pytest.raises(UnsupportedError, match="dsa does not support noncausal_self"):
        layer(x, mask="full")
    assert len(cache.pooled) == 50  # a call that is refused adds nothing
    with pytest.raises(ValueError, match="loss_weight"):
        DSA(32, 2, config=SIZES, loss_weight=-1.0)
    with pytest.raises(ValueError, match=r"x: expected tokens \(B, N, C=32\)"):
        layer_of()(torch.ones(2, 5, 31, dtype=torch.float64))
