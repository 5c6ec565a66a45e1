"""What a mechanism selects: in range, each once, never later, and what it promises to keep."""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import pytest
import torch

from manyheads import Attn, Causal, Document
from manyheads.spec import Case
from tests.conformance.harness import base, gates_of, piece, selectors, takes, with_options
from tests.conformance.selected import (
    assert_blind_to_later_keys,
    assert_causal,
    assert_keeps,
    pairs_of,
    select,
)

pytestmark = pytest.mark.parametrize("spec", selectors())
LENGTHS = (1, 33, 150)


@pytest.fixture
def size(spec, seed, device):
    """A small size with the seed of this test, with groups of heads where they are declared."""
    heads = {"heads": 4, "kv_heads": 2} if spec.declares("gqa") else {}
    return base(spec, seed=seed, device=device, **heads)


@pytest.mark.parametrize("queries", LENGTHS)
def test_ids_are_in_range_each_once_and_keep_what_is_promised(spec, queries, size):
    case = spec.inputs(dataclasses.replace(size, queries=queries))
    pairs = pairs_of(select(spec, case), case)
    assert_keeps(spec, pairs, size.causal)
    if size.causal:
        assert_causal(pairs)


@pytest.mark.parametrize("queries", LENGTHS)
def test_a_causal_call_selects_no_later_key(spec, queries, size):
    if not spec.declares("causal_self"):
        pytest.skip("declares no causal attention")
    case = spec.inputs(dataclasses.replace(size, queries=queries, causal=True))
    pairs = pairs_of(select(spec, case), case)
    assert_causal(pairs)
    assert_keeps(spec, pairs, causal=True)


@pytest.mark.parametrize("keys", [13, 80])
def test_queries_at_the_end_of_the_keys_select_no_later_one(spec, keys, size):
    if not spec.declares("causal_cross"):
        pytest.skip("declares no queries at the end of longer keys")
    case = spec.inputs(dataclasses.replace(size, queries=40, keys=keys, causal=True))
    pairs = pairs_of(select(spec, case), case)
    assert_causal(pairs)
    assert_keeps(spec, pairs, causal=True)


@pytest.mark.parametrize("at", [0.2, 0.55, 0.9])
def test_later_keys_change_no_earlier_selection(spec, at, size):
    if "causal_selection" not in spec.invariances:
        pytest.skip("promises no causal selection")
    case = spec.inputs(dataclasses.replace(size, queries=150, causal=True))
    assert_blind_to_later_keys(spec, case, int(at * 150))


def test_packed_documents_select_as_each_alone(spec, size):
    if "packed" not in spec.invariances:
        pytest.skip("promises no packed")
    causal = spec.declares("causal_self")
    lengths = [5, 0, 41, 1, 23]
    whole = spec.inputs(dataclasses.replace(size, batch=1, queries=sum(lengths), causal=causal))
    mask = Document(lengths) & Causal() if causal else Document(lengths)
    packed = pairs_of(select(spec, with_options(whole, mask=mask)), whole)
    alone = with_options(whole, mask="causal" if causal else "full")
    for start, stop in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        rows = packed[:, :, start:stop]
        assert not rows[..., :start].any() and not rows[..., stop:].any()
        if start < stop:
            own = piece(spec, alone, start, stop)
            assert torch.equal(rows[..., start:stop], pairs_of(select(spec, own), own))


def test_keys_that_are_not_selected_are_not_seen(spec, size):
    case = spec.inputs(dataclasses.replace(size, queries=150, dtype=torch.float64))
    chosen = select(spec, case)
    seen = pairs_of(chosen, case).flatten(0, 1)
    seen = seen.unflatten(0, (case.k.shape[0], case.k.shape[1], -1)).flatten(2, 3)
    row = seen.sum(-1).argmin(-1)  # of each key head: the row of a query head that selects the fewest
    hidden = ~seen.gather(2, row[..., None, None].expand(-1, -1, 1, seen.shape[3]))[:, :, 0]
    poisoned = case._replace(v=case.v.masked_fill(hidden[..., None].to(case.v.device), 1e6))
    before, after = (_out(spec.fn(*some[:3], **some.options)) for some in (case, poisoned))
    before, after = (
        out.unflatten(1, (case.k.shape[1], -1)).flatten(2, 3).gather(2, _at(row, out).to(out.device))
        for out in (before, after)
    )
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_the_same_call_selects_the_same(spec, size):
    case = spec.inputs(dataclasses.replace(size, queries=90, dtype=torch.bfloat16))
    first, second = (pairs_of(select(spec, case), case) for _ in range(2))
    assert torch.equal(first, second)


def test_the_selection_takes_what_the_mechanism_takes(spec, size):
    assert "chosen" in inspect.signature(spec.reference).parameters
    missing = set(inspect.signature(spec.fn).parameters) - set(inspect.signature(spec.selection).parameters)
    assert missing <= {"backend", "return_lse", "state", "return_state"}
    case = spec.inputs(size)
    assert all(takes(spec, name) for name in gates_of(spec, case))
    assert isinstance(case, Case)


def _out(got):
    return got.out if isinstance(got, Attn) else got


def _at(row, out):
    return row[..., None, None].expand(-1, -1, 1, out.shape[3])
