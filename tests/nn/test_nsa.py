"""The layer of native sparse attention: steps, documents, its published size, and that everything in it learns."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.common.rope import RoPE
from manyheads.mechanism.sparse import NSAConfig, nsa
from manyheads.mechanism.sparse.nsa import _Inputs
from manyheads.model import Config, Decoder
from manyheads.nn import NSA

F64 = torch.float64
SMALL = NSAConfig(kernel=4, stride=2, block=4, keep=3, local=1, window=5, rope=RoPE())


def layer(**options):
    """A small layer in double precision."""
    torch.manual_seed(0)
    return NSA(24, 4, kv_heads=2, config=SMALL, **options).double()


def test_pieces_and_steps_equal_one_call(generator):
    mixer, x = layer(), torch.randn(2, 21, 24, generator=generator, dtype=F64)
    first, cache = mixer(x[:, :3], return_cache=True)
    second, cache = mixer(x[:, 3:15], cache=cache, return_cache=True)
    outs = [first, second]
    for t in range(15, 21):
        y, cache = mixer.step(x[:, t], cache)
        outs.append(y[:, None])
    torch.testing.assert_close(torch.cat(outs, 1), mixer(x), rtol=1e-9, atol=1e-9)


def test_documents_do_not_see_each_other(generator):
    mixer, x = layer(), torch.randn(1, 33, 24, generator=generator, dtype=F64)
    packed = mixer(x, mask=Document([5, 28]) & Causal())
    torch.testing.assert_close(packed, torch.cat([mixer(x[:, :5]), mixer(x[:, 5:])], 1), rtol=1e-9, atol=1e-9)


def test_the_future_does_not_reach_the_past(generator):
    mixer, x = layer(), torch.randn(1, 33, 24, generator=generator, dtype=F64)
    other = torch.cat([x[:, :20], torch.randn(1, 13, 24, generator=generator, dtype=F64)], 1)
    torch.testing.assert_close(mixer(x)[:, :20], mixer(other)[:, :20], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ["queries", "keys"])
def test_every_parameter_learns(generator, order):
    mixer = layer(order=order)
    mixer(torch.randn(2, 33, 24, generator=generator, dtype=F64)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_keys_are_compressed_before_they_are_turned(generator):
    # the same window at two places gives the same compressed key but for the rotation by its begin
    q, k, v = (torch.randn(1, 2, 8, 6, generator=generator, dtype=F64) for _ in range(3))
    k[:, :, 4:], v[:, :, 4:] = k[:, :, :4], v[:, :, :4]
    found = _Inputs.of(q, k, v, (), layer().compression, SMALL, None, None)
    turned = [SMALL.rope(found.ck[:, :, i : i + 1], torch.tensor([-begin])) for i, begin in ((0, 0), (2, 4))]
    torch.testing.assert_close(*turned, rtol=1e-9, atol=1e-9)


def test_what_is_chosen_is_what_is_attended_to(generator):
    mixer, x = layer(), torch.randn(2, 33, 24, generator=generator, dtype=F64)
    ids = mixer.chosen(x)
    assert ids.shape == (2, 2, 33, mixer.keep) and mixer.block == 4 and not ids.requires_grad
    packed = mixer.chosen(x[:1], mask=Document([33]) & Causal())
    blocks = torch.where(packed < 0, -1, packed // 4)
    assert torch.equal(blocks[..., ::4].amax(-1), ids[:1].amax(-1))


def test_sizes_are_those_of_the_release():
    # q 64 x 128, k and v 4 x 128 heads of width 2048, a compression of 32 x 128 to 128 for each key head, 3 gates
    mixer = NSA(2048, 64, kv_heads=4, head_dim=128)
    want = 2 * 2048 * 64 * 128 + 2 * 2048 * 4 * 128 + 4 * (2 * 32 * 128 * 128 + 32 * 128) + 3 * 2048
    assert sum(p.numel() for p in mixer.parameters()) == want


def test_gates_are_sigmoids_that_all_heads_share(generator):
    mixer, x = layer(), torch.randn(1, 20, 24, generator=generator, dtype=F64)
    torch.nn.init.zeros_(mixer.gate_proj.weight)
    q, k, v = mixer._heads_of(x, None)
    halves = nsa(q, k, v, compression=mixer.compression, config=SMALL) / 2
    torch.testing.assert_close(mixer(x), mixer.o_proj(halves.transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-9)


def test_a_decoder_of_them_continues_a_sequence():
    torch.manual_seed(0)
    text = "nsa(kernel=4, stride=2, block=4, keep=3, local=1, window=5)"
    model = Decoder(Config(16, width=16, heads=2, kv_heads=1, mixers=text)).eval()
    tokens = torch.randint(16, (2, 19))
    made = model.generate(tokens, 3)
    torch.testing.assert_close(model(made[:, :-1])[:, -1].argmax(-1), made[:, -1])
    assert model.layers[0].mixer.config.rope == RoPE()


def test_other_masks_are_refused():
    with pytest.raises(UnsupportedError, match="fsa does not support mask"):
        layer()(torch.ones(1, 9, 24, dtype=F64), mask="causal & window(3)")
