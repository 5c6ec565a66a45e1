"""The layer of MiniMax sparse attention: steps, documents, what moves its index, its warm-up, and that it learns."""

from __future__ import annotations

import copy

import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.rope import RoPE
from manyheads.mechanism.sparse import MSAConfig
from manyheads.model import Config, Decoder
from manyheads.nn import MSA
from manyheads.nn.msa import index_loss, warm_up

F64 = torch.float64
SMALL = MSAConfig(block=4, keep=2)
INDEX = {"index_q_proj.weight", "index_k_proj.weight"}


def layer(**options):
    """A small layer in double precision."""
    torch.manual_seed(0)
    return MSA(24, 4, kv_heads=2, config=SMALL, rope=RoPE(), **options).double()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_pieces_and_steps_equal_one_call(generator, qk_norm):
    mixer, x = layer(qk_norm=qk_norm).eval(), torch.randn(2, 21, 24, generator=generator, dtype=F64)
    first, cache = mixer(x[:, :3], return_cache=True)
    second, cache = mixer(x[:, 3:15], cache=cache, return_cache=True)
    outs = [first, second]
    for t in range(15, 21):
        y, cache = mixer.step(x[:, t], cache)
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), mixer(x), rtol=1e-9, atol=1e-9)
    assert cache.index_k.shape == (2, 21, 6)


@pytest.mark.parametrize("training", [False, True])
def test_documents_do_not_see_each_other(generator, training):
    mixer, x = layer().train(training), torch.randn(1, 33, 24, generator=generator, dtype=F64)
    packed = mixer(x, mask=Document([5, 28]) & Causal())
    torch.testing.assert_close(packed, torch.cat([mixer(x[:, :5]), mixer(x[:, 5:])], 1), rtol=1e-9, atol=1e-9)


def gradients(mixer, x, loss):
    """Gradients of the parameters and of the input."""
    mixer.zero_grad()
    x = x.clone().requires_grad_()
    loss(mixer(x)).backward()
    return {name: p.grad for name, p in mixer.named_parameters()} | {"x": x.grad}


@pytest.mark.parametrize("warm", [False, True])
def test_the_divergence_moves_the_index_and_the_loss_all_else(generator, warm):
    mixer, x = layer(), torch.randn(2, 33, 24, generator=generator, dtype=F64)
    mixer.warm = warm
    small, large = (gradients(mixer, x, lambda y, f=f: f * y.square().sum()) for f in (1.0, 3.0))
    nothing = gradients(mixer, x, lambda y: 0.0 * y.sum())
    for name in small:
        if name in INDEX:
            assert small[name].any()
            torch.testing.assert_close(large[name], small[name])
            torch.testing.assert_close(nothing[name], small[name])
        else:
            torch.testing.assert_close(large[name], 3.0 * small[name])
            assert not nothing[name].any() and small[name].any(), name


def test_the_weight_of_the_divergence_scales_its_gradient(generator):
    x = torch.randn(2, 33, 24, generator=generator, dtype=F64)
    one, two = (gradients(layer(loss_weight=w), x, torch.Tensor.sum) for w in (1.0, 2.0))
    for name in INDEX:
        torch.testing.assert_close(two[name], 2.0 * one[name])
    off = layer(loss_weight=0.0)
    assert not any(gradients(off, x, torch.Tensor.sum)[name].any() for name in INDEX)


def test_the_warm_up_is_dense_attention_and_ends(generator):
    network = torch.nn.Sequential(layer(), layer())
    x = torch.randn(2, 33, 24, generator=generator, dtype=F64)
    sparse = network(x)
    assert warm_up(network) == 2 and all(m.warm for m in network)
    dense = network(x)
    every = copy.deepcopy(network)
    warm_up(every, False)
    for mixer in every:
        mixer.config = MSAConfig(block=4, keep=9)
    torch.testing.assert_close(dense, every(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(network.eval()(x), dense, rtol=1e-9, atol=1e-9)
    warm_up(network, False)
    torch.testing.assert_close(network(x), sparse, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(dense, sparse)


def test_the_divergence_is_kept_for_a_log_and_takes_no_graph_along(generator):
    network = torch.nn.Sequential(layer(), layer())
    with pytest.raises(ValueError, match="expected MSA layers that took a training step"):
        index_loss(network)
    network(torch.randn(1, 20, 24, generator=generator, dtype=F64))
    total = index_loss(copy.deepcopy(network))
    assert total > 0 and not total.requires_grad
    assert "index_loss" not in "".join(network.state_dict())


def test_without_gradients_nothing_is_learnt_or_logged(generator):
    mixer, x = layer(), torch.randn(1, 20, 24, generator=generator, dtype=F64)
    with torch.no_grad():
        first = mixer(x)
    assert mixer.index_loss is None
    torch.testing.assert_close(mixer(x), first, rtol=1e-9, atol=1e-9)


def test_an_index_finds_the_block_that_attention_looks_at():
    # attention is fixed: every query of the second half looks at one marked token; the index has to find its block
    torch.manual_seed(0)
    mixer = MSA(16, 1, index_dim=8, config=MSAConfig(block=8, keep=2))
    with torch.no_grad():
        for proj in (mixer.q_proj, mixer.k_proj):
            proj.weight.zero_()[0, 0] = 6.0

    def draw(count):
        x = torch.randn(count, 64, 16) * 0.3
        x[..., 0] = 0.0
        at = torch.randint(32, (count,))
        x[torch.arange(count), at, 0] = 8.0
        x[:, 32:, 0] = 2.0
        return x, at // 8

    def recall():
        x, block = draw(200)
        return (mixer.chosen(x)[:, 0, 48:] == block[:, None, None]).any(-1).float().mean()

    mixer.warm, before = True, recall()
    optimizer = torch.optim.Adam([p for name, p in mixer.named_parameters() if name in INDEX], 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        mixer(draw(8)[0]).sum().backward()
        optimizer.step()
    assert before < 0.5 < 0.95 < recall()


def test_the_index_adds_two_projections():
    mixer = MSA(2048, 64, kv_heads=4, head_dim=128)
    plain = 2 * 2048 * 64 * 128 + 2 * 2048 * 4 * 128
    assert sum(p.numel() for p in mixer.parameters()) == plain + 2048 * 4 * 128 + 2048 * 128


def test_a_decoder_of_them_continues_a_sequence():
    torch.manual_seed(0)
    config = Config(16, width=16, heads=2, kv_heads=1, mixers="msa(block=4, keep=2, index=6)")
    model = Decoder(config).eval()
    made = model.generate(torch.randint(16, (2, 19)), 3)
    torch.testing.assert_close(model(made[:, :-1])[:, -1].argmax(-1), made[:, -1])
    assert model.layers[0].mixer.index_dim == 6


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="index_dim: expected at least 1"):
        MSA(24, 4, index_dim=0)
    with pytest.raises(ValueError, match="loss_weight: expected a number >= 0"):
        MSA(24, 4, loss_weight=-1.0)
