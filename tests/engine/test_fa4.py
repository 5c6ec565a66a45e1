"""What FlashAttention-4 asks of a kernel: rescaling on demand, exponentials by polynomial, schedules, repeatability."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from manyheads import Causal, Document, Full, PerHead, Prefix, Relative, Window
from manyheads.engine.tiled import rows, tiled
from manyheads.testing import assert_within_budget
from tests.engine.kernel_calls import Inputs, agree, draw, outcome, tiles

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
parts = pytest.importorskip("manyheads.engine.tiled.kernels.parts")
exp2_polynomial = parts.exp2_polynomial

HOST = torch.device("cpu")
FULL, HALF = torch.float32, torch.float16


@pytest.fixture
def generator():
    """The same draw every day: a budget is a bound on typical rounding, and rounding has unlucky days."""
    return torch.Generator().manual_seed(0)


# --- rescaling only where the maximum has grown far ---------------------------------------------------------------


def climbing(step, nq=7, nk=90, d=16):
    """Scores that grow by ``step`` powers of 2 from one tile of 16 keys to the next, and a little inside a tile."""
    generator = torch.Generator().manual_seed(1)
    inputs = draw(generator, nq, nk, heads=1, d=d)
    inputs.q[..., 0] = 1.0
    ramp = torch.arange(nk, dtype=torch.float64)
    inputs.k[..., 1:] *= 0.1
    inputs.k[..., 0] = (ramp // 16 * step + ramp % 16 * 0.01) * math.log(2) * d**0.5
    return inputs


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("step", [0.9, 3.99, 7.99, 8.01, 30.0])
def test_late_rescaling_equals_the_softmax_for_every_threshold(step, dtype, device):
    inputs = climbing(step)
    exact, plain = (outcome(inputs, Full(), kind, "reference", device) for kind in (torch.float64, dtype))
    q, k, v = (t.to(device, dtype) for t in inputs[:3])
    for threshold in range(9):
        with tiles(16, 16, device, rescale=threshold):
            out, lse = tiled(q, k, v, Full(), return_lse=True, backend="triton")
        assert_within_budget(out, exact["out"], plain["out"], what=f"output, threshold {threshold}")
        assert_within_budget(lse, exact["lse"], plain["lse"], what=f"lse, threshold {threshold}")


def test_gradients_after_late_rescaling(device):
    with tiles(16, 16, device, rescale=8):
        agree(climbing(5.0), Causal(), HALF, device)


def growths(scores, bn, threshold):
    """How often a maximum grew from tile to tile, and how often nothing was rescaled although it had."""
    grew = late = 0
    kept = np.full(scores.shape[0], -np.inf)
    for start in range(0, scores.shape[1], bn):
        new = np.maximum(kept, scores[:, start : start + bn].max(1))
        stays = kept >= new - threshold
        grew += int((new > kept).sum())
        late += int((stays & (new > kept)).sum())
        kept = np.where(stays, kept, new)
    return grew, late


@pytest.mark.parametrize("deviation", [1.0, 3.0])
def test_random_scores_let_most_growth_pass(deviation, device, generator):
    inputs = draw(generator, 32, 128, heads=1, deviation=deviation)
    scores = (inputs.q @ inputs.k.mT)[0, 0].numpy() * 16**-0.5 * math.log2(math.e)
    grew, late = growths(scores, 16, 8)
    assert grew > 32 and late > (grew - 32) / 2  # the first tile of a row always grows
    assert growths(scores, 16, 0)[1] == 0
    q, k, v = (t.to(device, HALF) for t in inputs[:3])
    found = []
    exact, plain = (outcome(inputs, Full(), kind, "reference", device) for kind in (torch.float64, HALF))
    for threshold in (0, 8):
        with tiles(16, 16, device, rescale=threshold):
            found.append(tiled(q, k, v, Full(), return_lse=True, backend="triton"))
        assert_within_budget(found[-1].out, exact["out"], plain["out"])
        assert_within_budget(found[-1].lse, exact["lse"], plain["lse"])
    # weights relative to another maximum round differently: the kernel did let growth pass
    assert not torch.equal(found[0].lse, found[1].lse)


# --- exponentials by polynomial -----------------------------------------------------------------------------------


@triton.jit
def evaluate(x, y, n, SIZE: tl.constexpr):
    """The polynomial on its own."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, exp2_polynomial(tl.load(x + at, mask=at < n)), mask=at < n)


