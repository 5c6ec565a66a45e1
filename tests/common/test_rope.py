"""Rotary embedding: relative, exact at large positions, and the same as transformers' own."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads.common.rope import RoPE


@pytest.mark.parametrize(
    "rope", [RoPE(), RoPE(interleaved=True), RoPE(width=6), RoPE(base=500.0, factor=4.0)]
)
def test_scores_depend_on_differences_of_positions_only(rope):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    at = torch.tensor([0, 3, 4, 9, 11])
    here = rope(q, at) @ rope(k, at).mT
    there = rope(q, at + 1000) @ rope(k, at + 1000).mT
    torch.testing.assert_close(here, there, rtol=0, atol=1e-9)


def test_position_zero_is_the_identity_and_the_norm_is_kept():
    x = torch.randn(1, 2, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(RoPE()(x, torch.zeros(4, dtype=torch.int64)), x)
    torch.testing.assert_close(RoPE()(x, torch.arange(4)).norm(dim=-1), x.norm(dim=-1))


def test_channels_beyond_the_width_pass():
    x = torch.randn(1, 1, 4, 10, generator=torch.Generator().manual_seed(2))
    assert torch.equal(RoPE(width=4)(x, torch.arange(4))[..., 4:], x[..., 4:])


def test_a_position_of_two_million_keeps_its_angle():
    x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    turned = RoPE()(x, torch.tensor([2_000_003]))
    assert abs(turned[0, 0, 0, 0].item() - math.cos(2_000_003)) < 1e-7


def test_batches_may_have_their_own_positions():
    x = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(3))
    at = torch.tensor([[0, 1, 2], [5, 5, 9]])
    both = RoPE()(x, at)
    for b in range(2):
        assert torch.equal(both[b : b + 1], RoPE()(x[b : b + 1], at[b]))


def test_same_as_the_rotation_of_llama_in_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=8
    )
    generator = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, 2, 7, 16, generator=generator) for _ in range(2))
    at = torch.arange(3, 10)
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, at[None].expand(2, -1))
    theirs = llama.apply_rotary_pos_emb(q, k, cos, sin)
    for ours, other in zip((RoPE()(q, at), RoPE()(k, at)), theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RoPE(base=1.0), "base: expected"),
        (lambda: RoPE(width=3), "width: expected an even"),
        (lambda: RoPE(factor=0.0), "factor: expected"),
        (lambda: RoPE(width=8)(torch.zeros(1, 1, 2, 4), torch.arange(2)), "x: expected"),
        (lambda: RoPE()(torch.zeros(1, 1, 2, 4), torch.arange(3)), "positions: expected"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_positions_must_be_integers():
    with pytest.raises(TypeError, match="positions: expected integers"):
        RoPE()(torch.zeros(1, 1, 2, 4), torch.zeros(2))
