"""The operator of the scan engine: registration, tracing, derivatives, and agreement with independent code."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from manyheads import Document
from manyheads.common.errors import UnsupportedError
from manyheads.engine.scan import State, scan, step
from manyheads.engine.scan.op import op

CASES = {
    "plain": {},
    "head": {"decay": (2,)},
    "token": {"decay": (1, 2, 11)},
    "channel": {"decay": (1, 2, 11, 4)},
    "delta": {"decay": (1, 2, 11), "beta": (1, 2, 11)},
    "mlstm": {"decay": (1, 2, 11), "gate": (1, 2, 11)},
}


def arguments(case, dtype=torch.float64, grad=True, backend="blocked", chunk=4, lens=None):
    """The operator's arguments for small tensors of one case."""
    generator = torch.Generator().manual_seed(1)
    shapes = CASES[case]

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k, v = leaf(1, 2, 11, 4), leaf(1, 1, 11, 4), leaf(1, 1, 11, 3)
    decay = -leaf(*shapes["decay"]).abs() if "decay" in shapes else None
    beta = leaf(*shapes["beta"]).sigmoid() if "beta" in shapes else None
    gate = leaf(*shapes["gate"]) if "gate" in shapes else None
    normalise = "max1" if gate is not None else ""
    state = leaf(1, 2, 4, 4 if normalise else 3)
    m = None if gate is None else leaf(1, 2)
    tensors = [None if t is None else t.requires_grad_(grad) for t in (q, k, v, decay, beta, gate, state)]
    lens = None if lens is None else torch.tensor(lens)
    return (*tensors, m, lens, 0.5, normalise, chunk, backend, False)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_the_operator_is_registered_soundly(case, backend):
    torch.library.opcheck(op, arguments(case, torch.float32, backend=backend))
    torch.library.opcheck(op, arguments(case, torch.float32, grad=False, backend=backend, lens=[5, 6]))


