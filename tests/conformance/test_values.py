"""Every mechanism on every backend: values, lse and gradients within the budget of its reference."""

from __future__ import annotations

import dataclasses
import os
import zlib

import pytest
import torch

from manyheads.mask import Document, PerHead, as_mask
from manyheads.testing import SEED_VARIABLE, nan_poisoned, seed_for
from tests.conformance.harness import (
    assert_conforms,
    base,
    call,
    gates_of,
    pairs,
    plainly,
    results,
    takes,
    with_options,
)

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def size(spec, request, device):
    """A small size, drawn the same every day: on some days' draws two honest roundings differ by more than a factor
    of two in their largest entry, and a budget says nothing then. ``MANYHEADS_SEED`` draws anew."""
    name = request.node.nodeid
    seed = seed_for(name) if SEED_VARIABLE in os.environ else zlib.crc32(name.encode()) & 0x7FFFFFFF
    return base(spec, seed=seed, device=device)


@pytest.mark.parametrize("mask", [None, "causal", "causal & (window(9) | sink(2))"])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_every_day_anew_in_float64(spec, backend, mask, seed, device):
    if mask and not spec.declares("mask"):
        pytest.skip("declares no masks")
    case = spec.inputs(base(spec, seed=seed, device=device, dtype=torch.float64, queries=30 + seed % 90))
    case = with_options(case, mask=mask) if mask else case
    lse = backend in ("reference", "blocked")
    got, want = (results(f, spec, case, lse=lse) for f in (plainly(spec, backend), spec.reference))
    for part, value in got.items():
        torch.testing.assert_close(value, want[part], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("deviation", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_every_dtype_on_soft_and_sharp_attention(spec, backend, dtype, deviation, size):
    drawn = dataclasses.replace(size, dtype=torch.float64, deviation=deviation)
    origin = spec.inputs(drawn) if dtype in HALF else None
    assert_conforms(spec, backend, spec.inputs(dataclasses.replace(drawn, dtype=dtype)), origin)


@pytest.mark.parametrize("queries", [7, 60, 129, 210])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_lengths_that_fill_no_tile(spec, backend, queries, size):
    assert_conforms(spec, backend, spec.inputs(dataclasses.replace(size, queries=queries)))


@pytest.mark.parametrize(("group", "width"), [(1, 40), (3, 8), (7, 72)])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_groups_of_heads_and_odd_widths(spec, backend, group, width, size):
    if group > 1 and not spec.declares("gqa"):
        pytest.skip("declares no grouped heads")
    interpreted = backend == "triton" and size.device == "cpu"  # slow: one entry of the batch, one group
    kv, batch = (1, 1) if interpreted and group > 3 else (2, size.batch)
    changed = dataclasses.replace(
        size, batch=batch, heads=kv * group, kv_heads=kv, width=width, deviation=4.0
    )
    assert_conforms(spec, backend, spec.inputs(changed))


@pytest.mark.parametrize("widths", [(16, 24), (40, 8)])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_values_of_another_width(spec, backend, widths, size):
    if not spec.declares("value_width"):
        pytest.skip("declares no other width of values")
    assert_conforms(
        spec, backend, spec.inputs(dataclasses.replace(size, width=widths[0], value_width=widths[1]))
    )


@pytest.mark.parametrize("lengths", [(1, 50), (20, 150), (50, 13)])
@pytest.mark.parametrize("causal", [False, True], ids=["noncausal", "causal"])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_queries_and_keys_of_different_lengths(spec, backend, causal, lengths, size):
    if not spec.declares("causal_cross" if causal else "noncausal_cross"):
        pytest.skip("declares no cross attention of this kind")
    changed = dataclasses.replace(size, queries=lengths[0], keys=lengths[1], causal=causal)
    assert_conforms(spec, backend, spec.inputs(changed))


@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_causal_within_one_sequence(spec, backend, size):
    if not spec.declares("causal_self"):
        pytest.skip("declares no causal attention")
    assert_conforms(spec, backend, spec.inputs(dataclasses.replace(size, queries=75, causal=True)))


MASKS = {
    "window": as_mask("window(9)"),
    "one-sided": as_mask("window(left=5, right=2)"),
    "causal-window-and-sink": as_mask("causal & (window(6) | sink(3))"),
    "documents": Document([20, 0, 33, 7]),
    "per-head": PerHead([as_mask("causal"), as_mask("window(4)")]),
    "everything": as_mask("full"),
    "nothing": as_mask("~full"),
    "rows-without-keys": as_mask("causal & ~window(12)"),
    "dense": as_mask(torch.arange(3600).reshape(60, 60) % 7 < 3),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_masks_of_every_kind(spec, backend, mask, size):
    if not spec.declares("mask"):
        pytest.skip("declares no masks")
    case = spec.inputs(dataclasses.replace(size, queries=60, deviation=4.0))
    assert_conforms(spec, backend, with_options(case, mask=mask))


@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_a_row_without_keys_gives_zero_and_minus_infinity(spec, backend, size):
    if not (spec.declares("mask") and spec.declares("lse")):
        pytest.skip("declares no masks or no lse")
    case = with_options(spec.inputs(size), mask="causal & ~window(4)")
    got = results(plainly(spec, backend), spec, case)
    assert (got["out"][:, :, :4] == 0).all() and (got["lse"][:, :, :4] == float("-inf")).all()
    assert got["lse"][:, :, 4:].isfinite().all()
    if spec.declares("backward"):
        assert (got["grad of q"][:, :, :4] == 0).all() and got["grad of k"].isfinite().all()


SCORES = {
    "scale": {"scale": 0.3},
    "scale-zero": {"scale": 0.0},
    "softcap": {"softcap": 3.0},
    "sink": {"sink": torch.tensor([0.5, -2.0])},
}


@pytest.mark.parametrize("options", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_what_changes_the_scores(spec, backend, options, size):
    (name,) = options
    if not (takes(spec, name) if name == "scale" else spec.declares(name)):
        pytest.skip(f"declares no {name}")
    options = {n: v.to(size.device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    case = spec.inputs(dataclasses.replace(size, deviation=4.0))
    assert_conforms(spec, backend, with_options(case, **options))


@pytest.mark.parametrize("batched", [False, True], ids=["shared", "per-batch"])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_logical_positions_in_any_storage_order(spec, backend, batched, size, generator):
    if not (spec.declares("positions") and spec.declares("mask")):
        pytest.skip("declares no positions")
    case = spec.inputs(dataclasses.replace(size, keys=50) if spec.declares("noncausal_cross") else size)
    (batch, _, nq, _), nk = case.q.shape, case.k.shape[2]
    rows = batch if batched else 1
    q_pos = torch.stack([torch.randperm(nk, generator=generator)[:nq] for _ in range(rows)])
    k_pos = torch.stack([torch.randperm(nk, generator=generator) for _ in range(rows)])
    given = (q_pos, k_pos) if batched else (q_pos[0], k_pos[0])
    at = tuple(t.to(size.device) for t in given)
    assert_conforms(spec, backend, with_options(case, mask="causal & window(9)", positions=at))


@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_views_of_any_strides(spec, backend, size):
    case = spec.inputs(size)
    wide = [torch.cat((t, t.flip(-1)), dim=-1).transpose(1, 2).contiguous().transpose(1, 2) for t in case[:3]]
    views = [w[..., ::2] for w in wide]
    gates = {name: torch.stack((g, g), dim=-1)[..., 0] for name, g in gates_of(spec, case).items()}
    views += gates.values()
    assert not any(v.is_contiguous() for v in views)
    strided = with_options(case._replace(q=views[0], k=views[1], v=views[2]), **gates)
    assert_conforms(spec, backend, strided)
    before = [v.clone() for v in views]
    with torch.no_grad():
        call(spec, backend, strided)
    assert all(torch.equal(a, b) for a, b in zip(before, views, strict=True)), "an input was written to"


@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_no_result_reads_memory_before_writing_it(spec, backend, size):
    with nan_poisoned():
        assert_conforms(spec, backend, spec.inputs(dataclasses.replace(size, queries=129)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64], ids=["fp32", "bf16", "fp16", "fp64"])
@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_results_have_the_promised_shape_and_dtype(spec, backend, dtype, size):
    heads = {"heads": 4, "kv_heads": 2} if spec.declares("gqa") else {}
    case = spec.inputs(dataclasses.replace(size, dtype=dtype, **heads))
    got = call(spec, backend, case, **({"return_lse": True} if spec.declares("lse") else {}))
    out = got.out if spec.declares("lse") else got
    assert out.shape == (*case.q.shape[:3], case.v.shape[3]) and out.dtype == dtype
    if spec.declares("lse"):
        assert got.lse.shape == case.q.shape[:3]
        assert got.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("spec", "backend"), pairs())
def test_gradients_match_finite_differences(spec, backend, size):
    if not spec.declares("backward"):
        pytest.skip("declares no gradients")
    case = spec.inputs(
        dataclasses.replace(size, batch=1, queries=9, width=3, dtype=torch.float64, device="cpu")
    )
    gates = {name: gate for name, gate in gates_of(spec, case).items() if gate.is_floating_point()}
    leaves = [t.clone().requires_grad_() for t in (*case[:3], *gates.values())]
    options = {"return_lse": True} if spec.declares("lse") else {}

    def run(q, k, v, *rest):
        given = with_options(case._replace(q=q, k=k, v=v), **dict(zip(gates, rest, strict=True)))
        got = call(spec, backend, given, **options)
        return tuple(got) if options else got

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
