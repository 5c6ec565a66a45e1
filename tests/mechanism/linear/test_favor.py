"""Performers: what random features promise, the two forms of the average, the module, and independent code."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import Causal, Document, attention, nn
from manyheads.common.features import Positive, Trigonometric, gaussian, orthogonal
from manyheads.mechanism.linear import Performer, favor_attention
from manyheads.mechanism.linear.favor import reference, step
from manyheads.testing import sample_qkv

DRAWS = {"orthogonal": orthogonal, "independent": gaussian}


def fixed(seed=0):
    """A generator whose draws are the same every day: statistical bounds hold for it or do not."""
    return torch.Generator().manual_seed(seed)


def products(fmap, draw, q, k, *, draws):
    """Products of features of pairs under many draws of as many directions as channels, ``(draws, pairs)``."""
    d = q.shape[1]
    rows = draw(draws * d, d, generator=fixed(5), dtype=torch.float64)
    return torch.stack([(fmap(w)(q) * fmap(w)(k)).sum(-1) for w in rows.split(d)])


def tokens(count, width, size, seed):
    """Normal vectors in float64, the same every day."""
    return size * torch.randn(count, width, generator=fixed(seed), dtype=torch.float64)


@pytest.mark.parametrize("hyperbolic", [False, True])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_products_of_features_estimate_the_kernel_within_their_standard_error(draw, hyperbolic):
    q, k = tokens(15, 8, 0.3, 1), tokens(15, 8, 0.3, 2)  # larger ones have tails, and no normal limit
    found = products(lambda w: Positive(w, hyperbolic), draw, q, k, draws=1500)
    error = (found.mean(0) - (q * k).sum(-1).exp()).abs()
    assert (error < 4 * found.std(0) / math.sqrt(len(found))).all()


@pytest.mark.parametrize("hyperbolic", [False, True])
def test_orthogonal_directions_err_less_than_independent_ones(hyperbolic):
    q, k = tokens(40, 8, 0.5, 1), tokens(40, 8, 0.5, 2)
    want = (q * k).sum(-1).exp()
    error = {}
    for name, draw in DRAWS.items():
        found = products(lambda w: Positive(w, hyperbolic), draw, q, k, draws=1500)
        error[name] = float(((found - want) / want).square().mean())
    assert error["orthogonal"] < 0.95 * error["independent"]


def test_hyperbolic_features_err_less_than_as_many_positive_ones():
    q, k = tokens(40, 8, 0.5, 1), tokens(40, 8, 0.5, 2)
    found = {h: products(lambda w, h=h: Positive(w, h), gaussian, q, k, draws=1500) for h in (False, True)}
    paired = (found[False][::2] + found[False][1::2]) / 2  # two draws of 8 against one draw of 8 and its negatives
    assert found[True].var(0).mean() < paired.var(0).mean()


def test_positive_features_are_quiet_where_the_kernel_is_small():
    one = torch.nn.functional.normalize(tokens(10, 8, 1.0, 1), dim=1)
    noise = []
    for size in (1.0, 2.0, 3.0):
        q, k = size * one, -size * one
        positive = products(Positive, gaussian, q, k, draws=400).std(0).mean()
        trigonometric = products(Trigonometric, gaussian, q, k, draws=400).std(0).mean()
        noise.append((float(positive), float(trigonometric)))
    quiet, loud = zip(*noise, strict=True)
    assert quiet[0] > quiet[1] > quiet[2] and quiet[2] < 1e-4  # the kernel is exp(-9)
    assert loud[0] < loud[1] < loud[2] and loud[2] > 100


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "relu"])
def test_positive_features_are_positive(kernel):
    from manyheads.mechanism.linear.favor import features_of

    features = features_of(orthogonal(32, 8, generator=fixed()), kernel, None)(tokens(100, 8, 2.0, 1).float())
    assert (features > 0).all()


def test_blocks_of_directions_are_orthogonal():
    core = Performer(16, 40, generator=fixed())
    for block in core.projection.double().split(16):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "relu"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_recurrence_equals_the_masked_parallel_form(kernel, kv_heads, seed):
    size = {"kv_heads": kv_heads, "width": 8, "value_width": 5, "deviation": 4.0, "dtype": torch.float64, "seed": seed}
    q, k, v = sample_qkv(2, 4, 75, **size)
    options = {"projection": orthogonal(12, 8, generator=fixed(), dtype=torch.float64), "kernel": kernel}
    got, state = favor_attention(q, k, v, mask="causal", return_state=True, **options)
    torch.testing.assert_close(got, reference(q, k, v, mask="causal", **options), rtol=1e-10, atol=1e-10)
    now, rows = None, []
    for t in range(75):
        row, now = step(q[:, :, t], k[:, :, t], v[:, :, t], now, **options)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, 2), got, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(now, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("kernel", ["positive", "hyperbolic"])
def test_many_features_approach_softmax_attention(kernel, mask):
    q, k, v = sample_qkv(1, 2, 40, width=8, dtype=torch.float64, seed=3)
    q, k = 0.5 * q, 0.5 * k  # the variance grows with the exponential of the squared norms
    want, errors = attention(q, k, v, mask=mask), []
    for features in (64, 1024, 16384):
        w = orthogonal(features, 8, generator=fixed(), dtype=torch.float64)
        got = favor_attention(q, k, v, projection=w, kernel=kernel, mask=mask, eps=0.0)
        errors.append(float((got - want).square().mean().sqrt()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # four times less is expected of each step
    assert errors[2] < 0.02


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "relu"])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_equal_each_alone(kernel, causal, seed):
    lengths = [9, 0, 1, 30]
    q, k, v = sample_qkv(1, 2, 40, width=4, deviation=6.0, dtype=torch.float64, seed=seed)
    options = {"projection": gaussian(7, 4, generator=fixed(), dtype=torch.float64), "kernel": kernel}
    own = "causal" if causal else "full"
    mask = Document(lengths) & Causal() if causal else Document(lengths)
    documents = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    alone = [favor_attention(*document, mask=own, **options) for document in documents]
    got = favor_attention(q, k, v, mask=mask, **options)
    torch.testing.assert_close(got, torch.cat(alone, 2), rtol=1e-9, atol=1e-9)


def test_a_document_of_tiny_weights_is_not_drowned_by_its_neighbour(seed):
    q, k, v = sample_qkv(1, 2, 30, width=4, seed=seed)
    k[:, :, 15:] *= 60.0  # weights below exp(-200) of those before
    options = {"projection": gaussian(7, 4, generator=fixed()), "eps": 0.0}
    got = favor_attention(q, k, v, mask=Document([15, 15]), **options)
    alone = favor_attention(q[:, :, 15:], k[:, :, 15:], v[:, :, 15:], **options)
    torch.testing.assert_close(got[:, :, 15:], alone, rtol=1e-3, atol=1e-3)
    assert alone.abs().sum() > 0


def test_later_keys_have_no_influence_whatever_their_size(seed):
    q, k, v = sample_qkv(1, 2, 60, width=8, dtype=torch.float64, seed=seed)
    w = orthogonal(12, 8, generator=fixed(), dtype=torch.float64)
    before = favor_attention(q, k, v, projection=w, mask="causal")[:, :, :40]
    k[:, :, 40:] *= 5.0
    after = favor_attention(q, k, v, projection=w, mask="causal")[:, :, :40]
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


def test_a_long_sequence_outside_of_recording_equals_the_recorded_one(seed):
    q, k, v = sample_qkv(1, 4, 1500, kv_heads=2, width=8, deviation=5.0, dtype=torch.float64, seed=seed)
    options = {"projection": orthogonal(12, 8, generator=fixed(), dtype=torch.float64)}
    with torch.no_grad():
        pieces = favor_attention(q, k, v, **options)
    at_once = favor_attention(q.requires_grad_(), k, v, **options)
    torch.testing.assert_close(pieces, at_once, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "positve"}, "unknown kernel of a Performer 'positve': did you mean 'positive'"),
        ({"projection": None}, "projection: kernel 'positive' needs random directions"),
        ({"projection": torch.ones(3, 5)}, r"projection: expected shape \(m, D=16\), got \(3, 5\)"),
        ({"eps": -1.0}, "eps: expected a number from 0"),
        ({"scale": math.inf}, "scale: expected a finite number"),
        ({"return_state": True}, "state: only a causal call has one"),
        ({"backend": "bloked"}, "did you mean 'blocked'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    q, k, v = sample_qkv(seed=0)
    with pytest.raises(ValueError, match=message):
        favor_attention(q, k, v, **{"projection": torch.ones(3, 16)} | options)


def test_directions_are_drawn_anew_on_schedule_and_only_in_training():
    core = Performer(8, 16, redraw_every=4, generator=fixed())
    drawn = []
    for _ in range(9):
        before = core.projection.clone()
        assert core.advance(fixed(len(drawn))) is not torch.equal(before, core.projection)
        drawn.append(not torch.equal(before, core.projection))
    assert drawn == [False, False, False, True, False, False, False, True, False]
    core.eval()
    before = core.projection.clone()
    assert not any(core.advance() for _ in range(10)) and torch.equal(before, core.projection)
    never = Performer(8, redraw_every=None)
    assert not any(never.advance() for _ in range(10))


def test_directions_and_schedule_are_saved_with_the_model():
    core, other = Performer(8, 16, redraw_every=4, generator=fixed(1)), Performer(8, 16, redraw_every=4)
    core.advance()
    other.load_state_dict(core.state_dict())
    assert torch.equal(core.projection, other.projection) and int(other.steps) == 1
    assert not list(core.parameters())


@pytest.mark.parametrize("width", [1, 2, 16, 64])
def test_the_default_number_of_features_is_that_of_the_published_code(width):
    assert Performer(width).projection.shape == (max(int(width * math.log(width)), 1), width)


@pytest.mark.parametrize("causal", [False, True])
def test_the_core_goes_into_the_attention_layer(causal, seed):
    torch.manual_seed(seed)
    layer = nn.Attention(32, 4, kv_heads=2, batch_first=True, core=Performer(8, 20, causal=causal))
    x = torch.randn(2, 11, 32, requires_grad=True)
    real = torch.arange(11) < torch.tensor([[11], [7]])
    out, _ = layer(x, key_padding_mask=~real)
    short, _ = layer(x[1:, :7])
    torch.testing.assert_close(out[1:, :7], short, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert x.grad.abs().sum() > 0
    if causal:
        torch.testing.assert_close(layer(x[:, :5])[0], layer(x)[0][:, :5], rtol=1e-4, atol=1e-5)


def test_the_core_steps(seed):
    q, k, v = sample_qkv(1, 2, 6, width=8, seed=seed)
    core, state = Performer(8, 20, causal=True), None
    whole = core(q, k, v)
    for t in range(6):
        row, state = core.step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        torch.testing.assert_close(row, whole[:, :, t], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kernel": "reul"}, "did you mean 'relu'"), ({"redraw_every": 0}, "redraw_every: expected")],
)
def test_a_wrong_core_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Performer(8, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_performer_pytorch(causal, seed):
    theirs = pytest.importorskip("performer_pytorch.performer_pytorch")
    q, k, v = sample_qkv(2, 3, 50, width=8, seed=seed)
    w = orthogonal(20, 8, generator=fixed())
    phi = [theirs.softmax_kernel(t, projection_matrix=w, is_query=t is q, eps=0.0) for t in (q, k)]
    average = theirs.linear_attention
    if causal:
        average = lambda *args: theirs.causal_linear_attention_noncuda(*args, eps=0.0)  # noqa: E731
    got = favor_attention(q, k, v, projection=w, eps=0.0, mask="causal" if causal else None)
    torch.testing.assert_close(got, average(*phi, v), rtol=1e-3, atol=1e-4)
