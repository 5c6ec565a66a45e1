"""Declarations: checked when made, refused when exceeded, found without being listed anywhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from manyheads import spec as specs
from manyheads.common.errors import UnsupportedError
from manyheads.spec import Size, Spec, drawn, qkv


def make(**changes):
    """A valid declaration with some fields replaced."""
    fields = {
        "fn": torch.nn.functional.scaled_dot_product_attention,
        "reference": torch.nn.functional.scaled_dot_product_attention,
        "paper": "none",
        "inputs": qkv(),
        "supports": {"noncausal_self", "backward"},
    }
    return Spec(changes.pop("slug", "made-up"), **(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slug": "Made_Up"}, "slug: expected"),
        ({"hf_name": "flash_made_up"}, "hf_name: may contain neither"),
        ({"hf_name": "me/made-up"}, "hf_name: may contain neither"),
        ({"supports": {"backwards"}}, "unknown capability 'backwards': did you mean 'backward'"),
        ({"supports": {"backwards": False}}, "unknown capability 'backwards'"),
        ({"backends": ("block",)}, "unknown backend 'block': did you mean 'blocked'"),
        ({"invariances": ("pack",)}, "unknown invariance"),
        ({"axes": {"kernels": "exp"}}, "unknown axis 'kernels': did you mean 'kernel'"),
        ({"gates": {"decay": "BHT"}}, "unknown axis letter of gate 'decay' 'T'"),
        ({"supports": {"decode"}}, "step: 'decode' is declared"),
        ({"step": print}, "step: it is given, but 'decode' is not declared"),
        ({"invariances": ("own_selected",)}, "selection: none is given, but own_selected is promised"),
        ({"evidence": {0: "test_a::test_b"}}, "check numbers from 1"),
        ({"evidence": {1: "test_a.test_b"}}, "expected 'test_file::test_name'"),
    ],
)
def test_a_wrong_declaration_says_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("name", ["fn", "reference", "inputs", "flops", "bytes"])
def test_what_is_called_must_be_callable(name):
    with pytest.raises(TypeError, match=f"{name}: expected a callable, got int"):
        make(**{name: 3})


@pytest.mark.parametrize("name", ["step", "selection"])
def test_a_step_and_a_selection_must_be_callable(name):
    with pytest.raises(TypeError, match=f"{name}: expected a callable or None, got int"):
        make(**{name: 3}, supports={"decode"})


def test_a_declaration_cannot_change():
    spec = make(evidence={1: "test_a::test_b"}, axes={"kernel": "exp"}, gates={"decay": "BHN"})
    with pytest.raises(TypeError):
        spec.gates["beta"] = "BHN"
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.slug = "other"
    with pytest.raises(TypeError):
        spec.evidence[2] = ("test_a::test_c",)


def test_capabilities_may_come_as_a_mapping():
    spec = make(supports={"gqa": True, "decode": False})
    assert spec.declares("gqa") and not spec.declares("decode")


def test_evidence_takes_one_test_or_several():
    spec = make(evidence={1: "test_a::test_b", 2: ["tests/x/test_a.py::TestC::test_d", "test_e::test_f"]})
    assert spec.evidence == {
        1: ("test_a::test_b",),
        2: ("tests/x/test_a.py::TestC::test_d", "test_e::test_f"),
    }


def call(size, **asked):
    """Checks a call of this size against a declaration that supports almost nothing."""
    case = qkv()(size)
    make().check(case.q, case.k, case.v, **asked)


@pytest.mark.parametrize(
    ("size", "asked", "capability"),
    [
        (Size(), {"causal": True}, "causal_self"),
        (Size(keys=40), {}, "noncausal_cross"),
        (Size(keys=40), {"causal": True}, "causal_cross"),
        (Size(heads=4, kv_heads=2), {}, "gqa"),
        (Size(value_width=8), {}, "value_width"),
        (Size(), {"lse": True}, "lse"),
        (Size(), {"softcap": 30.0}, "softcap"),
        (Size(), {"bias": torch.zeros(1)}, "bias"),
    ],
)
def test_a_call_that_needs_more_than_declared_is_refused(size, asked, capability):
    with pytest.raises(UnsupportedError, match=f"^made-up does not support {capability} .*: .*exact"):
        call(size, **asked)


def test_a_call_within_the_declaration_passes():
    call(Size(), lse=False, softcap=None, bias=None, dropout=0.0)


def test_gradients_are_refused_only_where_something_needs_them():
    case = qkv()(Size())
    spec = make(supports={"noncausal_self"})
    spec.check(case.q, case.k, case.v)
    with pytest.raises(UnsupportedError, match="made-up does not support backward"):
        spec.check(case.q.requires_grad_(), case.k, case.v)
    with torch.no_grad():
        spec.check(case.q, case.k, case.v)


def test_inputs_have_the_size_that_was_asked_for():
    size = Size(batch=3, heads=6, kv_heads=2, queries=5, keys=9, width=4, value_width=7, dtype=torch.bfloat16)
    case = qkv(mask="causal", keep=lambda size: size.keys // 3)(size)
    assert case.q.shape == (3, 6, 5, 4) and case.k.shape == (3, 2, 9, 4) and case.v.shape == (3, 2, 9, 7)
    assert case.q.dtype == torch.bfloat16
    assert case.options == {"mask": "causal", "keep": 3}


def test_gates_are_drawn_alike_for_one_seed_and_differ_by_salt():
    size = Size(batch=3, heads=4, kv_heads=2, queries=5, keys=9, width=6, value_width=7, seed=3)
    assert drawn("BHNQDEG")(size).shape == (3, 4, 9, 5, 6, 7, 2)
    assert torch.equal(drawn("BHN")(size), drawn("BHN")(size))
    assert not torch.equal(drawn("BHN")(size), drawn("BHN", salt=1)(size))
    with pytest.raises(ValueError, match="unknown axis letter 'T'"):
        drawn("BT")


def test_gates_stay_float32_in_half_precision_unless_told():
    half = Size(dtype=torch.bfloat16)
    assert drawn("H", torch.sigmoid)(half).dtype == torch.float32
    assert drawn("H", wide=False)(half).dtype == torch.bfloat16
    assert drawn("H")(Size(dtype=torch.float64)).dtype == torch.float64


def test_the_registry_holds_what_lies_in_the_mechanism_folder():
    found = specs.registry()
    assert {"exact", "neighborhood"} <= set(found)
    assert all(slug == spec.slug for slug, spec in found.items())


def test_an_unknown_mechanism_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown mechanism 'exatc': did you mean 'exact'"):
        specs.find("exatc")


def test_mechanisms_from_elsewhere_can_join(monkeypatch):
    monkeypatch.setattr(specs, "_REGISTERED", {})
    mine = specs.register(make(slug="mine"))
    assert specs.find("mine") is mine and specs.register(mine) is mine
    with pytest.raises(ValueError, match="another mechanism is called 'mine'"):
        specs.register(make(slug="mine"))
    with pytest.raises(ValueError, match="another mechanism is called 'exact'"):
        specs.register(make(slug="exact"))
