"""``manyheads lost`` prints what a mechanism loses, and names what does not exist."""

from __future__ import annotations

import json

import pytest

from manyheads.cli import main


def lost(capfd, *arguments):
    status = main(["lost", *arguments])
    out, err = capfd.readouterr()
    return status, out, err


SMALL = ("--length", "300", "--heads", "4:2x16", "--dtype", "fp32", "--rows", "20")


def test_a_line_for_the_input_says_what_is_lost(capfd):
    status, out, _ = lost(capfd, "pooled-topk", "--input", "needles", *SMALL, "--set", "keep=4", "--set", "block=16")
    assert status == 0
    head, line = out.splitlines()[:2]
    assert head.split()[:3] == ["input", "error", "weight"] and line.startswith("needles") and line.count("%") >= 5


def test_json_has_every_number_and_fields_of_a_config_can_be_set(capfd):
    settings = ("--set", "block=16", "--set", "keep=4", "--set", "backend=blocked")
    status, out, err = lost(capfd, "fsa", *SMALL, *settings, "--json")
    assert status == 0, err
    found = json.loads(out)["document"]
    assert 0 < found["mass"] <= 1 and found["rows"] <= 20 and found["selection_ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exact",), "exact chooses no keys; those that do:"),
        (("poled-topk",), "did you mean 'pooled-topk'"),
        (("pooled-topk", "--input", "neddles"), "did you mean 'needles'"),
        (("pooled-topk", "--input", "none.safetensors"), "there is no file none.safetensors"),
        (("pooled-topk", "--set", "kep=3"), "did you mean 'keep'"),
        (("pooled-topk", "--set", "keep"), "expected name=value"),
        (("pooled-topk", "--heads", "8:2"), "expected heads : key heads x width"),
        (("pooled-topk", "--dtype", "bf17"), "unknown dtype"),
    ],
)
def test_bad_input_is_one_clear_error(capfd, arguments, message):
    status, out, err = lost(capfd, *arguments)
    assert status == 2 and message in err and not out
