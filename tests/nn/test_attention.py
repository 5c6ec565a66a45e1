"""The attention layer: torch's own layer in its place, and what it adds to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads import Causal, Window, attention
from manyheads.common.errors import UnsupportedError
from manyheads.common.rope import RoPE
from manyheads.nn import Attention

E, H, B, NQ, NK = 24, 4, 3, 7, 11


def pair(**options):
    """A layer of torch and ours with its parameters, both in float64, biases not zero."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, H, **options).double()
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours = Attention.from_torch(theirs)
    return theirs, ours


def inputs(batch_first, kdim=E, vdim=E):
    """Query, key and value in the layout of the layer."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((NQ, E), (NK, kdim), (NK, vdim))
    drawn = [torch.randn(B, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return drawn if batch_first else [x.transpose(0, 1) for x in drawn]


def assert_equal(ours, theirs, x, **options):
    """Both layers give the same output, weights and gradients."""
    results = []
    for layer in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in x]
        out, weights = layer(*leaves, **options)
        layer.zero_grad()
        (out.square().sum() + (0 if weights is None else weights.pow(3).sum())).backward()
        grads = {name: p.grad for name, p in layer.named_parameters()}
        results.append((out, weights, [leaf.grad for leaf in leaves], grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 14}], ids=["one-width", "three-widths"])
def test_computes_what_torch_computes(batch_first, bias, widths):
    theirs, ours = pair(batch_first=batch_first, bias=bias, **widths)
    assert_equal(ours, theirs, inputs(batch_first, **widths))


@pytest.mark.parametrize("average", [True, False])
def test_returns_the_weights_of_torch(average):
    theirs, ours = pair()
    assert_equal(ours, theirs, inputs(False), average_attn_weights=average)


def test_returns_no_weights_when_told_not_to():
    theirs, ours = pair()
    assert_equal(ours, theirs, inputs(False), need_weights=False)


MASKS = {
    "bool": torch.arange(NQ * NK).reshape(NQ, NK) % 3 == 1,
    "float": torch.linspace(-2, 2, NQ * NK, dtype=torch.float64).reshape(NQ, NK),
    "infinite": torch.zeros(NQ, NK, dtype=torch.float64).masked_fill(
        torch.arange(NQ * NK).reshape(NQ, NK) % 3 == 1, float("-inf")
    ),
    "per-head": torch.arange(B * H * NQ * NK).reshape(B * H, NQ, NK) % 5 == 2,
    "per-head-float": torch.linspace(-3, 3, B * H * NQ * NK, dtype=torch.float64).reshape(B * H, NQ, NK),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attn_mask_means_what_it_means_in_torch(mask, need_weights):
    theirs, ours = pair()
    assert_equal(ours, theirs, inputs(False), attn_mask=mask, need_weights=need_weights)


def test_a_learned_attn_mask_gets_the_gradient_of_torch_through_the_weights():
    theirs, ours = pair(batch_first=True)
    hidden = torch.zeros(B, NK, dtype=torch.bool)
    hidden[0, 4:] = True
    padding = torch.zeros(B, NK, dtype=torch.float64).masked_fill(hidden, float("-inf"))
    found = []
    for layer in (theirs, ours):
        learned = MASKS["float"].clone().requires_grad_()
        weights = layer(*inputs(True), attn_mask=learned, key_padding_mask=padding, average_attn_weights=False)[1]
        found.append((weights, torch.autograd.grad(weights.pow(3).sum(), learned)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("infinite", [False, True], ids=["bool", "float"])
@pytest.mark.parametrize("masked", [False, True], ids=["alone", "with-attn-mask"])
def test_key_padding_mask_hides_where_it_is_true(infinite, masked):
    theirs, ours = pair(batch_first=True)
    hidden = torch.zeros(B, NK, dtype=torch.bool)
    hidden[0, 4:], hidden[1, :2] = True, True
    given = torch.zeros(B, NK, dtype=torch.float64).masked_fill(hidden, float("-inf")) if infinite else hidden
    attn_mask = MASKS["infinite" if infinite else "bool"] if masked else None
    assert_equal(ours, theirs, inputs(True), key_padding_mask=given, attn_mask=attn_mask)


def test_a_sequence_without_a_batch():
    theirs, ours = pair()
    q, k, v = (x[:, 0] for x in inputs(False))
    hidden = torch.arange(NK) > 8
    assert_equal(ours, theirs, (q, k, v), key_padding_mask=hidden)


def test_causal_hint_needs_no_matrix():
    theirs, ours = pair(batch_first=True)
    x = inputs(True)[0]
    matrix = nn.Transformer.generate_square_subsequent_mask(NQ, dtype=torch.float64)
    want = theirs(x, x, x, attn_mask=matrix, is_causal=True, need_weights=False)[0]
    for got in (
        ours(x, is_causal=True, need_weights=False)[0],
        ours(x, x, x, attn_mask=matrix, is_causal=True, need_weights=False)[0],
        ours(x, mask="causal", need_weights=False)[0],
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("widths", [{}, {"kdim": 10, "vdim": 14}], ids=["one-width", "three-widths"])
def test_state_dicts_load_both_ways(widths):
    theirs, ours = pair(**widths)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {
        n: p.shape for n, p in theirs.state_dict().items()
    }
    other = nn.MultiheadAttention(E, H, **widths).double()
    other.load_state_dict(ours.state_dict(), strict=True)
    assert_equal(ours, other, inputs(False, **widths))


def test_starts_with_the_distribution_of_torch():
    torch.manual_seed(5)
    ours = Attention(256, 4)
    theirs = nn.MultiheadAttention(256, 4)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert abs(a.std() - b.std()) < 0.02 * b.std() + 1e-8, name
        assert a.abs().max() <= b.abs().max() * 1.02 + 1e-8, name


@pytest.mark.parametrize("training", [True, False])
def test_serves_inside_the_encoder_layer_of_torch(training):
    torch.manual_seed(2)
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True).double().train(training)
    x = torch.randn(B, NQ, E, dtype=torch.float64)
    hidden = torch.zeros(B, NQ, dtype=torch.bool)
    hidden[1, 5:] = True
    with torch.no_grad():
        want = layer(x, src_key_padding_mask=hidden)
        calls = []
        layer.self_attn = Attention.from_torch(
            layer.self_attn, core=lambda *a, **k: (calls.append(1), attention(*a, **k))[1]
        )
        got = layer(x, src_key_padding_mask=hidden)
    assert calls, "the encoder layer went around the core"
    torch.testing.assert_close(got[~hidden], want[~hidden])


def test_grouped_heads_equal_repeated_ones():
    torch.manual_seed(3)
    grouped = Attention(E, H, kv_heads=2, batch_first=True).double()
    full = Attention(E, H, batch_first=True).double()
    width = E // H
    q, k, v = grouped.in_proj_weight.split([E, 2 * width, 2 * width])
    k, v = (w.unflatten(0, (2, width)).repeat_interleave(2, dim=0).flatten(0, 1) for w in (k, v))
    with torch.no_grad():
        full.in_proj_weight.copy_(torch.cat((q, k, v)))
        full.out_proj.load_state_dict(grouped.out_proj.state_dict())
    x = torch.randn(2, 9, E, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), full(x))


def test_rotation_and_norms_equal_doing_them_by_hand():
    torch.manual_seed(4)
    layer = Attention(E, H, batch_first=True, rope=RoPE(base=100.0), qk_norm=True).double()
    nn.init.uniform_(layer.q_norm.weight, 0.5, 2.0)
    nn.init.uniform_(layer.k_norm.weight, 0.5, 2.0)
    x = torch.randn(2, 9, E, dtype=torch.float64)
    at = torch.tensor([4, 0, 7, 2, 9, 1, 30, 3, 5])
    q, k, v = (
        t.unflatten(-1, (H, -1)).transpose(1, 2)
        for t in nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=-1)
    )
    eps = torch.finfo(torch.float64).eps
    q, k = (
        t * (t.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.weight
        for t, norm in ((q, layer.q_norm), (k, layer.k_norm))
    )
    q, k = layer.rope(q, at), layer.rope(k, at)
    hidden = at[:, None] < at[None, :]
    weights = (q @ k.mT / (E // H) ** 0.5).masked_fill(hidden, float("-inf")).softmax(-1)
    want = layer.out_proj((weights @ v).transpose(1, 2).flatten(2))
    got, got_weights = layer(x, mask="causal", positions=(at, at), average_attn_weights=False)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got_weights, weights)


def test_rotated_queries_at_the_end_continue_the_keys():
    torch.manual_seed(6)
    layer = Attention(E, H, batch_first=True, rope=RoPE()).double()
    x = torch.randn(1, 12, E, dtype=torch.float64)
    whole = layer(x, mask="causal", need_weights=False)[0]
    last = layer(x[:, -3:], x, mask="causal", need_weights=False)[0]
    torch.testing.assert_close(last, whole[:, -3:])


def test_masks_of_all_kinds_combine():
    _, ours = pair(batch_first=True)
    x = inputs(True)[0]
    hidden = torch.arange(NQ * NQ).reshape(NQ, NQ) % 4 == 1
    got = ours(x, mask=Causal() & Window(4), attn_mask=hidden, need_weights=True)[1]
    i, j = torch.arange(NQ)[:, None], torch.arange(NQ)[None]
    shown = (j <= i) & (i - j < 4) & ~hidden
    assert torch.equal(got > 0, shown.expand(B, -1, -1))


def test_another_core_gets_what_the_call_needs_and_nothing_else():
    seen = []

    def core(q, k, v, **options):
        seen.append((q.shape, k.shape, sorted(options)))
        return v

    layer = Attention(E, H, dropout=0.5, batch_first=True, core=core)
    x = torch.randn(2, 5, E)
    out, weights = layer(x)
    layer.eval()
    layer(x, mask="causal", key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    assert weights is None and out.shape == x.shape
    assert [names for *_, names in seen] == [["dropout_p"], ["key_padding", "mask"]]
    with pytest.raises(UnsupportedError, match="need_weights: only the exact core"):
        layer(x, need_weights=True)


def test_a_core_that_learns_is_part_of_the_layer():
    class Core(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.ones(()))

        def forward(self, q, k, v):
            return v * self.gate

    assert "core.gate" in dict(Attention(E, H, core=Core()).named_parameters())


def test_dropout_acts_in_training_only():
    torch.manual_seed(7)
    layer = Attention(E, H, dropout=0.5, batch_first=True)
    x = torch.randn(1, 30, E)
    assert not torch.equal(layer(x, need_weights=False)[0], layer(x, need_weights=False)[0])
    layer.eval()
    assert torch.equal(layer(x, need_weights=False)[0], layer(x, need_weights=False)[0])


def test_a_query_without_keys_gives_the_output_bias():
    _, ours = pair(batch_first=True)
    x = inputs(True)[0]
    out, weights = ours(x, key_padding_mask=torch.ones(B, NQ, dtype=torch.bool))
    torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))
    assert (weights == 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Attention(10, 4), "embed_dim: expected a multiple of num_heads=4, got 10"),
        (lambda: Attention(12, 4, kv_heads=3), "kv_heads: expected a divisor of num_heads=4, got 3"),
        (lambda: Attention(12, 4, dropout=1.0), "dropout: expected"),
        (lambda: Attention(12, 4)(torch.zeros(1, 2, 3, 12)), "query: expected 2 or 3 dimensions"),
        (lambda: Attention(12, 4)(torch.zeros(5, 1, 12), attn_mask=torch.zeros(4, 5)), "attn_mask: expected"),
        (
            lambda: Attention(12, 4)(torch.zeros(5, 1, 12), key_padding_mask=torch.zeros(1, 4)),
            "key_padding_mask: expected",
        ),
        (
            lambda: Attention(12, 4)(torch.zeros(5, 1, 12), key_padding_mask=torch.ones(1, 5)),
            "key_padding_mask: expected True or minus infinity",
        ),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_torch_adds_to_keys_is_refused(options):
    with pytest.raises(UnsupportedError, match="add_bias_kv and add_zero_attn"):
        Attention.from_torch(nn.MultiheadAttention(E, H, **options))


def test_says_what_it_is():
    text = repr(Attention(E, H, kv_heads=2, rope=RoPE(base=500.0)))
    assert f"{E}, {H}, kv_heads=2, rope=RoPE(base=500.0" in text
