"""The delta rule with momentum: its limits, its chunks, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.engine.scan import scan
from manyheads.mechanism.regression import MomentumState, momentum_delta
from manyheads.mechanism.regression.momentum import reference


def draw(generator, n=45, d=4, dv=3, heads=2):
    q, k, v = (torch.randn(2, heads, n, w, generator=generator, dtype=torch.float64) for w in (d, d, dv))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, momentum = (torch.rand(2, heads, n, generator=generator, dtype=torch.float64) for _ in range(2))
    decay = -0.2 * torch.rand(2, heads, n, generator=generator, dtype=torch.float64)
    return (q, k, v), {"beta": beta, "momentum": 0.9 * momentum, "decay": decay}


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_every_chunking_is_the_recursion(chunk, generator):
    inputs, gates = draw(generator)
    mask = Document([10, 0, 35]) & Causal()
    per_head = {"momentum": gates["momentum"][0, :, 0]}
    for options in (gates, gates | per_head, gates | {"decay": None}, gates | {"mask": mask}):
        torch.testing.assert_close(momentum_delta(*inputs, **options, chunk=chunk), reference(*inputs, **options))


def test_without_momentum_it_is_the_gated_delta_rule(generator):
    inputs, gates = draw(generator)
    zero = torch.zeros(2, dtype=torch.float64)
    want = scan(*inputs, decay=gates["decay"], beta=gates["beta"], scale=0.5)
    got = momentum_delta(*inputs, **gates | {"momentum": zero}, scale=0.5)
    torch.testing.assert_close(got, want)


def test_it_is_gradient_descent_with_momentum(generator):
    (q, k, v), gates = draw(generator, n=12, heads=1)
    steps, inertia = 0.3, 0.8
    M = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([M], lr=steps, momentum=inertia)
    rows = []
    for t in range(12):
        optimiser.zero_grad()
        (0.5 * (k[0, 0, t] @ M - v[0, 0, t]).square().sum()).backward()
        optimiser.step()
        rows.append(q[0, 0, t] @ M.detach())
    got = momentum_delta(q[:1], k[:1], v[:1], beta=torch.full((1, 1, 12), steps, dtype=torch.float64),
                         momentum=torch.tensor([inertia], dtype=torch.float64))  # fmt: skip
    torch.testing.assert_close(got[0, 0], torch.stack(rows))


def test_gradients_match_finite_differences(generator):
    inputs, gates = draw(generator, n=7, heads=1)
    leaves = [t[:1].requires_grad_() for t in (*inputs, *gates.values())]
    assert torch.autograd.gradcheck(
        lambda q, k, v, beta, momentum, decay: momentum_delta(
            q, k, v, beta=beta, momentum=momentum, decay=decay, chunk=3
        ),
        leaves,
    )


def test_a_momentum_of_zero_has_finite_gradients(generator):
    inputs, gates = draw(generator)
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    out = momentum_delta(*(t.requires_grad_() for t in inputs), **gates | {"momentum": zero})
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [*inputs, zero]))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"beta": torch.full((2, 2, 45), 2.5)}, ValueError, r"beta: expected values in \[0, 2\]"),
        ({"momentum": torch.tensor([0.5, 1.5])}, ValueError, r"momentum: expected values in \[0, 1\]"),
        ({"decay": torch.ones(2)}, ValueError, r"decay: expected values in \[-inf, 0\]"),
        ({"momentum": torch.ones(3)}, ValueError, r"momentum: expected shape \(H=2,\)"),
        ({"beta": 0.5}, TypeError, "beta: expected a floating tensor, got float"),
        ({"chunk": -1}, ValueError, "chunk: expected a positive number"),
        ({"state": 1}, TypeError, "state: expected a MomentumState"),
        ({"state": MomentumState(torch.ones(1), torch.ones(1))}, ValueError, "state: M must be torch.float64"),
        ({"mask": "window(4)"}, UnsupportedError, "momentum-delta does not support mask"),
    ],
)
def test_wrong_input_is_named(options, error, match, generator):
    inputs, gates = draw(generator)
    with pytest.raises(error, match=match):
        momentum_delta(*inputs, **gates | options)
