"""The declaration of exact attention: its reference and its formulas."""

from __future__ import annotations

import torch

from manyheads import Causal, Window
from manyheads.mechanism import exact
from manyheads.spec import Size, find
from manyheads.testing import sample_qkv


def test_the_reference_is_the_softmax_of_torch():
    q, k, v = sample_qkv(2, 4, 9, kv_heads=2, keys=13, value_width=5, dtype=torch.float64, seed=0)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(exact.reference(q, k, v), want)


def test_the_reference_has_no_nan_where_nothing_is_visible():
    q, k, v = (t.requires_grad_() for t in sample_qkv(1, 1, 5, dtype=torch.float64, seed=0))
    got = exact.reference(q, k, v, mask="causal & ~window(3)", return_lse=True)
    assert (got.out[:, :, :3] == 0).all() and (got.lse[:, :, :3] == float("-inf")).all()
    (got.out.sum() + got.lse[:, :, 3:].sum()).backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v)) and (q.grad[:, :, :3] == 0).all()


def test_operations_are_counted_pair_by_pair():
    spec = find("exact")
    case = spec.inputs(Size(batch=3, heads=4, queries=10, width=8, value_width=6))
    assert spec.flops(case) == 2 * 3 * 4 * 100 * (8 + 6)
    masked = case._replace(options={"mask": Causal() & Window(2)})
    assert spec.flops(masked) == 2 * 3 * 4 * 19 * (8 + 6)


def test_bytes_are_those_of_inputs_and_output():
    spec = find("exact")
    case = spec.inputs(Size(batch=1, heads=4, kv_heads=2, queries=10, keys=20, width=8, dtype=torch.bfloat16))
    assert spec.bytes(case) == 2 * (4 * 10 * 8 + 2 * 2 * 20 * 8 + 4 * 10 * 8)
