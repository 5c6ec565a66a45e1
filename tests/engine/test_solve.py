"""The solvers of the solve engine: conjugate gradients, triangular systems by blocks, inverses by products."""

from __future__ import annotations

import warnings

import pytest
import torch

from manyheads.engine.solve import ConvergenceError, Solver, conjugate_gradient, newton_schulz, triangular

WIDE = torch.float64


def definite(*batch, size=7, seed=0, shift=0.3):
    """Random symmetric positive definite matrices."""
    root = torch.randn(*batch, size, size, dtype=WIDE, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT + shift * torch.eye(size, dtype=WIDE)


def product(x, a):
    """``A x`` for one vector of each matrix."""
    return (a @ x[..., None])[..., 0]


def normal(*shape, seed=1):
    """Normal numbers."""
    return torch.randn(*shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


# --- conjugate gradients ------------------------------------------------------------------------------------------


def test_solutions_equal_those_of_a_dense_solver():
    a, b = definite(3, 2), normal(3, 2, 7)
    found = conjugate_gradient(product, b, a, tol=1e-12, max_steps=100)
    torch.testing.assert_close(found.x, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
    assert found.converged.all() and (found.residual <= 1e-12).all()


def test_as_many_steps_as_distinct_eigenvalues_are_enough():
    a = torch.diag_embed(torch.tensor([[1.0, 1.0, 1.0, 5.0], [2.0, 2.0, 2.0, 2.0]], dtype=WIDE))
    found = conjugate_gradient(product, normal(2, 4), a)
    assert found.steps.tolist() == [2, 1]


def test_a_system_that_is_done_is_frozen_while_others_go_on():
    easy, hard = torch.eye(6, dtype=WIDE), definite(size=6, shift=1e-3)
    alone = conjugate_gradient(product, normal(1, 6), easy[None])
    both = conjugate_gradient(product, normal(1, 6).expand(2, 6), torch.stack([easy, hard]), max_steps=100)
    assert both.steps[0] == 1 < both.steps[1]
    assert torch.equal(both.x[0], alone.x[0])


def test_nothing_on_the_right_is_solved_by_nothing_at_once():
    found = conjugate_gradient(product, torch.zeros(2, 7, dtype=WIDE), definite(2))
    assert (found.x == 0).all() and (found.steps == 0).all() and found.converged.all()


def test_a_good_start_saves_steps():
    a, b = definite(4), normal(4, 7)
    found = conjugate_gradient(product, b, a, start=torch.linalg.solve(a, b))
    assert (found.steps == 0).all() and found.converged.all()


def test_gradients_are_those_of_the_solution():
    a, b = definite(2, size=4).requires_grad_(), normal(2, 4).requires_grad_()

    def solved(b, a):
        return conjugate_gradient(lambda x, a: product(x, (a + a.mT) / 2), b, a, tol=1e-13, max_steps=200).x

    assert torch.autograd.gradcheck(solved, (b, a))
    got = torch.autograd.grad(solved(b, a).square().sum(), (b, a))
    want = torch.autograd.grad(torch.linalg.solve((a + a.mT) / 2, b).square().sum(), (b, a))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


def test_what_does_not_converge_warns_raises_or_is_left_to_the_caller():
    a, b = definite(3, shift=1e-6), normal(3, 7)
    with pytest.warns(RuntimeWarning, match=r"3 of 3 systems did not converge: relative residual up to"):
        found = conjugate_gradient(product, b, a, max_steps=2)
    assert not found.converged.any() and (found.steps == 2).all()
    true = (b - product(found.x, a)).norm(dim=-1) / b.norm(dim=-1)
    torch.testing.assert_close(found.residual, true)
    with pytest.raises(ConvergenceError, match="did not converge"):
        conjugate_gradient(product, b, a, max_steps=2, unconverged="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not conjugate_gradient(product, b, a, max_steps=2, unconverged="ignore").converged.any()


def test_a_matrix_that_is_not_definite_is_reported():
    a = torch.diag_embed(torch.tensor([[1.0, -1.0]], dtype=WIDE))
    found = conjugate_gradient(product, torch.ones(1, 2, dtype=WIDE), a, unconverged="ignore")
    assert not found.converged.any() and found.x.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"b": torch.ones(3).half()}, TypeError, "b: expected a tensor in float32 or float64"),
        ({"b": torch.ones(())}, ValueError, r"b: expected shape \(..., D\)"),
        ({"start": torch.ones(4, dtype=WIDE)}, ValueError, "start: expected the shape of b"),
        ({"tol": 0.0}, ValueError, "tol: expected a number"),
        ({"max_steps": 0}, ValueError, "max_steps: expected at least 1"),
        ({"unconverged": "warm"}, ValueError, "did you mean 'warn'"),
        ({"matvec": lambda x: x[..., :1] * 2}, ValueError, "matvec: expected a product of the shape of b"),
    ],
)
def test_wrong_input_of_conjugate_gradients_is_named(options, error, message):
    given = {"matvec": lambda x: 2 * x, "b": torch.ones(3, dtype=WIDE)} | options
    matvec, b = given.pop("matvec"), given.pop("b")
    with pytest.raises(error, match=message):
        conjugate_gradient(matvec, b, **given)


# --- triangular systems -------------------------------------------------------------------------------------------


def lower(*batch, size=13):
    """Matrices whose lower triangle is well conditioned; what lies above is noise."""
    return normal(*batch, size, size) + 3 * torch.eye(size, dtype=WIDE)


