"""Softmax attention as a sum of recurrences: its orders, its denominators, its two forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from manyheads import Causal, Document, attention
from manyheads.common.errors import UnsupportedError
from manyheads.common.features import Powers
from manyheads.mechanism.linear import Expansion, taylor_attention
from manyheads.mechanism.linear.taylor import DENOMINATORS, reference, step, weights
from manyheads.testing import sample_qkv

FINITE = tuple(name for name in DENOMINATORS if name != "softmax")


def inputs(tokens, seed, **size):
    """Queries, keys and values of two heads, in float64."""
    return sample_qkv(2, 2, tokens, **{"width": 4, "value_width": 3, "dtype": torch.float64, "seed": seed} | size)


def close(a, b):
    """Equal up to float64 rounding."""
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("highest", [2, 5, 9, 40])
def test_many_orders_approach_softmax_within_the_remainder(highest, causal, seed):
    q, k, v = inputs(30, seed)
    mask = "causal" if causal else "full"
    want, lse = attention(q, k, v, mask=mask, return_lse=True)
    got = taylor_attention(q, k, v, config=Expansion(tuple(range(highest + 1))), mask=mask)
    x = (q @ k.mT * 4**-0.5).abs()
    remainder = x.exp() * x ** (highest + 1) / float(math.factorial(highest + 1))  # of each weight
    remainder = remainder.tril() if causal else remainder
    bound = remainder @ v.abs() / lse.exp()[..., None]
    assert ((got - want).abs() <= bound + 1e-12).all()
    if highest == 40:
        assert bound.max() < 1e-3


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("mask", ["full", "causal", Document([9, 0, 31]) & Causal(), Document([9, 0, 31])])
@pytest.mark.parametrize("denominator", FINITE)
def test_the_recurrence_equals_the_parallel_form(denominator, mask, kv_heads, seed):
    q, k, v = inputs(40, seed, kv_heads=kv_heads)
    for orders in [(0, 1, 2), (2,), (0, 3)] if denominator != "sum" else [(0, 1, 2), (2,)]:
        got = {
            form: taylor_attention(q, k, v, config=Expansion(orders, denominator, form), mask=mask)
            for form in ("parallel", "recurrent")
        }
        close(got["parallel"], got["recurrent"])
        close(got["parallel"], reference(q, k, v, config=Expansion(orders, denominator), mask=mask))


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_the_exponential_follows_the_definition_over_every_denominator(denominator, mask, seed):
    q, k, v = inputs(30, seed)
    config = Expansion(None, denominator)
    close(taylor_attention(q, k, v, config=config, mask=mask), reference(q, k, v, config=config, mask=mask))


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("orders", [None, (0, 1, 2)])
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_padded_keys_and_gates_follow_the_definition(denominator, orders, form, mask, seed):
    if form == "recurrent" and (orders is None or denominator == "softmax"):
        pytest.skip("no recurrence")
    q, k, v = inputs(20, seed)
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(2, 20, generator=generator) < 0.6
    gate = torch.rand(2, 2, 20, generator=generator, dtype=torch.float64)
    options = {"key_padding": real, "gate": gate, "mask": mask}
    want = reference(q, k, v, config=Expansion(orders, denominator), **options)
    nan = k.masked_fill(~real[:, None, :, None], math.nan), v.masked_fill(~real[:, None, :, None], math.inf)
    close(taylor_attention(q, *nan, config=Expansion(orders, denominator, form), **options), want)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_order_one_alone_is_linear_attention(form, seed):
    q, k, v = inputs(50, seed)
    got = taylor_attention(q, k, v, config=Expansion((1,), "none", form), mask="causal", scale=1.0)
    close(got, (q @ k.mT).tril() @ v)


@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_order_zero_alone_is_the_running_mean_over_the_length(form, seed):
    q, k, v = inputs(50, seed)
    got = taylor_attention(q, k, v, config=Expansion((0,), "length", form), mask="causal")
    close(got, v.cumsum(2) / torch.arange(1, 51, dtype=torch.float64)[:, None])


@pytest.mark.parametrize("highest", [0, 2, 4, 8])
def test_even_orders_are_never_negative(highest):
    x = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    assert (weights(x, (highest,)) >= 0).all()
    assert (weights(x, tuple(range(highest + 1))) > 0).all()  # nor is a sum that ends with one
    assert (weights(x, (highest + 1,)) < 0).any()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("width", [3, 6])
def test_merged_tensor_powers_give_powers_of_the_product(order, width):
    q, k = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = Powers(order)
    close(features(q) @ features(k).T, (q @ k.T) ** order)
    assert features(q).shape[1] == math.comb(width + order - 1, order) <= width**order


@pytest.mark.parametrize("denominator", FINITE)
def test_pieces_and_steps_equal_one_call(denominator, seed):
    q, k, v = inputs(20, seed)
    config = Expansion((0, 1, 2), denominator)
    whole = taylor_attention(q, k, v, config=config, mask="causal")
    state, rows = None, []
    for piece in zip(*(t[:, :, :12].split([7, 0, 5], 2) for t in (q, k, v)), strict=True):
        out, state = taylor_attention(*piece, config=config, mask="causal", state=state, return_state=True)
        rows.append(out)
    for t in range(12, 20):
        out, state = step(q[:, :, t], k[:, :, t], v[:, :, t], state, config=config)
        rows.append(out[:, :, None])
    close(torch.cat(rows, 2), whole)


def test_norms_of_the_exponential_do_not_see_the_softmax(seed):
    q, k, v = inputs(30, seed)
    softmax = attention(q, k, v, mask="causal")
    close(taylor_attention(q, k, v, config=Expansion(None, "l2"), mask="causal"), F.normalize(softmax, dim=-1))
    got = taylor_attention(q, k, v, config=Expansion(None, "rms"), mask="causal")
    close(got, F.rms_norm(softmax, (3,), eps=0.0))
    got = taylor_attention(q, k, v, config=Expansion(None, "layer"), mask="causal")
    close(got, F.layer_norm(softmax, (3,), eps=0.0))


def test_large_scores_do_not_overflow(seed):
    q, k, v = (t.float() for t in inputs(30, seed, deviation=80.0))
    for config in (Expansion((0, 1, 2)), Expansion(None, "l2"), Expansion((0, 1, 2), "l2")):
        assert taylor_attention(q, k, v, config=config, mask="causal").isfinite().all()


@pytest.mark.parametrize(("tokens", "form"), [(20, "parallel"), (100, "recurrent")])
def test_the_cheaper_form_runs_by_itself(tokens, form, seed):
    q, k, v = inputs(tokens, seed, dtype=torch.float32)
    orders = (0, 1, 2)  # 15 features of 4 channels
    auto, chosen = (
        taylor_attention(q, k, v, config=Expansion(orders, "sum", f), mask="causal") for f in ("auto", form)
    )
    assert torch.equal(auto, chosen)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("form", ["parallel", "recurrent"])
def test_gradients_match_finite_differences(denominator, form, seed):
    if form == "recurrent" and denominator == "softmax":
        pytest.skip("no recurrence")
    leaves = [t.requires_grad_() for t in sample_qkv(1, 2, 6, width=2, dtype=torch.float64, seed=seed)]
    config = Expansion((0, 1, 2), denominator, form)
    assert torch.autograd.gradcheck(lambda q, k, v: taylor_attention(q, k, v, config=config, mask="causal"), leaves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"denominator": "softmaxx"}, "unknown denominator 'softmaxx': did you mean 'softmax'"),
        ({"form": "recurent"}, "unknown form 'recurent': did you mean 'recurrent'"),
        ({"orders": ()}, "orders: expected distinct numbers"),
        ({"orders": (0, 0)}, "orders: expected distinct numbers"),
        ({"orders": None, "denominator": "l2", "form": "recurrent"}, "form: 'recurrent' takes given orders"),
        ({"denominator": "softmax", "form": "recurrent"}, "form: 'recurrent' takes given orders"),
    ],
)
def test_a_wrong_expansion_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Expansion(**options)


def test_wrong_calls_are_refused():
    q, k, v = inputs(9, 0)
    with pytest.raises(ValueError, match=r"gate: expected shape \(B, H, Nq\) = \(2, 2, 9\), got \(2, 9\)"):
        taylor_attention(q, k, v, gate=torch.ones(2, 9))
    with pytest.raises(ValueError, match="state: only a causal call"):
        taylor_attention(q, k, v, config=Expansion((0, 1), "sum"), return_state=True)
    with pytest.raises(UnsupportedError, match="state: needs given orders"):
        taylor_attention(q, k, v, mask="causal", return_state=True)
    wide = [t.repeat(1, 1, 1, 32) for t in (q, k, v)]
    with pytest.raises(ValueError, match=r"orders: \(3,\) of D=128 channels take 357760 features"):
        taylor_attention(*wide, config=Expansion((3,), "none", "recurrent"))
    with pytest.raises(ValueError, match="did you mean 'blocked'"):
        taylor_attention(q, k, v, backend="bloked")


def test_an_expansion_without_end_has_no_width():
    with pytest.raises(ValueError, match="orders: all orders"):
        Expansion(None).width(4)
