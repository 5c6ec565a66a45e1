"""Warm-up, gates and calibration files."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.mechanism import select
from manyheads.mechanism.select import Calibration, Warmup


@pytest.mark.parametrize(("dense", "ramp"), [(0, 0), (10, 0), (10, 7), (0, 100)])
def test_a_warm_up_goes_from_everything_to_what_is_kept_and_never_back(dense, ramp):
    warmup = Warmup(dense, ramp)
    kept = [warmup.keep(step, 5, blocks=23) for step in range(dense + ramp + 3)]
    assert kept[:dense] == [23] * dense and kept[dense + ramp :] == [5] * 3
    assert all(a >= b for a, b in zip(kept, kept[1:], strict=False))
    assert [warmup.is_dense(step) for step in range(dense + 2)] == [True] * dense + [False] * 2
    assert all(5 < n < 23 for n in kept[dense : dense + ramp]) or ramp > 17


def test_no_more_blocks_are_kept_than_there_are():
    assert {Warmup(2, 2).keep(step, 9, blocks=4) for step in range(7)} == {4}


def test_gates_weigh_branches_and_learn(generator):
    outs = [torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    for heads in (1, 3):
        gates = torch.rand(2, heads, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        wanted = sum(gates[..., i : i + 1] * out for i, out in enumerate(outs))
        torch.testing.assert_close(select.gated(outs, gates), wanted)
        assert torch.autograd.gradcheck(lambda g, *o: select.gated(o, g), (gates, *outs), fast_mode=True)
    half = [out.bfloat16() for out in outs]
    assert select.gated(half, torch.rand(2, 1, 5, 3)).dtype == torch.bfloat16


def test_a_straight_through_choice_is_hard_forward_and_soft_backward(generator):
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    hard = select.straight_through(logits, temperature=0.5)
    assert torch.equal(hard.detach().round(), torch.nn.functional.one_hot(logits.argmax(-1), 4).double())
    soft = (logits / 0.5).softmax(-1)
    wanted = torch.autograd.grad((soft * weight).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad((hard * weight).sum(), logits)[0], wanted)


VALUES = {"tau": [[0.1, 0.2, 0.3], [0.0, 1e-3, 4]], "unit": "ras"}
FOUND = Calibration("sale", "tiny@1", {"layers": 2, "heads": 3}, VALUES)


def test_a_calibration_comes_back_as_it_was(tmp_path):
    path = tmp_path / "sale.json"
    select.save(path, FOUND)
    got = select.load(path, mechanism="sale", model="tiny@1", shapes={"heads": 3, "layers": 2})
    assert got == FOUND and path.stat().st_size < 1000
    again = tmp_path / "again.json"
    Calibration("sale", "tiny@1", {"heads": 3, "layers": 2}, dict(reversed(FOUND.values.items()))).save(again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"mechanism": "pbs"}, "mechanism: the calibration is for 'sale', not for 'pbs'"),
        ({"model": "tiny@2"}, "model: the calibration is for 'tiny@1', not for 'tiny@2'; calibrate again"),
        ({"shapes": {"heads": 4}}, "shapes: heads of the calibration is 3, of this model 4"),
        ({"shapes": {"width": 64}}, "shapes: width of the calibration is not named, of this model 64"),
    ],
)
def test_a_calibration_serves_nothing_else(tmp_path, asked, message):
    FOUND.save(tmp_path / "c.json")
    with pytest.raises(ValueError, match=message):
        select.load(tmp_path / "c.json", **{"mechanism": "sale", "model": "tiny@1"} | asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: "not json", "is no calibration file"),
        (lambda c: "[1, 2]", "is no calibration file"),
        (lambda c: json.dumps({"weights": 3}), "does not say 'manyheads calibration'"),
        (lambda c: json.dumps(c | {"version": 2}), "has version 2; this library reads version 1"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "values"}), "damaged: values is missing"),
        (lambda c: json.dumps(c | {"shapes": [3]}), "damaged: shapes and values must be tables"),
        (lambda c: json.dumps(c | {"values": {"tau": [float("nan")]}}), r"values\['tau'\]\[0\]: expected a finite"),
    ],
)
def test_a_file_that_is_damaged_or_none_says_so(tmp_path, change, message):
    path = tmp_path / "c.json"
    FOUND.save(path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        select.load(path, mechanism="sale", model="tiny@1")


OUT = torch.ones(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Calibration(" ", "m", {}, {}), ValueError, "mechanism: expected a name"),
        (lambda: Calibration("sale", "", {}, {}), ValueError, "model: expected a name"),
        (lambda: Calibration("sale", "m", {"heads": 0}, {}), ValueError, r"shapes\['heads'\]: expected a positive"),
        (lambda: Calibration("sale", "m", {"heads": 2.0}, {}), ValueError, r"shapes\['heads'\]: expected a positive"),
        (lambda: Calibration("sale", "m", {}, {"a": [torch.ones(1)]}), TypeError, r"values\['a'\]\[0\]: expected"),
        (lambda: Calibration("sale", "m", {}, {"a": {"b": float("inf")}}), ValueError, r"values\['a'\]\['b'\]"),
        (lambda: Warmup(-1), ValueError, "dense: expected a number of steps"),
        (lambda: Warmup(1, -1), ValueError, "ramp: expected a number of steps"),
        (lambda: Warmup(1).keep(-1, 2, blocks=3), ValueError, "step: expected"),
        (lambda: Warmup(1).keep(1, 0, blocks=3), ValueError, "keep: expected at least 1"),
        (lambda: Warmup(1).keep(1, 2, blocks=0), ValueError, "blocks: expected at least 1"),
        (lambda: select.gated([OUT], torch.ones(1, 2, 3, 2)), ValueError, r"gates: expected \(B, H|1, N, O=1\)"),
        (lambda: select.gated([OUT, OUT[..., :2]], torch.ones(1, 2, 3, 2)), ValueError, r"outs\[1\]: shape"),
        (lambda: select.gated([OUT], torch.ones(1, 3, 3, 1)), ValueError, r"outs\[0\]: shape"),
        (lambda: select.straight_through(OUT, temperature=0.0), ValueError, "temperature: expected a positive"),
    ],
)
def test_wrong_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
