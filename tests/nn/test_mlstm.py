"""The mLSTM layer: it steps, packs, has the published size and computes what the published layer computes."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document
from manyheads.nn import MLSTM
from manyheads.nn.mlstm import HeadNorm


def count(module):
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def opened(layer):
    """A layer whose input gates let something through."""
    torch.nn.init.normal_(layer.i_proj.bias)
    torch.nn.init.normal_(layer.norm.weight)
    return layer


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_steps_equal_one_call(generator, gate):
    torch.manual_seed(0)
    layer = opened(MLSTM(24, 3, gate=gate, v_factor=1.5)).double()
    x = torch.randn(2, 11, 24, generator=generator, dtype=torch.float64)
    whole = layer(x)
    some, cache = layer(x[:, :4], return_cache=True)
    outs = [some]
    for t in range(4, 11):
        y, cache = layer.step(x[:, t], cache)
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-9)


def test_documents_do_not_see_each_other(generator):
    layer = opened(MLSTM(16, 2)).double()
    x = torch.randn(1, 12, 16, generator=generator, dtype=torch.float64)
    packed = layer(x, mask=Document([5, 7]) & Causal())
    torch.testing.assert_close(packed, torch.cat([layer(x[:, :5]), layer(x[:, 5:])], 1), rtol=1e-9, atol=1e-9)


def test_gates_are_capped_and_start_as_published():
    layer = MLSTM(16, 4)
    assert torch.equal(layer.f_proj.bias, torch.linspace(3.0, 6.0, 4)) and (layer.i_proj.bias == -10).all()
    i, f = layer._gates(1000 * torch.randn(2, 16))
    assert i.abs().max() <= 15 and f.abs().max() <= 15 and f.abs().max() > 14


def test_parameters_add_up_to_the_published_model():
    with torch.device("meta"):
        layer = MLSTM(4096, 8)
    assert count(layer) == 2 * 4096 * 2048 + 3 * 4096**2 + 2 * (4096 * 8 + 8) + 4096 == 67_178_512
    ffn, norms = 3 * 4096 * 10_944, 2 * 4096
    assert 32 * (count(layer) + ffn + norms) + 2 * 50_304 * 4096 + 4096 == 6_865_424_896


def test_computes_what_the_published_layer_computes(generator):
    module = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if module.external_xlstm:
        pytest.skip("transformers delegates to the xlstm package")
    config = module.xLSTMConfig(
        hidden_size=32, num_heads=4, num_hidden_layers=1, vocab_size=8, chunk_size=16, mode="inference",
        return_last_states=True, autocast_kernel_dtype="float32",
    )  # fmt: skip
    torch.manual_seed(1)
    theirs, mine = module.xLSTMLayer(config), opened(MLSTM(32, 4))
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "ogate_preact": "o_proj", "igate_preact": "i_proj",
             "fgate_preact": "f_proj", "multihead_norm": "norm", "out_proj": "out_proj"}  # fmt: skip
    for other, name in names.items():
        getattr(theirs, other).load_state_dict(getattr(mine, name).state_dict())
    assert count(theirs) == count(mine)
    x = torch.randn(2, 48, 32, generator=generator)
    torch.testing.assert_close(mine(x), theirs(x)[0], rtol=1e-4, atol=1e-5)


def test_head_norm_is_a_norm_of_each_head(generator):
    x = torch.randn(2, 5, 3, 8, generator=generator)
    want = torch.nn.functional.layer_norm(x, (8,), eps=1e-6).flatten(-2)
    torch.testing.assert_close(HeadNorm(3, 8)(x), want)
    rms = torch.nn.functional.rms_norm(x, (8,), eps=1e-6).flatten(-2)
    torch.testing.assert_close(HeadNorm(3, 8, centre=False)(x), rms)


def test_half_precision_and_gradients():
    layer = opened(MLSTM(16, 2)).bfloat16()
    y = layer(torch.randn(1, 9, 16, dtype=torch.bfloat16))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_wrong_input_is_named():
    layer = MLSTM(16, 2)
    with pytest.raises(ValueError, match=r"x: expected tokens \(B, N, C=16\), got shape \(2, 16\)"):
        layer(torch.ones(2, 16))
    with pytest.raises(ValueError, match=r"x: expected one token \(B, C=16\)"):
        layer.step(torch.ones(2, 1, 16))
    with pytest.raises(TypeError, match="x: expected tokens .* got torch.int64"):
        layer(torch.ones(2, 3, 16).long())
    with pytest.raises(ValueError, match="qk_factor: gives a width of 8, which num_heads=3"):
        MLSTM(16, 3)
    with pytest.raises(ValueError, match="gate_cap: expected a positive number"):
        MLSTM(16, 2, gate_cap=0)
