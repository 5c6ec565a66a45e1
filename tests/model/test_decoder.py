"""Decoder and encoder around every mixer: causal, the same step by step and packed, and trainable."""

from __future__ import annotations

import pytest
import torch

from manyheads import Document
from manyheads.common.errors import UnsupportedError
from manyheads.common.rope import RoPE
from manyheads.model import Config, Decoder, Encoder, Learned, NoPE, Sinusoidal, Slopes, names
from manyheads.model.position import within_documents

POSITIONS = (RoPE(), NoPE(), Slopes(), Learned(64), Sinusoidal())
EVERY = sorted({*names(), "softmax(window=5)", "linear(feature='identity')", "rat(chunk=5)", "natsl(chunk=6)"})
HYBRIDS = [("linear", "softmax(window=6)"), ("gated-delta", "linear", "softmax")]


def decoder(mixers="softmax", **more):
    torch.manual_seed(5)
    config = {"width": 32, "heads": 2, "depth": 2, "mixers": mixers, "conv": 2, **more}
    return Decoder(Config(23, **config)).double()


def tokens(*shape, seed=3):
    return torch.randint(23, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mixers", [*EVERY, *HYBRIDS], ids=str)
def test_no_later_token_changes_an_earlier_output(mixers):
    model, x = decoder(mixers), tokens(1, 37)
    before = model(x)
    for at in (36, 20):
        changed = x.clone()
        changed[:, at:] = (changed[:, at:] + 7) % 23
        after = model(changed)
        assert torch.allclose(before[:, :at], after[:, :at], atol=1e-9)
        assert not torch.allclose(before[:, at:], after[:, at:], atol=1e-4)


@pytest.mark.parametrize("mixers", [*EVERY, *HYBRIDS], ids=str)
def test_one_token_at_a_time_gives_what_the_whole_sequence_gives(mixers):
    model, x = decoder(mixers), tokens(2, 19)
    whole, cache, found = model(x), None, []
    for token in x.unbind(1):
        out, cache = model.step(token, cache)
        found.append(out)
    assert torch.allclose(torch.stack(found, 1), whole, atol=1e-8)
    assert cache.position == 19


@pytest.mark.parametrize("mixers", [*EVERY, *HYBRIDS], ids=str)
def test_packed_documents_are_those_documents_one_by_one(mixers):
    model, x, lens = decoder(mixers), tokens(1, 41), [11, 1, 29]
    packed = model(x, mask=Document(lens))
    alone = torch.cat([model(part) for part in x.split(lens, 1)], 1)
    assert torch.allclose(packed, alone, atol=1e-8)


@pytest.mark.parametrize("position", POSITIONS, ids=lambda p: type(p).__name__)
def test_every_kind_of_position_keeps_to_steps_and_documents(position):
    model, x = decoder(position=position), tokens(1, 17)
    cache, found = None, []
    for token in x.unbind(1):
        out, cache = model.step(token, cache)
        found.append(out)
    assert torch.allclose(torch.stack(found, 1), model(x), atol=1e-9)
    packed = model(x, mask=Document([7, 10]))
    assert torch.allclose(packed[:, 7:], model(x[:, 7:]), atol=1e-9)


def test_only_positions_tell_a_network_without_a_mask_its_order():
    x = tokens(1, 12)
    turned = x[:, [3, 1, 2, 0, *range(4, 12)]]
    for position, blind in ((NoPE(), True), (RoPE(), False), (Slopes(), False), (Sinusoidal(), False)):
        torch.manual_seed(1)
        model = Encoder(Config(23, width=32, heads=2, position=position)).double()
        assert torch.allclose(model.pooled(x), model.pooled(turned), atol=1e-9) == blind, position


@pytest.mark.parametrize("mixers", EVERY)
def test_every_mixer_learns(mixers):
    torch.manual_seed(0)
    model = Decoder(Config(7, width=16, heads=2, depth=1, mixers=mixers, conv=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.arange(33).remainder(7).expand(4, -1)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    # hard choices between mechanisms may leave a weight without a gradient, but most have one
    grads = [p.grad is not None and bool(p.grad.any()) for p in model.parameters()]
    assert sum(grads) > 0.8 * len(grads)


def test_a_window_sees_as_many_tokens_in_every_layer():
    model, x = decoder("softmax(window=4)", conv=0), tokens(1, 20)
    before = model(x)
    changed = x.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 23
    moved = (before - model(changed)).abs().amax(-1)[0] > 1e-12
    # two layers of 4 tokens, self included: token 3 reaches 3 + 2 * 3
    assert moved.nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]


def test_an_encoder_reads_both_directions_and_keeps_documents_apart():
    for mixers in ("softmax", "linear", "linear(feature='relu')"):
        torch.manual_seed(2)
        model = Encoder(Config(23, outputs=3, tied=False, width=32, heads=2, mixers=mixers)).double()
        x = tokens(1, 15)
        changed = x.clone()
        changed[:, -1] = (changed[:, -1] + 1) % 23
        assert not torch.allclose(model(x)[:, 0], model(changed)[:, 0], atol=1e-6)
        packed = model(x, mask=Document([6, 9]))
        assert torch.allclose(packed, torch.cat([model(x[:, :6]), model(x[:, 6:])], 1), atol=1e-9)


def test_the_pattern_of_mixers_repeats_over_the_layers():
    hybrid = Config(32000, width=64, depth=5, heads=2, mixers=("rat(chunk=4)", "softmax(window=8)"))
    kinds = [type(block.mixer).__name__ for block in Decoder(hybrid).layers]
    assert kinds == ["RAT", "Softmax", "RAT", "Softmax", "RAT"]


def test_the_published_rat_of_1_3_billion_has_the_count_of_its_parts():
    with torch.device("meta"):
        model = Decoder(
            Config(
                32000, width=2048, depth=24, heads=16, hidden=8192, gated=False, tied=False, mixers="rat(chunk=16)"
            )
        )
    # per layer: RAT with its norm, a feed-forward layer, the norm before it; then both embeddings and the last norm
    assert model.parameter_count() == 24 * (17_829_888 + 33_554_432 + 2048) + 2 * 65_536_000 + 2048
    assert round(model.parameter_count() / 1e9, 3) == 1.364


def test_generation_takes_the_likeliest_token_or_draws():
    model, x = decoder(("linear", "softmax")), tokens(2, 5)
    greedy = model.generate(x, 6)
    assert greedy[:, :5].equal(x)
    for at in range(5, 11):
        assert greedy[:, at].equal(model(greedy[:, :at])[:, -1].argmax(-1))
    drawn = [model.generate(x, 6, temperature=3.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_a_tied_weight_counts_once_and_learns_from_both_sides():
    tied, free = (Decoder(Config(50, tied=t)) for t in (True, False))
    assert tied.head.weight is tied.embed.weight
    assert free.parameter_count() - tied.parameter_count() == 50 * 64
    assert tied.parameter_count(embedding=False) == free.parameter_count(embedding=False)


@pytest.mark.parametrize(("gated", "hidden", "matrices"), [(True, 24, 3), (False, 40, 2)])
def test_parameters_are_those_of_the_formula(gated, hidden, matrices):
    config = Config(11, width=16, depth=3, heads=2, hidden=hidden, gated=gated, tied=False)
    block = 4 * 16 * 16 + matrices * 16 * hidden + 2 * 16
    assert Decoder(config).parameter_count() == 2 * 11 * 16 + 3 * block + 16


def test_positions_begin_anew_in_each_document():
    assert within_documents(Document([[2, 3], [4, 1]]), 5).tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]]
    assert within_documents(Document([0, 2, 1]), 3).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": "softmx"}, "unknown mixer 'softmx': did you mean 'softmax'"),
        ({"mixers": "softmax(windw=3)"}, "unknown option of softmax 'windw': did you mean 'window'"),
        ({"mixers": "softmax(3)"}, "expected options as in"),
        ({"mixers": "softmax(window=print())"}, "expected options as in"),
        ({"mixers": ()}, "mixers: expected at least one"),
        ({"width": 30, "heads": 4}, "width: expected a multiple of heads=4"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor"),
        ({"depth": 0}, "depth: expected a positive number"),
        ({"outputs": 5}, "tied:"),
        ({"tokens": False}, "tied:"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(")):
        Config(23, **fields)


def test_other_mistakes_are_named():
    with pytest.raises(TypeError, match="position: expected one of RoPE"):
        Config(23, position="rope")
    with pytest.raises(ValueError, match="length: expected a positive"):
        Learned(0)
    model = decoder(position=Learned(8))
    with pytest.raises(ValueError, match="beyond the learned length 8"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match=r"tokens: expected integers \(B, N\)"):
        model(torch.randn(1, 5))
    with pytest.raises(ValueError, match="must predict the tokens"):
        Decoder(Config(5, outputs=2, tied=False)).generate(tokens(1, 3), 2)
    with pytest.raises(ValueError, match="N at least 1"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="conv: the short convolution is causal"):
        Encoder(Config(23, conv=2))
    with pytest.raises(UnsupportedError, match="mask"):
        decoder("linear", conv=0)(tokens(1, 9), mask="window(3)")
    with pytest.raises(ValueError, match="unknown pointwise feature map 'elo': did you mean"):
        decoder("linear(feature='elo')")


def test_real_valued_input_goes_in_and_out():
    model = Decoder(Config(5, outputs=2, tokens=False, tied=False, width=16, heads=2))
    assert model(torch.randn(3, 7, 5)).shape == (3, 7, 2)
    with pytest.raises(ValueError, match=r"input: expected shape \(B, N, 5\), got \(3, 7, 4\)"):
        model(torch.randn(3, 7, 4))
