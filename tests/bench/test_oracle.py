"""The judge of results: exact where it says so, and strict where a result is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from manyheads.bench.oracle import judge, truth, visible
from manyheads.bench.workload import Problem
from manyheads.mask import Causal, Document, PerHead, Window, as_mask
from manyheads.mask.longca import STATIC, longca


@pytest.mark.parametrize("name", STATIC)
def test_visible_rows_are_rows_of_the_dense_mask(name):
    mask = longca(name, 97, seed=3).mask
    rows = np.array([0, 13, 50, 96])
    assert torch.equal(visible(mask, rows, 97, 97), mask.dense(97)[:, :, rows])


def test_visible_rows_may_differ_by_head_and_have_more_keys():
    mask = PerHead([Causal(), Window(5)])
    rows = np.array([2, 7])
    assert torch.equal(visible(mask, rows, 9, 20), mask.dense(9, 20)[:, :, rows])


@pytest.mark.parametrize("phase", ["forward", "forward+backward"])
def test_the_truth_is_attention_and_its_gradients_in_float64(phase):
    problem = Problem(Causal(), 30, 41, heads=4, kv_heads=2, width=8, value_width=6, dtype="float64", phase=phase)
    q, k, v = (t.requires_grad_() for t in problem.tensors())
    known = truth(problem, q.detach(), k.detach(), v.detach(), rows=12)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=problem.mask.dense(30, 41), enable_gqa=True)
    expected = [out[:, :, known.rows]]
    if problem.backward:
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), known.dout)
        expected += [dq[:, :, known.rows], dk, dv]
    for found, wanted in zip(known.exact, expected, strict=True):
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-12)


def test_a_row_that_sees_nothing_is_zero():
    problem = Problem(as_mask("causal & ~window(3)"), 20, width=8)
    q, k, v = problem.tensors()
    known = truth(problem, q, k, v)
    assert known.exact[0][:, :, :3].abs().max() == 0
    assert known.exact[0][:, :, 3:].abs().min() > 0


@pytest.mark.parametrize("deviation", [1.0, 8.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_itself_is_green_and_a_coarser_result_is_red(dtype, deviation):
    problem = Problem(Causal(), 200, width=32, dtype=dtype, deviation=deviation)
    q, k, v = problem.tensors()
    known = truth(problem, q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, :, known.rows]
    assert judge((out,), known).gate == "green"
    coarse = {"float32": torch.bfloat16, "bfloat16": torch.float8_e4m3fn}[dtype]
    assert judge((out.to(coarse).to(out.dtype),), known).gate == "red"


def test_a_wrong_gradient_is_red_though_the_output_is_right():
    problem = Problem(Document([50, 30]), 80, width=16, phase="forward+backward")
    known = truth(problem, *problem.tensors())
    right = known.peer
    assert judge(right, known).gate == "green"
    verdict = judge((*right[:3], right[3] * 1.01), known)
    assert verdict.gate == "red"
    assert verdict.error > verdict.limit


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_result_that_is_not_a_number_is_red_and_can_be_written(bad):
    problem = Problem(Causal(), 16, width=8)
    known = truth(problem, *problem.tensors())
    wrong = known.peer[0].clone()
    wrong[0, 0, 3, 2] = bad
    verdict = judge((wrong,), known)
    assert verdict.gate == "red"
    assert np.isfinite(verdict.error) and np.isfinite(verdict.norm)