@pytest.mark.parametrize("lens", [None, [3, 8]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_derivatives_match_finite_differences(case, lens):
    args = arguments(case, lens=lens)
    present = [i for i in range(7) if args[i] is not None]

    def run(*leaves):
        given = list(args)
        for i, leaf in zip(present, leaves, strict=True):
            given[i] = leaf
        out, state, m, *_ = op(*given)
        return out, state * m.exp()[..., None, None] if m.numel() else state

    assert torch.autograd.gradcheck(run, [args[i] for i in present], fast_mode=True, nondet_tol=0.0)


@pytest.mark.parametrize("case", CASES)
def test_it_compiles_whole_with_gradients(case):
    torch._dynamo.reset()
    q, k, v, decay, beta, gate, *_ = arguments(case, torch.float32)
    leaves = [t for t in (q, k, v, decay, beta, gate) if t is not None]

    def run(q, k, v):
        out, state = scan(q, k, v, decay=decay, beta=beta, gate=gate, normalise=gate is not None, return_state=True)
        return out + 1, state.S

    def everything(f):
        out, s = f(q, k, v)
        return [out, s, *torch.autograd.grad(out.sum() + s.sum(), leaves)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(everything(compiled), everything(run), strict=True):
        torch.testing.assert_close(got, want)


def test_a_new_length_compiles_nothing():
    torch._dynamo.reset()

    def run(q, g, lens):
        return scan(q, q, q, decay=g, lens=lens)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)

    def call(n):
        q, g = torch.randn(1, 2, n, 8, requires_grad=True), -torch.rand(1, 2, n)
        lens = torch.tensor([10, n - 10])
        got = compiled(q, g, lens)
        torch.testing.assert_close(got, run(q, g, lens))
        got.sum().backward()

    for n in (40, 57, 72):
        call(n)
    with torch.compiler.set_stance("fail_on_recompile"):
        call(91)


def test_inductor_compiles_the_engine():
    torch._dynamo.reset()
    q, g = torch.randn(1, 2, 64, 16), -torch.rand(1, 2, 64)

    def run(q, g):
        return scan(q * 2, q, q, decay=g) + 1

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(q, g), run(q, g))


def test_borders_padding_and_reversal_compile_whole():
    torch._dynamo.reset()
    q, g = torch.randn(1, 2, 20, 8), -torch.rand(1, 2, 20)
    real = torch.arange(20)[None] % 5 != 0

    def run(q, g, lens):
        return scan(q, q, q, decay=g, lens=lens, key_padding=real, reverse=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for lens in ([8, 12], torch.tensor([8, 12]), Document([8, 12])):
        torch.testing.assert_close(compiled(q, g, lens), run(q, g, lens))


def test_values_are_checked_in_compiled_code_too():
    torch._dynamo.reset()
    q = torch.randn(1, 2, 20, 8)
    compiled = torch.compile(lambda q, g: scan(q, q, q, decay=g), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="log decays are at most 0"):
        compiled(q, torch.ones(2))


def test_a_step_compiles_whole():
    torch._dynamo.reset()
    q, g = torch.randn(1, 2, 4), -torch.rand(1, 2)
    state = State(torch.randn(1, 2, 4, 4))

    def run(q, g, state):
        return step(q, q, q, state, decay=g)

    out, after = torch.compile(run, fullgraph=True, backend="aot_eager")(q, g, state)
    torch.testing.assert_close(out, run(q, g, state)[0])
    torch.testing.assert_close(after.S, run(q, g, state)[1].S)


def test_autocast_reaches_the_engine_and_leaves_states_wide():
    q, g = torch.randn(1, 2, 32, 16), -torch.rand(1, 2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = scan(q, q, q, decay=g, return_state=True)
    assert out.dtype == torch.bfloat16
    assert state.S.dtype == torch.float32
    torch.testing.assert_close(out, scan(*[q.bfloat16()] * 3, decay=g))


def test_checkpointing_recomputes_the_same():
    q, k, v, decay, beta, *_ = arguments("delta")

    def run(q, k, v, decay, beta):
        return scan(q, k, v, decay=decay, beta=beta).square()

    leaves = (q, k, v, decay, beta)
    plain = torch.autograd.grad(run(*leaves).sum(), leaves)
    again = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_gradients_are_found_only_where_they_are_wanted():
    q, k, v, decay, *_ = arguments("token", grad=False)
    v.requires_grad_()
    (grad,) = torch.autograd.grad(scan(q, k, v, decay=decay).sum(), v)
    every = [t.clone().requires_grad_() for t in (q, k, v, decay)]
    torch.testing.assert_close(grad, torch.autograd.grad(scan(*every[:3], decay=every[3]).sum(), every)[2])
    assert not scan(q, k, v.detach(), decay=decay).requires_grad


def test_what_is_not_supported_refuses():
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    with pytest.raises(UnsupportedError, match="gradients of gradients"):
        (grad,) = torch.autograd.grad(scan(q, q, q).sum(), q, create_graph=True)
        grad.sum().backward()
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda t: scan(t, t, t))(torch.randn(2, 1, 1, 4, 8))


def test_two_runs_give_the_same_bits():
    first, second = (op(*arguments("delta", torch.float32, grad=False)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- code that others wrote ---------------------------------------------------------------------------------------


def naive(module):
    """A module of plain functions of flash-linear-attention; the package warns of a machine without a GPU."""
    import importlib
    import importlib.util
    import warnings

    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"fla.ops.{module}.naive")


def others(n=75, h=3, d=8, dv=8):
    """Inputs in this layout, and a function to the other one, ``(B, N, H, D)``."""
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, h, n, d, generator=generator) for _ in range(2))
    v, g = torch.randn(2, h, n, dv, generator=generator), -torch.rand(2, h, n, generator=generator)
    return q, F.normalize(k, dim=-1), v, g, lambda t: t.transpose(1, 2)


def agree(got, want):
    """Equal up to rounding in float32."""
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)


def test_a_decay_per_token_equals_simple_gla():
    q, k, v, g, swap = others()
    want, last = naive("simple_gla").naive_recurrent_simple_gla(*map(swap, (q, k, v, g)))
    got, state = scan(q, k, v, decay=g, scale=8**-0.5, return_state=True)
    agree(got, swap(want))
    agree(state.S, last)


def test_a_decay_per_channel_equals_gla():
    q, k, v, _, swap = others(dv=5)
    g = -torch.rand(q.shape, generator=torch.Generator().manual_seed(6))
    start = torch.ones(2, 3, 8, 5)
    want, last = naive("gla").naive_recurrent_gla(
        *map(swap, (q, k, v, g)), initial_state=start, output_final_state=True
    )
    got, state = scan(q, k, v, decay=g, scale=8**-0.5, state=State(start), return_state=True)
    agree(got, swap(want))
    agree(state.S, last)


def test_the_gated_delta_rule_equals_theirs():
    q, k, v, g, swap = others(dv=5)
    beta = torch.rand(g.shape, generator=torch.Generator().manual_seed(7))
    start = torch.ones(2, 3, 8, 5)
    want, last = naive("gated_delta_rule").naive_recurrent_gated_delta_rule(
        *map(swap, (q, k, v, beta, g)), initial_state=start, output_final_state=True
    )
    got, state = scan(q, k, v, decay=g, beta=beta, scale=8**-0.5, state=State(start), return_state=True)
    agree(got, swap(want))
    agree(state.S, last)


def test_a_decay_per_head_equals_retention():
    q, k, v, _, _ = others()
    decay = torch.log1p(-(2.0 ** (-5.0 - torch.arange(3))))
    agree(scan(q, k, v, decay=decay, scale=8**-0.5), naive("retention").naive_retention(q, k, v))