def of(i0, i1, full):
    """Rows of a matrix that is there."""
    return full[..., i0:i1, :i1]


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("block", [1, 4, 13, 64])
def test_blocks_of_any_size_solve_the_same_system(block, unit):
    full, b = lower(2), normal(2, 13, 3)
    want = torch.linalg.solve_triangular(full, b, upper=False, unitriangular=unit)
    torch.testing.assert_close(triangular(of, b, full, block=block, unit=unit), want)


@pytest.mark.parametrize("unit", [False, True])
def test_gradients_of_a_triangular_solve_are_implicit(unit):
    full, b = lower(2, size=7).requires_grad_(), normal(2, 7, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda b, full: triangular(of, b, full, block=3, unit=unit), (b, full))


def test_rows_made_from_tokens_never_hold_the_matrix():
    x, b = normal(1, 40, 4).requires_grad_(), normal(1, 40, 3).requires_grad_()
    sizes = []

    def rows(i0, i1, x):
        made = torch.softmax(x[:, i0:i1] @ x[:, :i1].mT, dim=-1) + 2 * torch.eye(40, dtype=WIDE)[i0:i1, :i1]
        sizes.append(made.numel())
        return made

    got = torch.autograd.grad(triangular(rows, b, x, block=8).square().sum(), (x, b))
    seen = torch.cat([torch.nn.functional.pad(rows(i, i + 8, x), (0, 32 - i)) for i in range(0, 40, 8)], dim=1)
    want = torch.autograd.grad(
        torch.linalg.solve_triangular(seen.tril(), b, upper=False).square().sum(), (x, b)
    )
    torch.testing.assert_close(got, want)
    assert max(sizes) == 8 * 40


def test_one_matrix_serves_a_batch_of_right_hand_sides():
    full, b = lower().requires_grad_(), normal(3, 13, 2)
    out = triangular(of, b, full, block=5)
    torch.testing.assert_close(out, torch.linalg.solve_triangular(full, b, upper=False))
    got = torch.autograd.grad(out.sum(), full)[0]
    want = torch.autograd.grad(torch.linalg.solve_triangular(full, b, upper=False).sum(), full)[0]
    torch.testing.assert_close(got, want)


def test_wrong_input_of_a_triangular_solve_is_named():
    full, b = lower(), normal(13, 2)
    with pytest.raises(ValueError, match=r"b: expected shape \(..., N, E\)"):
        triangular(of, b[:, 0], full)
    with pytest.raises(ValueError, match="block: expected a positive number"):
        triangular(of, b, full, block=0)
    with pytest.raises(ValueError, match=r"rows: expected \(..., 13, 13\)"):
        triangular(lambda i0, i1: full[i0:i1, :5], b)
    with pytest.raises(ValueError, match="dtype of b"):
        triangular(of, b, full.float())
    full = full.clone()
    full[9, 9] = 0.0
    with pytest.raises(ValueError, match="row 9 has a zero on its diagonal"):
        triangular(of, b, full, block=4)
    with pytest.raises(TypeError, match="float32 or float64"):
        triangular(of, b.bfloat16(), full)


# --- inverses -----------------------------------------------------------------------------------------------------


def test_inverses_by_products_equal_those_of_a_dense_solver():
    a = lower(2, 3, size=9)
    found = newton_schulz(a, tol=1e-12)
    torch.testing.assert_close(found.x, torch.linalg.inv(a), rtol=1e-9, atol=1e-9)
    assert found.converged.all() and (found.residual <= 1e-12).all()


def test_gradients_of_an_inverse_need_no_iteration():
    assert torch.autograd.gradcheck(lambda a: newton_schulz(a, tol=1e-12).x, lower(2, size=4).requires_grad_())


def test_a_singular_matrix_is_reported_beside_one_that_is_not():
    a = torch.stack([torch.ones(3, 3, dtype=WIDE), torch.eye(3, dtype=WIDE)])
    with pytest.warns(RuntimeWarning, match="1 of 2 systems did not converge"):
        found = newton_schulz(a)
    assert found.converged.tolist() == [False, True]
    with pytest.raises(ConvergenceError):
        newton_schulz(a, unconverged="raise")


def test_wrong_input_of_an_inverse_is_named():
    with pytest.raises(ValueError, match=r"a: expected shape \(..., D, D\)"):
        newton_schulz(torch.ones(2, 3))
    with pytest.raises(ValueError, match="tol: expected"):
        newton_schulz(torch.eye(2), tol=2.0)
    with pytest.raises(ValueError, match="max_steps"):
        newton_schulz(torch.eye(2), max_steps=0)
    with pytest.raises(TypeError, match="float32 or float64"):
        newton_schulz(torch.eye(2).half())


# --- how the engine solves ----------------------------------------------------------------------------------------


def test_a_solver_survives_the_way_through_an_operator():
    for solver in (Solver(), Solver("cg", 1e-7, 12, "raise"), Solver("direct", unconverged="ignore")):
        assert Solver.read(solver.text) == solver


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gc"}, "did you mean 'cg'"),
        ({"tol": 1.0}, "tol: expected"),
        ({"steps": 0}, "steps: expected"),
        ({"unconverged": "rise"}, "did you mean 'raise'"),
    ],
)
def test_a_solver_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Solver(**options)


def test_a_ridge_below_rounding_is_raised_and_said():
    from manyheads.engine.solve.normal import factors

    matrix, ridge = torch.ones(2, 3, 3), torch.full((2,), 1e-30)
    with pytest.warns(RuntimeWarning, match="ridge: 1e-30 is below the rounding of the moments of 2 queries"):
        found = factors(matrix, ridge)
    torch.testing.assert_close(found @ found.mT, matrix, rtol=0, atol=1e-5)
