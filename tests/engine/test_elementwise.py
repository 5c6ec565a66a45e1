"""The elementwise recurrence: equal to its loop at every length, with gradients of every order."""

from __future__ import annotations

import pytest
import torch

from manyheads.engine.scan.elementwise import elementwise, op

F64 = torch.float64


def draw(generator, n, batch=(2, 3), d=4):
    """Factors with zeros among them, inputs, a state."""
    keep = torch.rand(*batch, n, d, generator=generator, dtype=F64)
    keep = keep.masked_fill(torch.rand(*batch, n, d, generator=generator) < 0.1, 0.0)
    x, state = (torch.randn(*batch, *s, generator=generator, dtype=F64) for s in ((n, d), (d,)))
    return keep, x, state


def loop(keep, x, state):
    """The definition."""
    outs = []
    for a, b in zip(keep.unbind(-2), x.unbind(-2), strict=True):
        state = a * state + b
        outs.append(state)
    return torch.stack(outs, -2)


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 65, 1100])
def test_equals_its_loop_and_its_gradients(generator, n):
    given = [t.requires_grad_() for t in draw(generator, n)]
    got, want = elementwise(*given), loop(*given)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    seed = torch.randn(got.shape, generator=generator, dtype=F64)
    for a, b in zip(*(torch.autograd.grad(y, given, seed) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [3, 35])
def test_gradients_of_both_orders_match_finite_differences(generator, n):
    given = [t.requires_grad_() for t in draw(generator, n, batch=(1,), d=2)]
    assert torch.autograd.gradcheck(elementwise, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(elementwise, given, fast_mode=True)


def test_no_tokens_and_no_state(generator):
    keep, x, state = (t.requires_grad_() for t in draw(generator, 0))
    out = elementwise(keep, x, state)
    assert out.shape == (2, 3, 0, 4)
    assert torch.autograd.grad(out.sum(), state)[0].eq(0).all()
    keep, x, _ = draw(generator, 5)
    torch.testing.assert_close(elementwise(keep, x), loop(keep, x, torch.zeros(2, 3, 4, dtype=F64)))


def test_tiny_factors_lose_nothing():
    keep = torch.full((400, 1), 1e-30)
    x = torch.ones(400, 1)
    assert elementwise(keep, x).eq(1).all()
    assert elementwise(torch.ones(4000, 1), torch.full((4000, 1), 0.25)).squeeze().tolist()[-1] == 1000


def test_half_precision_is_summed_in_float32(generator):
    keep, x, state = (t.to(torch.bfloat16) for t in draw(generator, 70))
    out = elementwise(keep, x, state)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, loop(keep.float(), x.float(), state.float()))


@pytest.mark.parametrize("n", [5, 70])
def test_is_a_well_behaved_operator(generator, n):
    given = [t.requires_grad_() for t in draw(generator, n)]
    torch.library.opcheck(op, given)


def test_compiles_to_one_graph(generator):
    given = draw(generator, 40)
    compiled = torch.compile(elementwise, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), elementwise(*given))


def test_wrong_input_is_named():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"keep: expected the shape \(..., N, D\) = \(2, 3\) of x, got \(3,\)"):
        elementwise(x[0], x)
    with pytest.raises(ValueError, match=r"state: expected shape \(..., D\) = \(3,\), got \(2,\)"):
        elementwise(x, x, x[:, 0])
    with pytest.raises(TypeError, match="x: expected a floating tensor, got torch.int64"):
        elementwise(x, x.long())
