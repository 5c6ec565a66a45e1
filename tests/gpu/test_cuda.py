"""What only a GPU can show: real launches against float64, graphs, compilation, memory, repeatability."""

from __future__ import annotations

import pytest
import torch

import manyheads as mh
from manyheads.engine.scan import scan
from manyheads.engine.tiled import tiled
from manyheads.mask.layout import TileLayout
from manyheads.testing import assert_within_budget, sample_qkv
from tests.engine import scan_calls

pytestmark = pytest.mark.gpu

MASKS = {
    "full": mh.Full(),
    "causal": mh.Causal(),
    "window": mh.Causal() & mh.Window(700),
    "documents": mh.Document([900, 37, 1111]) & mh.Causal(),
}


def grads_of(backend, mask, q, k, v, seeds):
    """Output, lse and gradients of one backend."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = tiled(*leaves, mask, return_lse=True, backend=backend)
    found = torch.autograd.grad([out, lse], leaves, [seeds[0].to(out.dtype), seeds[1].to(lse.dtype)])
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse.detach(), *found), strict=True))


@pytest.mark.parametrize("deviation", [1.0, 8.0])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_kernels_are_within_budget_at_real_sizes(mask, dtype, width, deviation, device):
    size = {"kv_heads": 2, "width": width, "deviation": deviation, "device": device, "seed": 5}
    q, k, v = sample_qkv(1, 4, 2048, **size, dtype=dtype)
    seeds = torch.randn(q.shape, device=device), torch.randn(q.shape[:3], device=device)
    exact = grads_of("reference", mask, *(t.double() for t in (q, k, v)), seeds)
    plain = grads_of("reference", mask, q, k, v, seeds)
    for name, value in grads_of("triton", mask, q, k, v, seeds).items():
        assert_within_budget(value, exact[name], plain[name], what=name)


def test_tf32_is_used_only_when_asked_for(device):
    q, k, v = sample_qkv(1, 2, 512, width=64, device=device, seed=1)
    exact = mh.attention(*(t.double() for t in (q, k, v)), mask="causal & window(300)", backend="reference")
    before = torch.get_float32_matmul_precision()
    error = {}
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            got = mh.attention(q, k, v, mask="causal & window(300)", backend="triton")
            error[precision] = float((got - exact).abs().max())
    finally:
        torch.set_float32_matmul_precision(before)
    assert error["highest"] < 5e-6 < error["high"]


def test_a_step_can_be_captured_in_a_graph_and_replayed_on_new_inputs(device):
    q, k, v = sample_qkv(2, 8, 1, keys=4096, kv_heads=2, width=128, dtype=torch.bfloat16, device=device, seed=2)
    mask = mh.Causal() & mh.Window(1000)
    for _ in range(2):
        mh.attention(q, k, v, mask=mask, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mh.attention(q, k, v, mask=mask, backend="triton")
    q.copy_(torch.randn_like(q))
    graph.replay()
    torch.testing.assert_close(out, mh.attention(q, k, v, mask=mask, backend="triton"), rtol=0, atol=0)


def test_forward_and_backward_never_wait_for_the_device(device):
    q, k, v = (t.requires_grad_() for t in sample_qkv(1, 4, 1024, dtype=torch.bfloat16, device=device, seed=3))
    mask = mh.Causal() & mh.Window(200)
    slopes = torch.rand(4, device=device)

    def step():
        out, lse = mh.attention(q, k, v, mask=mask, bias=mh.ALiBi(slopes), return_lse=True)
        torch.autograd.grad(out.float().sum() + lse.sum(), (q, k, v))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ids_chosen_on_the_device_never_wait_for_it(device):
    q, k, v = (t.requires_grad_() for t in sample_qkv(1, 4, 1024, dtype=torch.bfloat16, device=device, seed=4))
    ids = torch.stack([torch.randperm(16, device=device)[:5] for _ in range(4 * 16)]).view(1, 4, 16, 5)

    def step():
        layout = TileLayout.from_ids(ids, nq=1024, nk=1024, tile=64)
        return torch.autograd.grad(tiled(q, k, v, layout).float().sum(), (q, k, v))

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    layout = TileLayout.from_ids(ids.cpu(), nq=1024, nk=1024, tile=64)
    want = torch.autograd.grad(tiled(q, k, v, layout, backend="reference").float().sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_inductor_compiles_it_without_a_break_and_no_length_twice(device):
    def scaled(q, k, v):
        return mh.attention(q * 1.5, k, v, mask="causal & window(90)") + 1

    compiled = torch.compile(scaled, fullgraph=True)
    for n in (512, 640, 768):
        q, k, v = sample_qkv(1, 4, n, dtype=torch.bfloat16, device=device, seed=n)
        torch.testing.assert_close(compiled(q, k, v), scaled(q, k, v), rtol=2e-2, atol=2e-2)


def test_a_new_length_compiles_no_kernel(device):
    from manyheads.engine.tiled import kernels

    def run(n):
        q, k, v = sample_qkv(1, 4, n, dtype=torch.bfloat16, device=device, seed=n)
        mh.attention(q, k, v, mask="causal & window(90)", backend="triton")

    run(1000)
    cache = kernels.forward.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    for n in (1001, 1016, 1777, 4096):
        run(n)
    assert len(cache) == before


def test_memory_is_linear_in_length(device):
    peaks = []
    for n in (16384, 32768):
        drawn = sample_qkv(1, 2, n, width=64, dtype=torch.bfloat16, device=device, seed=0)
        q, k, v = (t.requires_grad_() for t in drawn)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        torch.autograd.grad(mh.attention(q, k, v, mask="causal & window(512)").float().sum(), (q, k, v))
        peaks.append(torch.cuda.max_memory_allocated() - base)
    assert peaks[1] < 2.2 * peaks[0]


def test_a_non_default_stream_gives_the_same_bits(device):
    q, k, v = sample_qkv(1, 4, 2000, width=128, dtype=torch.bfloat16, device=device, seed=6)
    want = mh.attention(q, k, v, mask="causal & window(333)")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = mh.attention(q, k, v, mask="causal & window(333)")
    stream.synchronize()
    assert torch.equal(got, want)


# --- recurrences --------------------------------------------------------------------------------------------------

RECURRENCES = ("plain", "head", "token", "token abs", "mlstm")


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", RECURRENCES)
def test_recurrences_are_within_budget_at_real_sizes(kind, dtype, width, device):
    call = scan_calls.draw(kind, 1500, d=width, dv=width, batch=2)
    if "decay" in call.logs:
        call.logs["decay"] *= 0.1
    scan_calls.agree(call, dtype, device)


def test_packed_recurrences_are_within_budget(device):
    lens = [900, 1, 37, 562]
    scan_calls.agree(scan_calls.draw("mlstm", 1500, d=64, dv=64, lens=lens), torch.bfloat16, device)


def drawn(n, device, width=128, dtype=torch.bfloat16):
    """Queries, keys, values, log decays and gates."""
    q, k, v = sample_qkv(1, 4, n, width=width, dtype=dtype, device=device, seed=n)
    gate = torch.randn(1, 4, n, device=device)
    return q, k, v, -torch.rand(1, 4, n, device=device), gate


def test_recurrences_never_wait_for_the_device_and_can_be_captured(device):
    q, k, v, decay, gate = drawn(1000, device)
    lens = torch.tensor([400, 600])
    leaves = [t.requires_grad_() for t in (q, k, v, decay, gate)]

    def step():
        out = scan(q, k, v, decay=decay, gate=gate, normalise="max1", backend="triton")
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    want = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scan(q, k, v, decay=decay, lens=lens, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_new_length_of_a_recurrence_compiles_no_kernel(device):
    from manyheads.engine.scan import kernels

    def run(n):
        q, k, v, decay, gate = drawn(n, device)
        scan(q, k, v, decay=decay, gate=gate, normalise="max1", backend="triton")

    run(1000)
    caches = [kernel.device_caches[torch.cuda.current_device()][0] for kernel in (kernels.carry, kernels.mix)]
    before = [len(cache) for cache in caches]
    for n in (1001, 1016, 1777, 4096):
        run(n)
    assert [len(cache) for cache in caches] == before


def test_memory_of_a_recurrence_is_linear_in_length(device):
    peaks = []
    for n in (16384, 32768):
        q, k, v, decay, _ = drawn(n, device)
        leaves = [t.requires_grad_() for t in (q, k, v, decay)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        torch.autograd.grad(scan(q, k, v, decay=decay).float().sum(), leaves)
        peaks.append(torch.cuda.max_memory_allocated() - base)
    assert peaks[1] < 2.2 * peaks[0]
