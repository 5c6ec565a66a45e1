"""Key tiles outermost on a GPU: the kernels against the definition, in every cut of sections, pieces and slots."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from manyheads import Causal, Window
from manyheads.common.errors import UnsupportedError
from manyheads.engine import configs
from manyheads.engine.tiled import entries, launch, order, rows, tiled
from manyheads.lab import entries as described
from manyheads.lab.registry import kernels
from manyheads.mask.layout import TileLayout
from manyheads.testing import assert_within_budget
from tests.engine.kernel_calls import draw, outcome
from tests.engine.test_order import chosen

pytest.importorskip("triton")
F32, F16, F64 = torch.float32, torch.float16, torch.float64


@pytest.fixture
def generator():
    """The same draw every day: a budget is a bound on typical rounding, and rounding has unlucky days."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _runs(device):
    """The kernels need a GPU or the interpreter."""
    if launch.refuse(device):
        pytest.skip("no device for kernels")


def agree(inputs, layout, dtype, device, **options):
    """Asserts that the kernels are within the budget of the definition."""
    layout = layout.to(device) if device != "cpu" else layout
    exact = outcome(inputs, layout, F64, "reference", device, **options)
    plain = outcome(inputs, layout, dtype, "reference", device, **options)
    got = outcome(inputs, layout, dtype, "triton", device, order="keys", **options)
    for name, value in got.items():
        assert_within_budget(value, exact[name], plain[name], what=name)
    return got


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("mask", [None, Causal()], ids=str)
def test_every_group_equals_the_definition_and_so_the_other_order(group, mask, device, generator):
    layout = chosen(generator, 11, 45, (1, 16), (1, 1), group, keep=2, mask=mask)
    inputs = draw(generator, 11, 45, heads=group, kv_heads=1, d=8, dv=24)
    keys = agree(inputs, layout, F32, device)
    if group == 2:
        queries = outcome(inputs, layout, F32, "triton", device, order="queries")
        for name, value in keys.items():
            torch.testing.assert_close(value, queries[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deviation", [1.0, 8.0])
def test_half_precision_stays_within_budget(deviation, device, generator):
    layout = chosen(generator, 13, 70, (1, 32), (1, 1), 2, mask=Causal())
    agree(draw(generator, 13, 70, heads=2, kv_heads=1, d=16, deviation=deviation), layout, F16, device)


@pytest.mark.parametrize(
    ("of", "batch", "heads", "kv_heads"),
    [((1, 1), 2, 2, 2), ((2, 1), 2, 3, 1), ((1, 4), 1, 4, 2), ((1, 2), 1, 4, 4)],
    ids=["shared by all", "per batch entry", "per query head", "fewer lists than key heads"],
)
def test_lists_may_be_shared_in_any_way(of, batch, heads, kv_heads, device, generator):
    layout = chosen(generator, 7, 20, (1, 16), of, heads, batch)
    agree(draw(generator, 7, 20, heads=heads, kv_heads=kv_heads, batch=batch, d=8), layout, F32, device)


@pytest.mark.parametrize(("partial", "dtype"), [(700, F32), (1 << 20, F16)])
def test_launches_of_some_sections_agree_with_one(partial, dtype, device, generator, monkeypatch):
    layout = chosen(generator, 13, 32, (1, 16), (1, 2), 4, keep=2, mask=Window(30))
    inputs = draw(generator, 13, 32, heads=4, kv_heads=2, d=8)
    monkeypatch.setattr(entries, "_PARTIAL", partial)
    monkeypatch.setattr(entries, "PIECE", 4)
    agree(inputs, layout, dtype, device)


def test_a_sink_joins_the_normaliser(device, generator):
    layout = chosen(generator, 9, 32, (1, 16), (1, 1), 2, mask=Causal())
    inputs, sink = draw(generator, 9, 32, heads=2, kv_heads=1, d=8), {"sink": torch.tensor([0.5, -1.0])}
    for dtype in (F32, F16):
        agree(inputs, layout, dtype, device, leaves=sink)


@pytest.mark.parametrize("scale", [-0.3])
def test_any_scale(scale, device, generator):
    layout = chosen(generator, 9, 32, (1, 16), (1, 1), 2, keep=2)
    agree(draw(generator, 9, 32, heads=2, d=8), layout, F32, device, scale=scale)


def test_wide_key_tiles_are_cut_to_those_of_the_kernel(device, generator):
    layout = chosen(generator, 5, 150, (1, 128), (1, 1), 1, keep=2, mask=Causal())
    agree(draw(generator, 5, 150, heads=1, d=8), layout, F32, device)


@pytest.mark.parametrize("keep", [0, 1])
def test_nothing_chosen_gives_zeros_and_minus_infinity(keep, device, generator):
    ids = torch.full((1, 1, 3, keep), -1, device=device)
    q = torch.randn(1, 2, 3, 4, generator=generator).to(device).requires_grad_()
    k = torch.randn(1, 1, 32, 4, generator=generator).to(device)
    layout = TileLayout.from_ids(ids, nq=3, nk=32, tile=(1, 16), heads=2)
    out, lse = tiled(q, k, k, layout, order="keys", backend="triton", return_lse=True)
    out.sum().backward()
    assert not out.any() and bool((lse == -math.inf).all()) and not q.grad.any()


def test_every_entry_lies_in_one_piece_of_its_key_tile(generator, monkeypatch):
    monkeypatch.setattr(entries, "PIECE", 4)
    monkeypatch.setattr(entries, "_PARTIAL", 700)
    layout = chosen(generator, 31, 77, (1, 16), (2, 2), 4, batch=2)
    found = entries.entries_of(layout, torch.device("cpu"), 2, 4, 2, 16)
    assert found.ranges > 1
    tiles, met = layout.grid[1], []
    for own in range(len(found.starts) - 1):
        section, t = divmod(own, tiles)
        some = found.entry[found.starts[own] : found.starts[own + 1]].tolist()
        assert int(found.pieces[own + 1] - found.pieces[own]) == -(-len(some) // 4)
        assert all(e // found.slots // found.step == section % found.ranges for e in some)
        met += [(section // found.ranges, e, t) for e in some]
    want = [
        (n, i, t) for n, line in enumerate(layout.ids.flatten(0, 1).flatten(1).tolist()) for i, t in enumerate(line)
        if t >= 0
    ]  # fmt: skip
    assert sorted(met) == want


def test_two_runs_give_the_same_bits(device, generator):
    layout = chosen(generator, 9, 32, (1, 16), (1, 1), 2).to(device)
    inputs = draw(generator, 9, 32, heads=2, kv_heads=1, d=8)
    first, second = (outcome(inputs, layout, F32, "triton", device, order="keys") for _ in range(2))
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_the_engine_takes_key_tiles_for_small_groups_of_one_query(device, generator, monkeypatch):
    taken = []
    whole = entries.forward
    monkeypatch.setattr(entries, "forward", lambda p, choose: taken.append(1) or whole(p, choose))
    for tile, group, options, want in (
        ((1, 16), order.GROUP, {}, 1), ((1, 16), 2 * order.GROUP, {}, 0), ((2, 16), 1, {}, 0), ((1, 8), 1, {}, 0),
        ((1, 16), 2, {"order": "queries"}, 0), ((1, 16), 2, {"softcap": 2.0}, 0), ((1, 16), 16, {"order": "keys"}, 1),
    ):  # fmt: skip
        taken.clear()
        q, k = (torch.randn(1, h, 8, 8, generator=generator).to(device) for h in (group, 1))
        layout = chosen(generator, 8, 8, tile, (1, 1), group, keep=1)
        tiled(q, k, k, layout.to(device), backend="triton", **options)
        assert len(taken) == want, (tile, group, options)


@pytest.mark.parametrize(("tile", "reason"), [((2, 16), "one query a tile"), ((1, 24), "power of two")], ids=str)
def test_what_the_kernels_cannot_do_is_refused(tile, reason, device, generator):
    q = torch.randn(1, 2, 16, 8, generator=generator).to(device)
    layout = chosen(generator, 16, 16, tile, (1, 1), 2, keep=1).to(device)
    with pytest.raises(UnsupportedError, match=reason):
        tiled(q, q, q, layout, order="keys", backend="triton")


def test_ids_of_key_heads_fill_the_rows_of_a_product_with_their_query_heads(generator):
    shared = chosen(generator, 21, 64, (1, 16), (1, 2), 8)
    single = chosen(generator, 21, 64, (1, 16), (1, 8), 8)
    assert rows.packs(shared, 4) == 4 and rows.packs(single, 4) == 1
    assert rows.packs(chosen(generator, 21, 64, (16, 16), (1, 2), 8), 4) == 1


def test_the_gate_compiles_the_arguments_that_the_launcher_gives(device, monkeypatch, generator):
    if device != "cpu":
        pytest.skip("reads arguments on their way into the interpreter")
    seen, original = {}, entries.launch

    def noticed(kernel, programs, arguments, config=None):
        seen.setdefault(kernel.fn.__name__, []).append((kernel, arguments))
        return original(kernel, programs, arguments, config)

    monkeypatch.setattr(entries, "launch", noticed)
    layout = chosen(generator, 9, 32, (1, 16), (1, 1), 2, mask=Causal())
    outcome(draw(generator, 9, 32, heads=2), layout, F32, "triton", order="keys")
    assert set(seen) == {*described.VARIANTS_OF, *described.SUMS}
    types = {torch.float32: ("fp32", "data"), torch.int32: ("i32",), torch.int16: ("i32",)}  # words of 16 keys
    for name, calls in seen.items():
        kernel = kernels()[f"entries.{name}"]
        fixed = described.constants(name, 64, "plain", configs.Config(32, 32, 4, 1))
        for run, arguments in calls:
            names = inspect.signature(run.fn).parameters
            assert set(fixed) == {n for n, p in names.items() if "constexpr" in str(p.annotation)}
            pointers = {n for n in names if isinstance(arguments[n], torch.Tensor)}
            assert pointers == set(kernel.pointers)
            assert all(kernel.pointers[n] in types[arguments[n].dtype] for n in pointers)
            assert all(isinstance(arguments[n], float) for n in kernel.floats)
