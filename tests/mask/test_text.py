"""Masks as text: what is written is read back, and errors say where and what."""

from __future__ import annotations

import gc
import pickle
import time

import pytest
import torch
from hypothesis import given

from manyheads.mask import (
    BlockMap,
    Causal,
    Dense,
    Document,
    Full,
    PerHead,
    Predicate,
    Sink,
    Window,
    as_mask,
    parse,
)
from manyheads.mask.text import _parse_cached, vocabulary
from tests.mask import cases


@given(cases.sized_masks())
def test_text_with_data_reads_back(case):
    _, mask, _ = case
    assert parse(mask.text, mask.data) == mask
    foreign = [t.clone() for t in mask.data]
    again = parse(mask.text, foreign)
    assert again == mask and again.text == mask.text
    assert parse(mask.text, foreign) is again


@given(cases.sized_masks())
def test_repr_reads_back(case):
    _, mask, _ = case
    assert parse(repr(mask)) == mask


def test_text_of_the_same_mask_is_a_look_up():
    mask = Causal() & Document([3, 4])
    assert parse(mask.text, mask.data) is mask


def test_reading_the_text_back_is_fast():
    mask = Causal() & (Window(512) | Document(torch.arange(5000)))
    text, data = mask.text, mask.data
    parse(text, data)
    start = time.perf_counter()
    for _ in range(1000):
        parse(text, data)
    assert (time.perf_counter() - start) / 1000 < 100e-6


def test_written_data_is_noticed():
    mask = Document([3, 4])
    data = mask.data[0].clone()
    first = parse("document($0)", [data])
    data[0] = 2
    assert parse("document($0)", [data]) != first


def test_precedence_is_pythons():
    a, b, c = Causal(), Window(3), Sink(1)
    for text, mask in [
        ("causal & window(3) | sink(1)", a & b | c),
        ("causal | window(3) & sink(1)", a | b & c),
        ("~causal & window(3)", ~a & b),
        ("~(causal & window(3))", ~(a & b)),
        ("(causal | window(3)) & sink(1)", (a | b) & c),
        ("  causal&window( 3 ,)  ", a & b),
    ]:
        assert parse(text) == mask == eval(text.strip(), {"causal": a, "window": Window, "sink": Sink})


def test_names_may_be_those_of_classes():
    assert parse("Causal() & Window(left=4, right=1)") == Causal() & Window(left=4, right=1)
    assert parse("BlockMap([[True, False]], block=(2, 3))") == BlockMap([[1, 0]], block=(2, 3))
    assert parse("per_head(causal, (full | causal))") == PerHead([Causal(), Full() | Causal()])
    assert parse("periodic(4, -1)") == parse("periodic(4, 3)")
    assert parse("prefix(2, side='query')") == parse('prefix(2, side="query")')
    assert parse("sliding_window_causal(4)") == Causal() & Window(4)


def test_every_name_is_reachable():
    names = vocabulary()
    assert {"causal", "block_map", "per_batch", "neighborhood", "shared_question"} <= set(names)
    for name in names:
        assert name.islower()


ERRORS = [
    ("casual", r"unknown mask 'casual': did you mean 'causal'\?.* at column 1\n"),
    ("causal & windw(3)", r"did you mean 'window'\?.* at column 10"),
    ("causal &", "expected a mask, got 'end of text' at column 9"),
    ("causal window(3)", "unexpected 'window' at column 8"),
    ("(causal", r"expected '\)', got 'end of text' at column 8"),
    ("window(3", r"expected ',', got 'end of text'"),
    ("window(3 4)", r"expected ',', got '4' at column 10"),
    ("window(left=)", "expected a value"),
    ("window(left=2, 3)", "positional argument follows a keyword at column 16"),
    ("window(0)", "window: width: expected an int >= 1, got 0 at column 1"),
    ("causal & window(wide=3)", "unexpected keyword argument 'wide' at column 10"),
    ("document($0)", r"\$0 but 0 data tensors came at column 10"),
    ("causal ? full", r"unexpected '\?' at column 8"),
    ("3", "expected a mask, got '3'"),
    ("dense(<abbreviated: 64x64 bits #12>)", "abbreviated repr does not parse"),
    ("", "expected a mask, got 'end of text' at column 1"),
    ("True", "expected a mask"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=lambda x: None)
def test_errors_say_where_and_what(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_an_error_points_at_the_column():
    with pytest.raises(ValueError) as caught:
        parse("causal & windw(3)")
    line, pointer = str(caught.value).splitlines()[-2:]
    assert line[pointer.index("^")] == "w" and line.endswith("windw(3)")


def test_text_must_be_a_string():
    with pytest.raises(TypeError, match="text: expected a string"):
        parse(3)
    with pytest.raises(TypeError, match="expected tensors"):
        parse("document($0)", [[1, 2]])


def test_a_large_bitmap_is_abbreviated_and_says_so():
    mask = Causal() & Dense(torch.ones(64, 64, dtype=torch.bool).tril(3))
    assert repr(mask).startswith("causal & dense(<abbreviated: 64x64 bits #")
    with pytest.raises(ValueError, match=r"use mask\.text with mask\.data"):
        parse(repr(mask))
    assert parse(mask.text, mask.data) == mask


def test_whatever_stands_for_a_mask_is_read():
    mask = Causal()
    assert as_mask(mask) is mask and as_mask(None) is Full() and as_mask("causal") is mask
    assert as_mask(torch.tensor([[True, False]])) == Dense([[1, 0]])


def test_a_function_is_found_by_its_text_while_it_lives():
    mask = Predicate(cases.odd)
    assert mask == Predicate(cases.odd) and parse(mask.text) == mask and "odd" in mask.text
    assert pickle.loads(pickle.dumps(mask)) == mask
    with pytest.raises(ValueError, match="not known to this process"):
        parse("predicate($fn:gone_12345678)")


def test_a_bound_method_keeps_its_name():
    class Rule:
        def near(self, q, k):
            return (q - k).abs() < 2

    rule = Rule()
    first = Predicate(rule.near)
    gc.collect()
    assert Predicate(rule.near) == first
    assert parse(first.text) == first


def test_parsed_masks_with_large_data_are_not_kept_for_ever():
    from manyheads.mask import text

    for n in range(4):
        bits = torch.zeros(1, 1, 4096, 512 * 8, dtype=torch.bool)
        bits[0, 0, n] = True
        mask = Dense(bits)
        _parse_cached(mask.text, tuple(t.clone() for t in mask.data), tuple(d.digest for d in mask._data))
    assert text._held_bytes <= max(text._KEPT_BYTES, 2**22)
