"""Linear attention over feature maps: the sum form and the scan against all pairs, for every kind of map."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.features import FeatureMap, Pointwise, Positive, Softmax, Trigonometric, gaussian
from manyheads.common.scopes import active
from manyheads.mechanism.linear import linear_attention
from manyheads.mechanism.linear.kernelized import reference, step
from manyheads.testing import sample_qkv

W = gaussian(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
AVERAGED = {
    "elu": Pointwise(),
    "pair": (Softmax(), Pointwise("exp")),
    "random": Positive(W),
    "random-floor": Positive(W, hyperbolic=True, eps=0.01),
    "mixed": (Positive(W, eps=0.01), Positive(W.flip(0))),
}
SUMMED = {"identity": FeatureMap(), "trigonometric": Trigonometric(W), "logs": (Positive(W), Positive(W, eps=0.1))}
MASKS = {
    "full": None,
    "causal": "causal",
    "documents": Document([20, 0, 1, 9]),
    "causal-documents": Document([20, 0, 1, 9]) & Causal(),
}


def inputs(seed, **size):
    """Thirty tokens of four heads in float64."""
    given = {"kv_heads": 2, "width": 8, "value_width": 5, "dtype": torch.float64, "seed": seed} | size
    return sample_qkv(2, 4, 30, **given)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(
    ("features", "normalise"),
    [*((f, True) for f in AVERAGED.values()), *((f, False) for f in SUMMED.values())],
    ids=[*AVERAGED, *SUMMED],
)
def test_every_map_under_every_mask_equals_all_pairs(features, normalise, mask, padded, seed):
    q, k, v = inputs(seed)
    options = {"features": features, "normalise": normalise, "mask": mask, "scale": 0.3}
    if padded:
        options["key_padding"] = torch.rand(2, 30, generator=torch.Generator().manual_seed(seed)) < 0.7
    got, want = linear_attention(q, k, v, **options), reference(q, k, v, **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("features", "normalise"),
    [(Positive(W), True), ((Positive(W), Positive(W, eps=0.1)), False), (FeatureMap(), False)],
)
def test_steps_equal_the_scan(features, normalise, seed):
    q, k, v = inputs(seed)
    options = {"features": features, "normalise": normalise, "scale": 0.3}
    whole, state = linear_attention(q, k, v, mask="causal", return_state=True, **options)
    now, rows = None, []
    for t in range(30):
        row, now = step(q[:, :, t], k[:, :, t], v[:, :, t], now, **options)
        rows.append(row)
    torch.testing.assert_close(torch.stack(rows, 2), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(now, state, rtol=1e-9, atol=1e-9)


def test_a_negative_scale_turns_the_queries(seed):
    q, k, v = inputs(seed)
    features = Positive(W)
    torch.testing.assert_close(
        linear_attention(q, k, v, features=features, scale=-0.5),
        linear_attention(-q, k, v, features=features, scale=0.5),
    )


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_autocast_changes_nothing(mask, seed):
    q, k, v = (t.float() for t in inputs(seed))
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_attention(q, k, v, features=Positive(W.float()), mask=mask)
    assert torch.equal(got, linear_attention(q, k, v, features=Positive(W.float()), mask=mask))


@pytest.mark.parametrize("shape", [(0, 7), (7, 0)])
def test_no_queries_and_no_keys_are_calls_too(shape):
    q, k, v = (torch.ones(1, 2, n, 8) for n in (shape[0], shape[1], shape[1]))
    got = linear_attention(q, k, v)
    assert got.shape == (1, 2, shape[0], 8) and (got == 0).all()


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("features", [FeatureMap(), Trigonometric(W), (Pointwise(), FeatureMap())])
def test_features_of_any_sign_do_not_divide(features, mask):
    with pytest.raises(ValueError, match="normalise: the sum of weights divides only for positive features"):
        linear_attention(*inputs(0), features=features, mask=mask, scale=0.5)


def test_a_parallel_context_is_refused(monkeypatch):
    monkeypatch.setattr("manyheads.common.scopes.active", [*active, object()])
    with pytest.raises(ValueError, match="linear_attention: inside a parallel context"):
        linear_attention(*inputs(0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": torch.relu}, TypeError, "features: expected a FeatureMap"),
        ({"scale": math.nan}, ValueError, "scale: expected a finite number"),
        ({"key_padding": torch.ones(2, 30)}, TypeError, "key_padding: expected a bool tensor"),
        ({"return_state": True}, ValueError, "state: only a causal call has one"),
        ({"backend": "blokced"}, ValueError, "did you mean 'blocked'"),
        ({"mask": Document([3, 3])}, ValueError, "mask: documents must sum"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        linear_attention(*inputs(0), **options)