def by_kernel(x, device):
    """The polynomial of the kernels on float32 numbers."""
    source = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(device)
    result = torch.empty_like(source)
    evaluate[(-(-len(x) // 4096),)](source, result, len(x), SIZE=4096)
    return result.cpu().numpy()


def arguments(seed):
    """Numbers from -126 to 0: everywhere, around integers, and tiny ones."""
    random = np.random.default_rng(seed)
    whole = np.arange(-126, 1, dtype=np.float32)
    near = [np.nextafter(whole, np.float32(d)) for d in (-np.inf, np.inf)]
    tiny = -(2.0 ** -random.uniform(0, 40, 500))
    x = np.concatenate([-random.uniform(0, 126, 5000), tiny, *near, whole]).astype(np.float32)
    return x[(x >= -126) & (x <= 0)]


def test_the_polynomial_is_near_the_power_and_exact_at_integers(device, seed):
    x = arguments(seed)
    y = by_kernel(x, device)
    true = np.exp2(x.astype(np.float64))
    assert np.abs(y / true - 1).max() < 1e-4
    whole = x == np.floor(x)
    assert whole.sum() >= 127
    assert np.array_equal(y[whole], true[whole].astype(np.float32))
    assert by_kernel(np.array([-np.inf, -1e30, -127, -200], np.float32), device).tolist() == [0.0] * 4


def test_the_polynomial_reaches_eight_as_late_rescaling_needs(device, seed):
    x = np.random.default_rng(seed).uniform(0, 8, 3000).astype(np.float32)
    assert np.abs(by_kernel(x, device) / np.exp2(x.astype(np.float64)) - 1).max() < 1e-4


@pytest.mark.parametrize("exp", [1, 4])
def test_attention_by_polynomial_is_exact_for_half_precision(exp, device, generator):
    with tiles(16, 16, device, exp=exp, rescale=8):
        agree(draw(generator, 33, 60, deviation=3.0), Causal(), HALF, device)


def rounded(x: Fraction) -> np.float32:
    """The nearest float32, ties to even, whatever double precision would make of it; subnormal numbers become 0."""
    near = np.float32(float(x))
    others = [np.nextafter(near, np.float32(d)) for d in (-np.inf, np.inf)]
    best = min([near, *others], key=lambda c: (abs(Fraction(float(c)) - x), int(np.float32(c).view(np.int32)) & 1))
    return np.float32(0) if abs(best) < np.finfo(np.float32).tiny else best


def down(x: Fraction) -> np.float32:
    """The largest float32 that is not above a number."""
    near = np.float32(float(x))
    return np.nextafter(near, np.float32(-np.inf)) if Fraction(float(near)) > x else near


def flushed(x):
    """Subnormal numbers read as 0."""
    return np.float32(0) if abs(x) < np.finfo(np.float32).tiny else np.float32(x)


def assembly():
    """The instructions of the polynomial and the constants they name."""
    text = inspect.getsource(getattr(parts.exponential, "fn", parts.exponential))
    block = re.search(r"\{\s*\.reg.*?\}", text, re.DOTALL)[0]
    lines = re.findall(r"^\s*([a-z0-9.]+) ([^;]+);$", block, re.MULTILINE)
    steps = [(name, [a.strip() for a in rest.split(",")]) for name, rest in lines if not name.startswith(".reg")]
    return [step for step in steps if step[0] != "ex2.approx.ftz.f32"]


def by_assembly(x, steps):
    """One number through the instructions, each with its own rounding, as bits."""
    held = {"$7": np.float32(x)}

    def value(name):
        if name.startswith("0f"):
            return np.float32(struct.unpack(">f", bytes.fromhex(name[2:]))[0])
        return int(name) if name.isdigit() else held[name]

    for name, (target, *sources) in steps:
        operation, *modes = name.split(".")
        given = [value(s) for s in sources]
        if modes[-1] == "f32":
            assert "ftz" in modes
            given = [flushed(g) for g in given]
            exact = [Fraction(float(g)) for g in given]
        if operation == "max":
            result = max(given)
        elif operation == "add" and modes[-1] == "f32":
            assert modes[0] == "rm"
            result = down(exact[0] + exact[1])
        elif operation == "sub":
            result = rounded(exact[0] - exact[1])
        elif operation == "fma":
            assert modes[0] == "rn"
            result = rounded(exact[0] * exact[1] + exact[2])
        elif operation == "mov":
            result = int(given[0].view(np.int32))
        elif operation == "shl":
            result = given[0] << given[1] & 0xFFFFFFFF
        else:
            assert name == "add.s32", name
            result = sum(given) & 0xFFFFFFFF
        held[target] = result
    return held["$3"]


def test_the_assembly_computes_the_same_polynomial_to_its_own_rounding(device, seed):
    steps = assembly()
    assert " ".join(name.split(".")[0] for name, _ in steps) == "max add sub sub fma fma fma mov shl mov add"
    x = np.concatenate([arguments(seed)[::7], np.array([0.0, -0.0, -1e-40, -1e-30, -126.0, 7.5, 8.0], np.float32)])
    got = np.array([by_assembly(one, steps) for one in x], dtype=np.uint32).view(np.float32)
    true = np.exp2(x.astype(np.float64))
    assert np.abs(got / true - 1).max() < 1e-4
    whole = (x == np.floor(x)) | (np.abs(x) < 1e-38)
    assert np.array_equal(got[whole], true[whole].astype(np.float32))
    # fused products round once where the other form rounds twice: at most the last bits differ
    normal = (x == 0) | (np.abs(x) >= np.finfo(np.float32).tiny)
    assert np.abs(got.view(np.int32) - by_kernel(x, device).view(np.int32))[normal].max() <= 2


def test_the_assembly_holds_the_constants_of_the_polynomial():
    text = inspect.getsource(getattr(parts.exp2_polynomial, "fn", parts.exp2_polynomial))
    written = {np.float32(c) for c in re.findall(r"\d+\.\d{4,}", text)}
    named = {a for _, rest in assembly() for a in rest if a.startswith("0f")}
    coded = {np.float32(struct.unpack(">f", bytes.fromhex(a[2:]))[0]) for a in named}
    assert coded == written | {np.float32(1), np.float32(-127), np.float32(1.5 * 2**23)}


# --- gradients, repeatability, empty rows -------------------------------------------------------------------------


@pytest.mark.parametrize("deviation", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [FULL, HALF, torch.bfloat16], ids=str)
def test_gradients_equal_those_of_the_definition(dtype, deviation, device, generator):
    with tiles(32, 32, device):
        agree(draw(generator, 40, 70, heads=2, d=32, deviation=deviation), Causal() & Window(50), dtype, device)


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_two_backward_runs_give_the_same_bits(dtype, device, generator):
    inputs = draw(generator, 40, 70, heads=4, kv_heads=2)
    leaves = {"table": torch.randn(4, 31, generator=generator, dtype=torch.float64), "sink": torch.ones(4)}

    def build(table, sink):
        return {"bias": Relative(table), "sink": sink}

    with tiles(32, 32, device):
        first, second = (
            outcome(inputs, Causal(), dtype, "triton", device, leaves=leaves, build=build) for _ in range(2)
        )
    assert first.keys() >= {"dq", "dk", "dv", "dtable", "dsink"}
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("rescale", [0, 8])
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_rows_that_see_nothing_give_zero_and_minus_infinity(rescale, dtype, device, generator):
    q, k, v, g, gl = (t.to(device, dtype) for t in draw(generator, 50, 37, heads=3, kv_heads=3))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    mask = PerHead([Causal(), Causal() & ~Prefix(20), ~Prefix(37)])
    with tiles(16, 16, device, rescale=rescale):
        out, lse = tiled(*leaves, mask, return_lse=True, backend="triton")
        empty = ~mask.dense(50, 37)[0].any(-1).to(device)
        assert empty.sum(-1).tolist() == [13, 33, 50]
        assert not out[0][empty].any() and bool((lse[0][empty] == -math.inf).all())
        assert out[0][~empty].any(-1).all() and lse[0][~empty].isfinite().all()
        grads = torch.autograd.grad([out, lse], leaves, [g, gl.to(lse.dtype)])
    assert all(t.isfinite().all() for t in grads)
    assert not grads[0][0][empty].any()
    assert not grads[1][:, 2].any() and not grads[2][:, 2].any()


# --- schedules ----------------------------------------------------------------------------------------------------

SHAPES = {
    "causal": Causal(),
    "window": Causal() & Window(150),
    "documents": Document([700, 30, 200, 70, 1000]) & Causal(),
    "heads that differ": PerHead([Causal(), Window(20), Full(), Causal() & Window(300)]),
}


def costs_of(mask, heads=4):
    """Tiles that every row of every head visits."""
    layout = mask.tiles(2000, tile=(64, 64), heads=heads)
    index = layout.index.expand(1, heads)[0].long()
    return rows.row_costs(layout)[index]


@pytest.mark.parametrize("workers", [2, 7, 16, 132])
@pytest.mark.parametrize("mask", SHAPES.values(), ids=SHAPES)
def test_longest_first_is_no_slower_than_in_order(mask, workers):
    costs = costs_of(mask)
    order = rows.longest_first(costs, together=len(costs))
    flat = costs.reshape(-1)
    assert sorted(order.tolist()) == list(range(flat.size))
    assert rows.makespan(flat[order], workers) <= rows.makespan(flat, workers)
    together = rows.longest_first(costs, together=2)
    assert rows.makespan(flat[together], workers) <= rows.makespan(flat, workers)


def test_longest_first_is_no_slower_on_random_costs(seed):
    random = np.random.default_rng(seed)
    for workers in (2, 8, 20):
        costs = random.integers(1, 100, (4, 100))
        order = rows.longest_first(costs, together=4)
        assert rows.makespan(costs.reshape(-1)[order], workers) <= rows.makespan(costs.reshape(-1), workers)


def test_longest_first_is_within_a_third_of_the_best(seed):
    random = np.random.default_rng(seed)
    for _ in range(60):
        workers, items = int(random.integers(2, 4)), int(random.integers(3, 9))
        costs = random.integers(1, 12, items)
        best = min(
            max(costs[np.array(who) == w].sum() for w in range(workers))
            for who in itertools.product(range(workers), repeat=items)
        )
        got = rows.makespan(costs[rows.longest_first(costs[None], 1)], workers)
        assert best <= got <= (4 / 3 - 1 / (3 * workers)) * best


@pytest.mark.parametrize("workers", [3, 8, 132])
@pytest.mark.parametrize("mask", SHAPES.values(), ids=SHAPES)
def test_programs_that_take_rows_in_turn_get_equal_shares(mask, workers):
    costs = costs_of(mask)
    order = rows.longest_first(costs, together=len(costs))
    flat = costs.reshape(-1)

    def shares(order):
        return np.array([flat[order[w::workers]].sum() for w in range(workers)])

    dealt, plain = shares(rows.dealt(order, workers)), shares(order)
    assert dealt.sum() == flat.sum()
    assert dealt.max() <= plain.max()
    assert np.ptp(dealt) <= flat.max()
    if workers < 10:  # several rounds, in which the first in turn would always get the longest
        assert np.ptp(dealt) < np.ptp(plain)


def test_the_kernels_take_rows_in_that_order():
    layout = Causal().tiles(1000, tile=(64, 64))
    costs = rows.row_costs(layout)[0]
    order = rows.work_of(layout, 3, 2, 1, HOST).numpy()
    found = costs[order % len(costs)]
    assert (np.diff(found) <= 0).all()
    one_cache = rows.work_of(layout, 3, 2, 1 << 40, HOST).numpy()
    assert (one_cache // len(costs) == np.arange(6).repeat(len(costs))).all()


def test_persistent_programs_finish_what_single_ones_do(device, generator):
    inputs = draw(generator, 70, 70, heads=2)
    with tiles(16, 32, device):
        want = outcome(inputs, Causal(), FULL, "triton", device)
    with tiles(16, 32, device, persistent=1, rescale=8):
        got = outcome(Inputs(*inputs), Causal(), FULL, "triton", device)
    exact, plain = (outcome(inputs, Causal(), kind, "reference", device) for kind in (torch.float64, FULL))
    for name in want:
        assert_within_budget(got[name], exact[name], plain[name], what=name)
