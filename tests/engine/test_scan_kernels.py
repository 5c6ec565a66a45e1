"""The kernels of the scan engine beside the definition: values, every gradient, shapes, borders, extremes, refusals."""

from __future__ import annotations

import pytest
import torch

from manyheads.common.errors import UnsupportedError
from manyheads.engine.scan import State, launch, scan
from manyheads.engine.scan.op import op
from manyheads.testing import assert_within_budget, nan_poisoned
from tests.engine.scan_calls import FULL, KINDS, WIDE, agree, draw

pytest.importorskip("triton")
HALF = torch.float16

@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_every_gradient_in_chunks_of_a_tile(kind, dtype, device):
    agree(draw(kind, heads=2, kv_heads=1, chunk=16), dtype, device)


@pytest.mark.parametrize("dtype", [FULL, pytest.param(HALF, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_every_gradient_with_tiles_in_chunks(kind, dtype, device):
    agree(draw(kind, 150, heads=2, kv_heads=1, d=8, chunk=128), dtype, device)


@pytest.mark.parametrize(("d", "dv"), [(1, 1), (72, 40), (129, 3), (16, 200)], ids=str)
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_widths(d, dv, dtype, device):
    kind = "mlstm" if dtype == FULL else "token"
    agree(draw(kind, 19, d=d, dv=dv, heads=1, kv_heads=1, chunk=16, seed=4), dtype, device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_the_widest_heads(dtype, device):
    agree(draw("token", 19, d=256, dv=256, heads=1, kv_heads=1, chunk=16, seed=4), dtype, device)


@pytest.mark.parametrize("group", [1, 3])
def test_heads_of_a_group_share_keys(group, device):
    agree(draw("token", 21, heads=group * 2, kv_heads=2, batch=2, chunk=16), FULL, device)


@pytest.mark.parametrize("lens", [[5, 16, 16], [0, 20, 0, 17, 0], [1] * 37], ids=str)
@pytest.mark.parametrize("kind", ["plain", "token", "mlstm"])
def test_nothing_passes_a_border(kind, lens, device):
    call = draw(kind, chunk=16, heads=2, kv_heads=1, lens=lens)
    got = agree(call, FULL, device)
    if kind == "token":
        begins = torch.tensor(lens).cumsum(0)[:-1].unique()
        assert (got["ddecay"][:, :, begins[(begins > 0) & (begins < 37)]] == 0).all()


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_a_reset_in_the_middle_of_a_tile_costs_its_neighbours_no_digits(dtype, device):
    call = draw("token", 64, heads=2, kv_heads=1, chunk=32)
    call.logs["decay"] /= 10
    call.logs["decay"][:, :, 20] = -1e4
    agree(call, dtype, device)


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_extreme_gates_stay_finite_and_right(size, device):
    call = draw("head gate", 70, heads=2, kv_heads=1, chunk=32, state=False)
    gate = call.logs["gate"]
    gate.copy_(gate.sign() * size)
    gate[:, :, :3] = -1e4
    forgets = torch.rand(1, 2, 70, generator=torch.Generator().manual_seed(1)) < 0.1
    call.logs["decay"] = -torch.rand(1, 2, 70, dtype=WIDE).masked_fill(forgets, 1e4)
    got, exact = call.run(FULL, "triton", device), call.run(WIDE, "reference", device)
    assert_within_budget(got["out"], exact["out"], call.run(FULL, "reference", device)["out"])
    assert all(t.isfinite().all() for name, t in got.items() if name != "m")


def test_forgetting_everything_leaves_each_token_to_itself(device):
    call = draw("head", 20, chunk=16, heads=2, kv_heads=2)
    call.logs["decay"].fill_(-torch.inf)
    got = call.run(FULL, "triton", device)
    q, k, v = (t.to(device, FULL) for t in call.qkv)
    torch.testing.assert_close(got["out"], 0.7 * (q * k).sum(-1, keepdim=True) * v)
    assert (got["ddecay"] == 0).all()


def test_the_chunk_changes_no_result(device):
    want, *others = (
        draw("mlstm", 100, heads=1, kv_heads=1, d=8, chunk=chunk).run(FULL, "triton", device) for chunk in (1, 64, 256)
    )
    for got in others:
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_strides_do_not_matter_and_bfloat16_is_taken(device):
    call = draw("mlstm", 20, chunk=16)
    q, k, v = (t.to(device, torch.bfloat16) for t in call.qkv)
    odd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    logs = {n: t.to(device, FULL) for n, t in call.logs.items()}
    strange = {n: t.movedim(2, 0).contiguous().movedim(0, 2) for n, t in logs.items()}
    want = scan(q, k, v, **logs, normalise="max1", backend="triton")
    assert want.dtype == torch.bfloat16
    assert torch.equal(scan(*odd, **strange, normalise="max1", backend="triton"), want)


@pytest.mark.parametrize("sizes", [(0, 2, 5), (1, 2, 0), (1, 1, 1)], ids=str)
def test_empty_and_single_calls(sizes, device):
    b, h, n = sizes
    q, k, v = (torch.randn(b, h, n, w, device=device, requires_grad=True) for w in (6, 6, 3))
    start = State(torch.randn(b, h, 6, 3, device=device, requires_grad=True))
    out, state = scan(q, k, v, decay=torch.zeros(h, device=device), state=start, return_state=True, backend="triton")
    grads = torch.autograd.grad(out.sum() + state.S.sum(), [q, k, v, start.S])
    assert all(g.isfinite().all() for g in grads)
    if n == 0:
        assert torch.equal(state.S, start.S) and (grads[3] == 1).all()


def test_nothing_uninitialised_is_read_and_two_runs_give_the_same_bits(device):
    call = draw("mlstm", 40, chunk=32, heads=2, kv_heads=1)
    want = call.run(FULL, "triton", device)
    with nan_poisoned():
        got = call.run(FULL, "triton", device)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_gradients_are_found_only_where_they_are_wanted(device):
    call = draw("token", 20, chunk=16)
    q, k, v = (t.to(device, FULL) for t in call.qkv)
    g = call.logs["decay"].to(device, FULL)
    every = [t.clone().requires_grad_() for t in (q, k, v, g)]
    want = torch.autograd.grad(scan(*every[:3], decay=every[3], backend="triton").sum(), every)
    for i, own in enumerate((q, k, v, g)):
        leaf = own.clone().requires_grad_()
        given = [leaf if j == i else t for j, t in enumerate((q, k, v, g))]
        (grad,) = torch.autograd.grad(scan(*given[:3], decay=given[3], backend="triton").sum(), leaf)
        torch.testing.assert_close(grad, want[i])


def test_the_operator_is_registered_soundly(device):
    call = draw("mlstm", 17, d=4, dv=3, heads=1, kv_heads=1)
    q, k, v = (t.to(device, FULL).requires_grad_() for t in call.qkv)
    logs = [call.logs[n].to(device, FULL) for n in ("decay", "gate")]
    state = torch.randn(1, 1, 4, 4, device=device).requires_grad_()
    m = torch.zeros(1, 1, device=device)
    arguments = (q, k, v, logs[0], None, logs[1], state, m, None, 0.5, call.normalise, 16, "triton", False)
    torch.library.opcheck(op, arguments)
    torch.library.opcheck(op, (*arguments[:8], torch.tensor([5, 12]), *arguments[9:-1], True))


def test_it_compiles_whole_with_gradients(device):
    torch._dynamo.reset()
    call = draw("mlstm", 20)
    q, k, v, decay, gate = (t.to(device, FULL).requires_grad_() for t in (*call.qkv, *call.logs.values()))

    def run(q, k, v, decay, gate):
        return scan(q, k, v, decay=decay, gate=gate, normalise=True, backend="triton") + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [q, k, v, decay, gate]
    got, want = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, run))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_what_the_kernels_cannot_take_is_refused_with_reasons_and_auto_takes_another(device):
    call = draw("token", 12, d=8)
    q, k, v = (t.to(device, FULL) for t in call.qkv)
    beta = torch.rand(1, 4, 12, device=device)
    decay = torch.zeros(1, 4, 12, 8, device=device)
    cases = [
        ("decay per channel", {"decay": decay}),
        (r"delta rule \(beta\)", {"beta": beta}),
    ]
    for words, options in cases:
        with pytest.raises(UnsupportedError, match=f"'triton' cannot take this call: .*{words}"):
            scan(q, k, v, **options, backend="triton")
        want = scan(q, k, v, **options, backend="blocked")
        assert torch.equal(scan(q, k, v, **options), want)
    with pytest.raises(UnsupportedError, match="float64 has no matrix instruction"):
        scan(q.double(), k.double(), v.double(), backend="triton")
    with pytest.raises(UnsupportedError, match="head widths from 1 to 256, got D = 300"):
        scan(*(torch.zeros(1, 1, 2, 300, device=device),) * 3, backend="triton")
    assert launch.refuse_call(q, v, None, None) == []
