"""The conformance suite holds a mechanism that is made of selectors, and catches one that breaks its promises."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect

import pytest
import torch

from manyheads import Causal, Document
from manyheads.mask import TileLayout
from manyheads.mechanism import select
from manyheads.spec import Size
from tests.conformance import test_promises, test_selection, test_values
from tests.conformance.harness import assert_conforms, assert_same, plainly, with_options
from tests.conformance.selected import (
    assert_blind_to_later_keys,
    assert_causal,
    assert_keeps,
    pairs_of,
)
from tests.mechanism.select.sample import SPEC, choose

SIZE = Size(heads=4, kv_heads=2, causal=True, seed=5)


def case_of(**changes):
    """A call of the sample."""
    return SPEC.inputs(dataclasses.replace(SIZE, **changes))


def changed(change, **fields):
    """The sample, what it selects passed through ``change(layout, q, k)``."""

    def selection(q, k, v, **options):
        return change(SPEC.selection(q, k, v, **options), q, k)

    return dataclasses.replace(SPEC, selection=selection, **fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [7, 60, 129])
def test_a_mechanism_of_selectors_conforms(dtype, queries):
    origin = case_of(queries=queries, dtype=torch.float64)
    assert_conforms(SPEC, "blocked", case_of(queries=queries, dtype=dtype), origin)


@pytest.mark.parametrize("lengths", [[130], [5, 0, 60, 1, 64]], ids=["one", "packed"])
def test_it_chooses_what_the_plain_rule_chooses(lengths, seed):
    mask = Document(lengths) & Causal()
    case = with_options(case_of(batch=1, queries=130, dtype=torch.float64, seed=seed), mask=mask)
    seen = mask.dense(130, 130)
    got = pairs_of(SPEC.selection(*case[:3], **case.options), case)
    assert torch.equal(got, seen & choose(case.q, case.k, seen, 16, 3))


@pytest.mark.parametrize(
    "test",
    [
        test_promises.test_packed_documents_equal_a_loop_over_them,
        test_promises.test_compiles_to_one_graph,
        test_promises.test_permuting_permutes_the_result,
        test_values.test_every_day_anew_in_float64,
        test_values.test_groups_of_heads_and_odd_widths,
        test_values.test_gradients_match_finite_differences,
        *(run for name, run in vars(test_selection).items() if name.startswith("test_")),
    ],
    ids=lambda test: test.__name__,
)
def test_it_passes_the_tests_of_the_suite(test, generator, device):
    given = {"spec": SPEC, "backend": "blocked", "generator": generator, "device": device, "seed": 3}
    given["size"] = dataclasses.replace(SIZE, device=device)
    ran = 0
    for arguments in calls(test, given):
        with contextlib.suppress(pytest.skip.Exception):
            test(**arguments)
            ran += 1
    assert ran or test is test_selection.test_queries_at_the_end_of_the_keys_select_no_later_one


def calls(test, given):
    """The arguments of each call of a test, those of its marks that are not given."""
    ways = [given]
    for mark in getattr(test, "pytestmark", []):
        names, values = mark.args
        names = (names,) if isinstance(names, str) else names
        if mark.name == "parametrize" and not set(names) <= set(given):
            rows = [value if len(names) > 1 else (value,) for value in values]
            ways = [way | dict(zip(names, row, strict=True)) for way in ways for row in rows]
    wanted = inspect.signature(test).parameters
    return [{name: value for name, value in way.items() if name in wanted} for way in ways]


def test_near_ties_are_judged_by_what_was_chosen():
    """Blocks of equal mean, up to rounding: float64 would choose others, which is no error."""
    case = case_of(queries=128, dtype=torch.bfloat16)
    blocks = case.k.float().unflatten(2, (8, 16))
    near = case._replace(k=(blocks - blocks.mean(3, keepdim=True)).flatten(2, 3).bfloat16())
    q, k, v = (t.double() for t in near[:3])
    again = SPEC.selection(q * 1.001, k + 1e-3 * torch.randn(k.shape, dtype=k.dtype), v)
    assert not torch.equal(pairs_of(again, near), pairs_of(SPEC.selection(*near[:3]), near))
    assert_same(SPEC, near, {"blocked": plainly(SPEC, "blocked")}, lse=False)
    with pytest.raises(AssertionError, match="exceeds its budget"):
        assert_same(changed(lambda *_: again), near, {"blocked": plainly(SPEC, "blocked")}, lse=False)


def test_a_later_key_is_noticed():
    case = case_of(queries=60)
    open_to_all = TileLayout.from_ids(torch.zeros(1, 1, 4, 1, dtype=torch.int32), nq=60, nk=60, tile=16)
    with pytest.raises(AssertionError, match="a later key is selected"):
        assert_causal(pairs_of(open_to_all, case))


def test_a_selection_that_follows_later_keys_is_noticed():
    def by_the_last_key(layout, q, k):
        ids = (k[:, :, -1:, :1, None].flatten(3) > 0).int().expand(-1, -1, 4, 1)
        return TileLayout.from_ids(ids, nq=60, nk=60, tile=16, mask=Causal(), heads=4)

    with pytest.raises(AssertionError, match="changed an earlier selection"):
        assert_blind_to_later_keys(changed(by_the_last_key), case_of(queries=60), 30)


@pytest.mark.parametrize(("ids", "what"), [([[0], [0], [0], [0]], "own key"), ([[0], [1], [2], [3]], "first key")])
def test_what_is_promised_and_not_kept_is_noticed(ids, what):
    layout = TileLayout.from_ids(torch.tensor([[ids]]), nq=60, nk=60, tile=16, mask=Causal())
    with pytest.raises(AssertionError, match=what):
        assert_keeps(SPEC, pairs_of(layout, case_of(queries=60)), causal=True)


@pytest.mark.parametrize(
    "ids", [torch.tensor([0, 0, 1]), torch.tensor([0, 60, -1]), torch.tensor([0, -2, 1]), torch.tensor([0.0, 1.0, 2.0])]
)
def test_ids_that_are_none_are_noticed(ids):
    with pytest.raises(AssertionError):
        pairs_of(ids.expand(2, 2, 60, 3), case_of(queries=60))


def test_an_order_that_is_none_is_noticed():
    case = case_of(queries=60)
    layout = SPEC.selection(*case[:3])
    order = torch.arange(60).expand(2, 2, -1).clone()
    assert torch.equal(pairs_of((layout, order.flip(-1)), case), pairs_of(layout, case).flip(-1))
    order[1, 1, 7] = 8
    with pytest.raises(AssertionError):
        pairs_of((layout, order), case)


def test_pairs_refuse_what_was_not_chosen_for_these_tokens():
    case = case_of(queries=60)
    with pytest.raises(TypeError, match="chosen: expected a layout"):
        select.pairs(torch.ones(2, 2, 60, 3), case.q, case.k)
    with pytest.raises(ValueError, match="ids of 60 queries"):
        select.pairs(torch.zeros(1, 1, 59, 3, dtype=torch.int32), case.q, case.k)
    with pytest.raises(ValueError, match="4 heads or a divisor"):
        select.pairs(torch.zeros(1, 3, 60, 3, dtype=torch.int32), case.q, case.k)
    with pytest.raises(ValueError, match="60 x 60 tokens"):
        select.pairs(torch.ones(1, 1, 60, 61, dtype=torch.bool), case.q, case.k)
