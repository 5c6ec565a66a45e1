"""Test-time regression: every layer of the registry, in parallel and token by token, and what tells them apart."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document, attention
from manyheads.common.errors import UnsupportedError
from manyheads.common.features import Pointwise
from manyheads.engine.scan import scan
from manyheads.mechanism.regression import LAYERS, Regression, find_layer, regress
from manyheads.mechanism.regression.framework import reference, shifted, step

RECURRENT = [name for name, layer in LAYERS.items() if layer.recurrent]
HEADS = {name: 2 if name == "momentum-delta" else 4 for name in LAYERS}
BORDERS = Document([9, 0, 21]) & Causal()


def draw(generator, name, n=30, d=4, dv=3):
    """Inputs in float64 and the gates that a layer takes."""
    heads = HEADS[name]
    q, k, v = (torch.randn(2, h, n, w, generator=generator, dtype=torch.float64)
               for h, w in ((heads, d), (2, d), (2, dv)))  # fmt: skip
    k = torch.nn.functional.normalize(k, dim=-1)
    layer = LAYERS[name]
    rows = 2 if layer.kind == "exact" else heads
    beta, momentum = (torch.rand(2, heads, n, generator=generator, dtype=torch.float64) for _ in range(2))
    every = {"beta": beta, "momentum": 0.8 * momentum, "decay": -0.1 * beta[:, :rows]}
    return (q, k, v), {gate: every[gate] for gate in (*layer.needs, *layer.takes)}


@pytest.mark.parametrize("mask", [None, BORDERS], ids=["causal", "packed"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_its_formula(name, mask, generator):
    inputs, gates = draw(generator, name)
    for extra in ({}, {"shift": True}, {"features": Pointwise("elu+1")}):
        config = Regression(name, ridge=0.3, **extra)
        got = regress(*inputs, config=config, mask=mask, scale=0.7, **gates)
        want = reference(*inputs, config=config, mask=mask, scale=0.7, **gates)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("features", [None, Pointwise("relu")], ids=["plain", "features"])
@pytest.mark.parametrize("name", RECURRENT)
def test_the_recurrent_form_is_the_parallel_form(name, features, generator):
    inputs, gates = draw(generator, name)
    config = Regression(name, features=features)
    want, end = regress(*inputs, config=config, scale=0.5, return_state=True, **gates)
    state, rows = None, []
    for t in range(inputs[0].shape[2]):
        now = {gate: x[:, :, t] for gate, x in gates.items()}
        row, state = step(*(x[:, :, t] for x in inputs), state, config=config, scale=0.5, **now)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, 2), want, rtol=1e-7, atol=1e-8)
    for a, b in zip(state, end, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_no_tokens_are_legal(name, generator):
    (q, k, v), gates = draw(generator, name, n=0)
    assert regress(q, k, v, config=Regression(name, shift=True), **gates).shape == (*q.shape[:3], 3)


@pytest.mark.parametrize("name", LAYERS)
def test_no_layer_sees_the_future(name, generator):
    inputs, gates = draw(generator, name)
    changed = [t.clone() for t in inputs]
    for t in changed[1:]:
        t[:, :, 20:] += 1.0
    a, b = (regress(*x, config=Regression(name), **gates)[:, :, :20] for x in (inputs, changed))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def orthonormal(generator, n=16, d=16, dv=3):
    """Keys that are the rows of an orthogonal matrix, values, and queries in another order."""
    k, _ = torch.linalg.qr(torch.randn(2, 2, d, d, generator=generator, dtype=torch.float64))
    v = torch.randn(2, 2, n, dv, generator=generator, dtype=torch.float64)
    return k[:, :, :n], v


def test_orthonormal_keys_make_least_squares_linear_attention(generator):
    k, v = orthonormal(generator)
    q = torch.randn(k.shape, generator=generator, dtype=torch.float64)
    linear = regress(q, k, v, config=Regression("linear-attention"))
    for ridge in (1e-6, 0.5):
        got = regress(q, k, v, config=Regression("least-squares", ridge=ridge))
        torch.testing.assert_close(got, linear / (1.0 + ridge), rtol=1e-7, atol=1e-9)
    skewed = torch.nn.functional.normalize(k + 0.3, dim=-1)
    apart = regress(q, skewed, v, config=Regression(ridge=1e-6)) - scan(q, skewed, v)
    assert apart.abs().max() > 0.1  # the covariance of the keys counts, once there is one


def test_orthonormal_keys_make_the_delta_rule_recall_exactly(generator):
    k, v = orthonormal(generator)
    ones = torch.ones(2, 2, 16, dtype=torch.float64)
    _, state = regress(k, k, v, config=Regression("delta"), beta=ones, return_state=True)
    torch.testing.assert_close(k @ state.S, v)
    # an old key with a new value overwrites exactly, and nothing else
    new = torch.randn(2, 2, 1, 3, generator=generator, dtype=torch.float64)
    again = regress(k[:, :, :1], k[:, :, 4:5], new, config=Regression("delta"), beta=ones[:, :, :1], state=state,
                    return_state=True)[1]  # fmt: skip
    want = torch.cat([v[:, :, :4], new, v[:, :, 5:]], 2)
    torch.testing.assert_close(k @ again.S, want)


def test_least_squares_recalls_after_interference_and_linear_attention_does_not(generator):
    d = 12
    k = torch.nn.functional.normalize(torch.randn(2, 2, d, d, generator=generator, dtype=torch.float64) + 1.0, dim=-1)
    v = torch.randn(2, 2, d, 5, generator=generator, dtype=torch.float64)
    assert (k @ k.mT).triu(1).abs().max() > 0.5  # far from orthogonal
    ones = torch.ones(2, 2, d, dtype=torch.float64)
    _, fit = regress(k, k, v, config=Regression(ridge=1e-10), return_state=True)
    _, delta = regress(k, k, v, config=Regression("delta"), beta=ones, return_state=True)
    _, plain = regress(k, k, v, config=Regression("linear-attention"), return_state=True)
    error = {name: (k @ M - v).square().mean().sqrt().item()
             for name, M in (("exact", fit.M), ("delta", delta.S), ("one step", plain.S))}  # fmt: skip
    assert error["exact"] < 1e-5
    assert error["delta"] > 0.05 and error["one step"] > 1.0


def test_one_layer_with_shifted_keys_answers_what_followed(generator):
    """Multi-query associative recall: pairs of tokens, then the first of each again in another order."""
    d, pairs = 32, 7
    # token embeddings that share a direction, as learned ones do
    table = torch.nn.functional.normalize(0.5 + torch.randn(40, d, generator=generator, dtype=torch.float64), dim=-1)
    names, values = torch.randperm(40, generator=generator)[: 2 * pairs].split(pairs)
    asked = torch.randperm(pairs, generator=generator)
    x = table[torch.cat([torch.stack([names, values], 1).flatten(), names[asked]])][None, None]

    def right(name, shift=True):
        out = regress(x, x, x, config=Regression(name, ridge=1e-6, shift=shift))[0, 0, 2 * pairs :]
        return int(((out @ table.T).argmax(-1) == values[asked]).sum())

    assert right("least-squares") == pairs
    assert right("least-squares", shift=False) == 0  # a token finds itself
    assert right("linear-attention") < pairs


def test_shifted_keys_do_not_cross_borders(generator):
    k = torch.randn(2, 3, 10, 4, generator=generator)
    got = shifted(k, torch.tensor([4, 0, 6]))
    assert (got[:, :, [0, 4]] == 0).all()
    torch.testing.assert_close(got[:, :, [1, 2, 3, 5, 6, 7, 8, 9]], k[:, :, [0, 1, 2, 4, 5, 6, 7, 8]])


def test_softmax_is_the_local_constant(generator):
    (q, k, v), _ = draw(generator, "softmax")
    got = regress(q, k, v, config=Regression("softmax"))
    torch.testing.assert_close(got, attention(q, k, v, mask="causal"))
    torch.testing.assert_close(regress(q, k, v, config=Regression("softmax"), mask="full"), attention(q, k, v))


def test_keys_of_one_length_make_the_exponential_a_distance(generator):
    (q, k, v), _ = draw(generator, "softmax")
    q = torch.nn.functional.normalize(q, dim=-1)
    kernel = torch.exp(-0.5 * torch.cdist(q, k.repeat_interleave(2, 1)).square()).tril()
    want = kernel / kernel.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(regress(q, k, v, config=Regression("softmax"), scale=1.0), want)


def test_the_implicit_step_is_the_minimum_it_stands_for(generator):
    """Longhorn: M minimises |M - M'|^2 + beta |M^T k - v|^2."""
    (q, k, v), gates = draw(generator, "longhorn", n=2)
    k = 3.0 * k
    _, before = regress(*(t[:, :, :1] for t in (q, k, v)), config=Regression("longhorn"),
                        beta=gates["beta"][:, :, :1], return_state=True)  # fmt: skip
    _, after = regress(q, k, v, config=Regression("longhorn"), beta=gates["beta"], return_state=True)
    M = after.S.clone().requires_grad_()
    keys, values = (t[:, :, 1].repeat_interleave(2, 1) for t in (k, v))
    miss = (keys[..., None, :] @ M)[..., 0, :] - values
    loss = (M - before.S).square().sum() + (gates["beta"][:, :, 1] * miss.square().sum(-1)).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, M)[0], torch.zeros_like(M), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_found_by_their_choices(name):
    layer = LAYERS[name]
    assert find_layer(layer.weights, layer.functions, layer.optimiser) is layer
    assert layer.formula and layer.known_as


