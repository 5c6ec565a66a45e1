"""The layer of Gated DeltaNet: steps, documents, size, and independent code for what it computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from manyheads import Causal, Document
from manyheads.nn import GatedDeltaNet

F64 = torch.float64


@pytest.mark.parametrize("options", [{}, {"conv": 0, "gate": False}, {"negative": True, "expand_v": 1.5}])
def test_steps_and_pieces_equal_one_call(generator, options):
    torch.manual_seed(0)
    layer = GatedDeltaNet(16, 2, **options).double()
    x = torch.randn(2, 13, 16, generator=generator, dtype=F64)
    first, cache = layer(x[:, :2], return_cache=True)
    second, cache = layer(x[:, 2:8], cache=cache, return_cache=True)
    outs = [first, second]
    for t in range(8, 13):
        y, cache = layer.step(x[:, t], cache)
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), layer(x), rtol=1e-9, atol=1e-9)


def test_documents_do_not_see_each_other(generator):
    layer = GatedDeltaNet(16, 2).double()
    x = torch.randn(1, 12, 16, generator=generator, dtype=F64)
    packed = layer(x, mask=Document([5, 7]) & Causal())
    torch.testing.assert_close(packed, torch.cat([layer(x[:, :5]), layer(x[:, 5:])], 1), rtol=1e-9, atol=1e-9)


def test_large_projections_have_six_times_the_square_of_the_width():
    with torch.device("meta"):
        layer = GatedDeltaNet(1024, 6, head_dim=128)
    large = [getattr(layer, f"{name}_proj").weight.numel() for name in "qkvgo"]
    assert large == [round(f * 1024**2) for f in (0.75, 0.75, 1.5, 1.5, 1.5)]
    rest = 2 * 6 * 1024 + 2 * 6 + 4 * (768 + 768 + 1536) + 256
    assert sum(p.numel() for p in layer.parameters()) == 6 * 1024**2 + rest


def test_computes_what_its_parts_compute_elsewhere(generator):
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    torch.manual_seed(0)
    layer = GatedDeltaNet(24, 3, head_dim=4)
    torch.nn.init.normal_(layer.norm_weight)
    x = torch.randn(2, 21, 24, generator=generator)
    parts = []
    for proj, conv in zip((layer.q_proj, layer.k_proj, layer.v_proj), layer.convs, strict=True):
        padded = F.pad(proj(x).mT, (3, 0))
        parts.append(F.silu(F.conv1d(padded, conv.weight[:, None], groups=conv.width)).mT.unflatten(-1, (3, -1)))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in parts[:2])
    decay = -layer.log_rate.exp() * F.softplus(layer.a_proj(x) + layer.decay_bias)
    o, _ = naive.naive_recurrent_gated_delta_rule(q, k, parts[2], layer.b_proj(x).sigmoid(), decay)
    normed = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * layer.norm_weight
    want = layer.o_proj(normed.flatten(-2) * F.silu(layer.g_proj(x)))
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-6)


def test_every_parameter_learns():
    layer = GatedDeltaNet(16, 2)
    layer(torch.randn(1, 9, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"x: expected tokens \(B, N, C=16\)"):
        GatedDeltaNet(16, 2)(torch.ones(1, 4, 8))
    with pytest.raises(ValueError, match="expand_v: gives values of width 4.5"):
        GatedDeltaNet(16, 2, head_dim=3, expand_v=1.5)
    with pytest.raises(ValueError, match="num_heads: expected at least 1"):
        GatedDeltaNet(16, 0)
    with pytest.raises(ValueError, match="conv: expected a number of tokens"):
        GatedDeltaNet(16, 2, conv=-1)
