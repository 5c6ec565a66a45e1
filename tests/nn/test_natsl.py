"""The NAtS-L layer: steps, documents, variants of its memory, and that it learns what to keep."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document
from manyheads.mechanism.linear.natsl import NATSConfig
from manyheads.nn import NATSL

F64 = torch.float64
SMALL = NATSConfig(chunk=4, split=2)


def layer(seed=0, **options):
    """A small layer in double precision whose types differ from chunk to chunk."""
    torch.manual_seed(seed)
    made = NATSL(24, 3, head_dim=4, config=options.pop("config", SMALL), **options).double()
    torch.nn.init.normal_(made.types.weight)
    torch.nn.init.normal_(made.norm_weight)
    return made


@pytest.mark.parametrize("options", [
    {}, {"memory": "delta", "type_heads": 1}, {"memory": "gated", "gate": False}, {"conv": 0, "negative": True},
    {"config": NATSConfig(chunk=4, split=1, decay_kept=False)},
])  # fmt: skip
def test_pieces_and_steps_equal_one_call(generator, options):
    mixer = layer(**options)
    x = torch.randn(2, 19, 24, generator=generator, dtype=F64)
    whole = mixer(x)
    first, cache = mixer(x[:, :2], return_cache=True)
    second, cache = mixer(x[:, 2:9], cache=cache, return_cache=True)
    outs = [first, second]
    for t in range(9, 19):
        y, cache = mixer.step(x[:, t], cache)
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-9, atol=1e-9)
    heads = cache.state.attention.kept.shape[1]
    assert 0 < cache.state.attention.kept.sum() < 2 * heads * 16


def test_documents_do_not_see_each_other(generator):
    mixer = layer()
    x = torch.randn(1, 18, 24, generator=generator, dtype=F64)
    packed = mixer(x, mask=Document([5, 13]) & Causal())
    torch.testing.assert_close(packed, torch.cat([mixer(x[:, :5]), mixer(x[:, 5:])], 1), rtol=1e-9, atol=1e-9)


def test_the_future_does_not_reach_the_past(generator):
    mixer = layer()
    x = torch.randn(1, 18, 24, generator=generator, dtype=F64)
    other = torch.cat([x[:, :11], torch.randn(1, 7, 24, generator=generator, dtype=F64)], 1)
    torch.testing.assert_close(mixer(x)[:, :11], mixer(other)[:, :11], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("both", [False, True])
def test_every_parameter_learns(both):
    mixer = layer(config=NATSConfig(chunk=4, split=2, both=both))
    mixer(torch.randn(2, 18, 24, dtype=F64)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_it_learns_to_keep_the_chunk_that_is_asked_for():
    # the task needs exact copies of an early chunk, with a memory that forgets at once: only attention can
    mixer = layer(seed=1, conv=0, config=NATSConfig(chunk=4, split=1, both=True))
    torch.nn.init.constant_(mixer.log_rate, 4.0)
    torch.nn.init.constant_(mixer.decay_bias, 4.0)
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(8, 12, 24, generator=draws, dtype=F64)
    x[:, :4] += 3
    target = x[:, :4].flip(1)
    weights = torch.optim.Adam(mixer.parameters(), lr=0.02)
    with torch.no_grad():
        mixer.types.weight[0::2] = 0
        mixer.types.weight[1::2] = 0.01  # every chunk with a positive mean starts in the memory
    share = mixer(x, return_cache=True)[1].state.attention.kept.double().mean()
    losses = []
    for _ in range(40):
        loss = (mixer(x)[:, 8:] - target).square().mean()
        losses.append(loss.item())
        weights.zero_grad()
        loss.backward()
        weights.step()
    kept = mixer(x, return_cache=True)[1].state.attention.kept.double().mean()
    assert losses[-1] < losses[0] and kept > share


def test_half_precision_stays_so():
    mixer = NATSL(16, 2, config=NATSConfig(chunk=4, split=2)).bfloat16()
    y = mixer(torch.randn(1, 9, 16, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="did you mean 'gated-delta'"):
        NATSL(16, 2, memory="gated_delta")
    with pytest.raises(ValueError, match="type_heads: expected a divisor of num_heads=4, got 3"):
        NATSL(16, 4, type_heads=3)
    with pytest.raises(ValueError, match="head_dim: gives a width of 6, no multiple of config.split = 4"):
        NATSL(16, 2, config=NATSConfig(split=4))
    with pytest.raises(ValueError, match=r"x: expected tokens \(B, N, C=16\)"):
        NATSL(16, 2)(torch.ones(1, 4, 8))