def test_choices_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="unknown weights of a regression 'unifrom': did you mean 'uniform'"):
        find_layer("unifrom")
    with pytest.raises(ValueError, match="unknown optimiser of a regression 'adam'"):
        find_layer("uniform", optimiser="adam")
    with pytest.raises(ValueError, match="no layer has weights 'kernel', functions 'constant' and optimiser 'sgd'"):
        find_layer("kernel", "constant", "sgd")


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("delta", {"beta": None}, ValueError, "beta: layer 'delta' needs it"),
        ("least-squares", {"beta": 1}, ValueError, "beta: of no use to layer 'least-squares', which takes no gates"),
        ("softmax", {"decay": 1}, ValueError, "decay: of no use to layer 'softmax'"),
        ("softmax", {"return_state": True}, UnsupportedError, "layer 'softmax' has no state; keep its keys and values"),
        ("local-linear", {"scale": 0.0}, ValueError, "scale: a kernel layer needs a positive scale"),
        ("delta", {"mask": "window(3)"}, UnsupportedError, "test-time-regression does not support mask"),
        ("delta", {"backend": "bloked"}, ValueError, "did you mean 'blocked'"),
        ("least-squares", {"backend": "reference"}, UnsupportedError, "'least-squares' has no choice of backends"),
    ],
)
def test_wrong_input_is_named(name, options, error, match, generator):
    inputs, gates = draw(generator, name)
    options = {k: torch.ones(2, 4, 30, dtype=torch.float64) if v == 1 and k != "return_state" else v
               for k, v in options.items()}  # fmt: skip
    with pytest.raises(error, match=match):
        regress(*inputs, config=Regression(name), **gates | options)


def test_a_state_and_shifted_keys_do_not_go_together(generator):
    inputs, _ = draw(generator, "least-squares")
    config = Regression(shift=True)
    with pytest.raises(UnsupportedError, match="a state does not hold the key before it"):
        regress(*inputs, config=config, return_state=True)
    with pytest.raises(UnsupportedError, match="shifted keys cannot be stepped"):
        step(*(t[:, :, 0] for t in inputs), config=config)
    with pytest.raises(UnsupportedError, match="layer 'softmax' cannot be stepped"):
        step(*(t[:, :, 0] for t in inputs), config=Regression("softmax"))
