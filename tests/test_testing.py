"""The test tools themselves: a budget that catches, poison that shows, seeds that replay."""

from __future__ import annotations

import datetime

import pytest
import torch

from manyheads import testing
from manyheads.testing import assert_within_budget, nan_poisoned, sample_qkv, seed_for, seed_of_the_day

EXACT = torch.linspace(-3, 3, 101, dtype=torch.float64)
INF = float("inf")


def test_rounding_once_is_within_budget():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_within_budget(EXACT.to(dtype), EXACT, EXACT.to(dtype))


def test_the_budget_grows_with_the_error_of_the_plain_reference():
    plain = EXACT.float() + 1e-3
    assert_within_budget(EXACT.float() + 1.9e-3, EXACT, plain)
    with pytest.raises(AssertionError, match="max error 0.0021 exceeds its budget 0.002"):
        assert_within_budget(EXACT.float() + 2.1e-3, EXACT, plain)


def test_a_small_error_everywhere_is_caught_by_the_second_norm():
    plain, actual = EXACT.float().clone(), EXACT.float() + 5e-4
    plain[0] += 1e-3
    with pytest.raises(AssertionError, match="Frobenius error"):
        assert_within_budget(actual, EXACT, plain)


def test_infinities_must_be_where_the_reference_has_them():
    exact = torch.tensor([-INF, 1.0], dtype=torch.float64)
    assert_within_budget(exact.float(), exact, exact.float())
    for wrong in ([0.0, 1.0], [INF, 1.0], [float("nan"), 1.0]):
        with pytest.raises(AssertionError, match="where that is not finite"):
            assert_within_budget(torch.tensor(wrong), exact, exact.float())
    for wrong in ([-INF, INF], [-INF, float("nan")]):
        with pytest.raises(AssertionError, match="1 of 1 values are not finite"):
            assert_within_budget(torch.tensor(wrong), exact, exact.float())


def test_shapes_and_dtypes_of_the_references_are_checked():
    with pytest.raises(TypeError, match="reference64: expected float64"):
        assert_within_budget(EXACT.float(), EXACT.float(), EXACT.float())
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(EXACT[:1].float(), EXACT, EXACT.float())


def test_nothing_to_compare_is_within_budget():
    assert_within_budget(torch.zeros(0), torch.zeros(0, dtype=torch.float64), torch.zeros(0))


def package_code(source):
    """Runs source as if it stood in a module of the package."""
    scope = {"__name__": "manyheads.somewhere", "torch": torch}
    exec(source, scope)
    return scope


@pytest.mark.parametrize(
    "allocation",
    [
        "torch.empty(3)",
        "torch.empty_like(torch.ones(3))",
        "torch.empty_strided((3,), (1,))",
        "torch.ones(2).new_empty(3)",
        "torch.empty(3, dtype=torch.bfloat16)",
    ],
)
def test_uninitialised_memory_of_the_package_is_poison(allocation):
    with nan_poisoned():
        assert package_code(f"x = {allocation}")["x"].isnan().all()


def test_poison_of_integers_is_their_largest_value():
    with nan_poisoned():
        assert package_code("x = torch.empty(2, dtype=torch.int32)")["x"].tolist() == [2**31 - 1] * 2


def test_poison_spares_other_code_and_ends_with_its_block():
    before = torch.empty, torch.Tensor.new_empty
    with nan_poisoned():
        assert package_code("x = torch.zeros(3)")["x"].eq(0).all()
        ours = torch.empty
        assert ours is not before[0]
    assert (torch.empty, torch.Tensor.new_empty) == before


def test_the_seed_is_the_day_unless_replayed(monkeypatch):
    monkeypatch.delenv(testing.SEED_VARIABLE, raising=False)
    assert seed_of_the_day() == datetime.date.today().toordinal()
    monkeypatch.setenv(testing.SEED_VARIABLE, "7")
    assert seed_of_the_day() == 7
    first = seed_for("a")
    monkeypatch.setenv(testing.SEED_VARIABLE, "8")
    assert seed_for("a") != first
    monkeypatch.setenv(testing.SEED_VARIABLE, "x")
    with pytest.raises(ValueError, match="MANYHEADS_SEED: expected an integer, got 'x'"):
        seed_of_the_day()


@pytest.mark.parametrize("deviation", [1.0, 8.0])
def test_sampled_logits_have_the_deviation_that_was_asked_for(deviation):
    q, k, _ = sample_qkv(2, 4, 128, width=64, deviation=deviation, seed=0)
    logits = q @ k.mT * 64**-0.5
    assert abs(logits.std().item() / deviation - 1) < 0.05


def test_every_dtype_samples_the_same_numbers():
    wide, narrow = (sample_qkv(dtype=dtype, seed=3) for dtype in (torch.float64, torch.bfloat16))
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(wide, narrow, strict=True))
