"""A row keeps its promises: flat, whole, and no speed-up without fidelity."""

from __future__ import annotations

import dataclasses
import json

import pytest

from manyheads.bench.row import Row, against


def test_a_row_is_one_flat_json_object_that_reads_back():
    row = Row("masks", "causal", "sdpa", median_ms=1.5, rounds=5, gate="green", noisy=False, seed=7)
    values = json.loads(row.to_json())
    assert values.pop("kind") == "row"
    assert all(isinstance(v, str | int | float | bool) for v in values.values())
    assert Row.from_dict(values) == row


def test_every_field_of_a_row_is_described():
    text = Row.__doc__ or ""
    assert [f.name for f in dataclasses.fields(Row) if f"        {f.name}: " not in text] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"status": "maybe"},
        {"gate": "blue"},
        {"status": "refused"},
        {"ratio": 2.0},
        {"ratio": 2.0, "gate": "red"},
    ],
)
def test_a_row_that_breaks_a_rule_cannot_be_made(changes):
    with pytest.raises(ValueError, match="status|gate|ratio|reason"):
        Row("masks", "causal", "sdpa", **changes)


def test_fields_of_a_newer_version_are_an_error_not_a_loss():
    with pytest.raises(ValueError, match="newer"):
        Row.from_dict({"suite": "s", "case": "c", "provider": "p", "wings": 2})
    with pytest.raises(ValueError, match="provider"):
        Row.from_dict({"suite": "s", "case": "c"})


@pytest.mark.parametrize("mine", ["green", "red", "unchecked"])
@pytest.mark.parametrize("theirs", ["green", "red", "unchecked"])
def test_a_red_gate_on_either_side_makes_the_ratio_disappear(mine, theirs):
    ours = Row("masks", "causal", "manyheads", median_ms=2.0, gate=mine)
    judged = against(ours, Row("masks", "causal", "sdpa", median_ms=5.0, gate=theirs))
    assert judged.baseline == "sdpa"
    assert judged.ratio == (2.5 if mine == theirs == "green" else None)


def test_nothing_that_json_cannot_hold_reaches_a_file():
    with pytest.raises(ValueError):
        Row("masks", "causal", "sdpa", error=float("nan")).to_json()
