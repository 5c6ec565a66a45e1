"""Parallax: the numbered checks of its card, and what surrounds them."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import pytest
import torch

import manyheads as mh
from manyheads import Causal, Document, Window
from manyheads.mechanism.regression import KeysValues, local_linear_attention, parallax
from manyheads.mechanism.regression.parallax import reference, step, weights
from manyheads.spec import Size, find
from manyheads.testing import sample_qkv

WIDE = torch.float64


def inputs(n=23, heads=4, kv=2, d=6, dv=5, batch=2, keys=None, grad=False, seed=0):
    """Queries, keys, values and probes in float64."""
    q, k, v = sample_qkv(batch, heads, n, kv_heads=kv, keys=keys, width=d, value_width=dv, dtype=WIDE, seed=seed)
    r = sample_qkv(batch, heads, n, width=d, dtype=WIDE, seed=seed + 1)[0]
    return [t.requires_grad_(grad) for t in (q, k, v, r)]


def test_no_probe_is_softmax_attention():
    q, k, v, r = inputs()
    for mask in (None, "causal", "causal & window(4)"):
        got = parallax(q, k, v, r=torch.zeros_like(r), mask=mask)
        torch.testing.assert_close(got, mh.attention(q, k, v, mask=mask))


def test_a_constant_added_to_every_key_changes_nothing():
    q, k, v, r = inputs()
    moved = k + 3.0 * torch.randn(2, 2, 1, 6, dtype=WIDE)
    torch.testing.assert_close(parallax(q, moved, v, r=r, mask="causal"), parallax(q, k, v, r=r, mask="causal"))


def test_constant_values_are_returned():
    q, k, _, r = inputs()
    v = torch.randn(2, 2, 1, 5, dtype=WIDE).expand(2, 2, 23, 5)
    got = parallax(q, k, v, r=r, mask="causal")
    torch.testing.assert_close(got, v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize("tile", [(1, 1), (4, 16), (16, 8), (64, 64)])
def test_streaming_equals_the_plain_form_for_any_block(tile, monkeypatch):
    from manyheads.engine.solve import blocked, probe

    monkeypatch.setattr(blocked, "_WHOLE", 0)
    monkeypatch.setattr(blocked, "_CHUNK", 1)  # as few keys at a time as the tile allows
    q, k, v, r = inputs(n=37)
    for mask in ("causal", "full", "causal & window(9)"):
        got = probe(q, r, k, v, mask, tile=tile)
        torch.testing.assert_close(got, reference(q, k, v, r=r, mask=mask), rtol=1e-11, atol=1e-11)


def test_a_window_as_long_as_the_sequence_hides_nothing():
    q, k, v, r = inputs()
    whole = parallax(q, k, v, r=r, mask="causal")
    torch.testing.assert_close(parallax(q, k, v, r=r, mask=Causal() & Window(23)), whole)
    assert not torch.allclose(parallax(q, k, v, r=r, mask=Causal() & Window(22)), whole)


def test_grouped_heads_equal_repeated_keys_and_values():
    q, k, v, r = inputs(heads=6, kv=2, grad=True)
    more = [t.repeat_interleave(3, dim=1) for t in (k, v)]
    out, same = parallax(q, k, v, r=r, mask="causal"), parallax(q, *more, r=r, mask="causal")
    torch.testing.assert_close(out, same)
    got, want = (torch.autograd.grad(o.square().sum(), (q, k, v, r)) for o in (out, same))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mask", ["causal", "causal & window(5)"])
def test_prefill_and_decoding_equal_one_call(mask):
    q, k, v, r = inputs()
    whole = parallax(q, k, v, r=r, mask=mask)

    def part(a, b, state):
        q_, k_, v_, r_ = (t[:, :, a:b] for t in (q, k, v, r))
        return parallax(q_, k_, v_, r=r_, mask=mask, state=state, return_state=True)

    prefill, state = part(0, 10, None)
    chunk, state = part(10, 17, state)
    outs = [prefill, chunk]
    for t in range(17, 23):
        out, state = step(q[:, :, t], k[:, :, t], v[:, :, t], state, r=r[:, :, t], mask=mask)
        outs.append(out[:, :, None])
    torch.testing.assert_close(torch.cat(outs, dim=2), whole)
    assert isinstance(state, KeysValues) and torch.equal(state.k, k)


def test_the_written_backward_equals_automatic_differentiation():
    q, k, v, r = inputs(grad=True)
    real = torch.arange(23)[None] < torch.tensor([23, 17])[:, None]
    for options in ({"mask": "causal & window(7)"}, {"mask": "full", "key_padding": real, "scale": 0.7}):
        outs = parallax(q, k, v, r=r, **options), reference(q, k, v, r=r, **options)
        weight = torch.randn(outs[0].shape, dtype=WIDE, generator=torch.Generator().manual_seed(1))
        got, want = (torch.autograd.grad((o * weight).sum(), (q, k, v, r)) for o in outs)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_the_probe_of_local_linear_attention_gives_local_linear_attention():
    q, k, v, _ = inputs(kv=4)
    p, _ = weights(q, k, mask="causal")
    centre = p @ k
    z = k[:, :, None] - centre[:, :, :, None]
    matrix = torch.einsum("bhij,bhijd,bhije->bhide", p, z, z) + 0.3 * torch.eye(6, dtype=WIDE)
    r = torch.linalg.solve(matrix, centre - q)
    want = local_linear_attention(q, k, v, ridge=0.3, mask="causal")
    torch.testing.assert_close(parallax(q, k, v, r=r, mask="causal"), want)


# --- around the checks --------------------------------------------------------------------------------------------


def theirs():
    """The plain function of flash-linear-attention, which warns of a machine without a GPU."""
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("fla.ops.parallax.naive").naive_parallax


@pytest.mark.parametrize("window", [None, 6])
def test_it_equals_flash_linear_attention(window):
    naive = theirs()
    q, k, v, r = (t.float() for t in inputs(dv=6))
    want = naive(*(t.transpose(1, 2) for t in (q, r, k, v)), window_size=window).transpose(1, 2)
    mask = "causal" if window is None else f"causal & window({window})"
    torch.testing.assert_close(parallax(q, k, v, r=r, mask=mask), want, rtol=1e-4, atol=1e-4)


def test_padding_on_the_left_is_a_shorter_sequence():
    q, k, v, r = inputs()
    real = torch.arange(23)[None] >= torch.tensor([0, 6])[:, None]
    got = parallax(q, k, v, r=r, mask="causal", key_padding=real)
    short = parallax(*(t[1:, :, 6:] for t in (q, k, v)), r=r[1:, :, 6:], mask="causal")
    torch.testing.assert_close(got[1:, :, 6:], short)
    assert (got[1, :, :6] == 0).all()


def test_packed_documents_do_not_see_each_other():
    q, k, v, r = inputs(batch=1)
    out = parallax(q, k, v, r=r, mask=Document([9, 14]) & Causal())
    k[:, :, :9] += torch.randn(6, dtype=WIDE)
    v[:, :, :9] = 7.0
    again = parallax(q, k, v, r=r, mask=Document([9, 14]) & Causal())
    torch.testing.assert_close(out[:, :, 9:], again[:, :, 9:])
    assert not torch.allclose(out[:, :, :9], again[:, :, :9])


def test_operations_are_those_of_three_products():
    spec = find("parallax")
    case = spec.inputs(Size(batch=3, heads=4, queries=10, width=8, value_width=6))
    assert spec.flops(case) == 2 * 3 * 4 * 100 * (8 + 8 + 6)


def test_a_state_that_does_not_fit_is_refused():
    q, k, v, r = inputs()
    with pytest.raises(ValueError, match=r"state: k of shape .* cannot come before"):
        parallax(q, k, v, r=r, mask="causal", state=KeysValues(k[:, :1], v))
    with pytest.raises(ValueError, match="key_padding: has no meaning beside a state"):
        parallax(q, k, v, r=r, key_padding=torch.ones(2, 23, dtype=torch.bool), return_state=True)
    with pytest.raises(ValueError, match="r: expected the shape of q"):
        parallax(q, k, v, r=r[..., :3])
