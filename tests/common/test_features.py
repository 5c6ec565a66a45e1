"""Feature maps: the kernels that their products stand for, their sizes, and how random directions are drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from manyheads.common.features import (
    FeatureMap,
    Pointwise,
    Positive,
    Powers,
    Rectified,
    Softmax,
    Taylor,
    Trigonometric,
    gaussian,
    orthogonal,
    pair,
)

DRAWS = {"orthogonal": orthogonal, "independent": gaussian}


def fixed(seed=0):
    """A generator whose draws are the same every day: statistical bounds hold for it or do not."""
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=1):
    """Normal numbers in float64, the same every day."""
    return torch.randn(*shape, generator=fixed(seed), dtype=torch.float64)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_directions_have_the_moments_of_normal_vectors(draw):
    rows = draw(60_000, 3, generator=fixed(), dtype=torch.float64)
    bound = 5 / math.sqrt(len(rows))
    assert (rows.mean(0).abs() < bound).all(), "a sign that a decomposition fixes shows here"
    assert ((rows.T @ rows / len(rows) - torch.eye(3)).abs() < 3 * bound).all()
    assert abs(float(rows.norm(dim=1).mean()) - math.sqrt(8 / math.pi)) < bound


@pytest.mark.parametrize(("features", "width"), [(5, 5), (7, 3), (2, 9), (64, 16)])
@pytest.mark.parametrize("norms", ["chi", "constant"])
def test_directions_are_orthogonal_within_blocks(features, width, norms):
    rows = orthogonal(features, width, norms=norms, generator=fixed(), dtype=torch.float64)
    assert rows.shape == (features, width)
    for block in rows.split(width):
        gram = block @ block.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-12)
    if norms == "constant":
        torch.testing.assert_close(rows.square().sum(1), torch.full((features,), float(width), dtype=torch.float64))


def test_a_generator_decides_the_draw():
    for draw in DRAWS.values():
        assert torch.equal(draw(9, 4, generator=fixed(3)), draw(9, 4, generator=fixed(3)))
        assert not torch.equal(draw(9, 4, generator=fixed(3)), draw(9, 4, generator=fixed(4)))


MAPS = {
    "positive": Positive,
    "hyperbolic": lambda w: Positive(w, hyperbolic=True),
    "trigonometric": Trigonometric,
}


def estimates(kind, draw, q, k, *, draws, block):
    """Products of features under many independent draws of ``block`` directions, ``(draws, pairs)``."""
    rows = draw(draws * block, q.shape[1], generator=fixed(5), dtype=torch.float64)
    return torch.stack([(MAPS[kind](w)(q) * MAPS[kind](w)(k)).sum(-1) for w in rows.split(block)])


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_products_estimate_the_exponential_of_the_dot_product(kind, draw):
    q, k = (0.3 * normal(12, 6, seed=seed) for seed in (1, 2))  # small: large ones have tails, and no normal limit
    found = estimates(kind, draw, q, k, draws=2000, block=6)
    error = (found.mean(0) - (q * k).sum(-1).exp()).abs()
    assert (error < 4.5 * found.std(0) / math.sqrt(len(found))).all()


@pytest.mark.parametrize("kind", MAPS)
def test_a_factor_is_a_multiple_of_the_tokens(kind):
    x, w = normal(5, 4), orthogonal(6, 4, generator=fixed(), dtype=torch.float64)
    torch.testing.assert_close(MAPS[kind](w).times(0.3)(x), MAPS[kind](w)(0.3 * x))
    torch.testing.assert_close(MAPS[kind](w).times(0.3).times(-2.0)(x), MAPS[kind](w)(-0.6 * x))


@pytest.mark.parametrize("fmap", [Pointwise(), Softmax(), Taylor((0, 1, 2)), Rectified(), FeatureMap()])
def test_a_factor_works_on_any_map(fmap):
    x = normal(5, 4)
    torch.testing.assert_close(fmap.times(0.7)(x), fmap(0.7 * x))
    assert fmap.times(1.0) is fmap


@pytest.mark.parametrize("size", [1e-6, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_positive_features_stay_in_range_for_tokens_of_any_size(size, eps):
    features, log = Positive(gaussian(32, 16, generator=fixed()), eps=eps).scaled(size * normal(20, 16).float())
    assert features.isfinite().all() and log.isfinite().all()
    assert (features.amax(-1) > 0.9).all() and (features <= 2.0).all() and (features >= 0).all()


def test_the_floor_lifts_every_feature_by_itself():
    w, x = gaussian(8, 4, generator=fixed(), dtype=torch.float64), normal(5, 4)
    torch.testing.assert_close(Positive(w, eps=0.01)(x), Positive(w)(x) + 0.01 / math.sqrt(8))


@pytest.mark.parametrize("hyperbolic", [False, True])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_gradients_do_not_notice_the_logarithm_kept_apart(hyperbolic, eps):
    w, x = gaussian(5, 3, generator=fixed(), dtype=torch.float64), normal(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(Positive(w, hyperbolic, eps, 0.8), x)

    def plain(x):
        y = 0.8 * x @ w.T
        y = torch.cat([y, -y], -1) if hyperbolic else y
        return ((y - (0.8 * x).square().sum(-1, keepdim=True) / 2).exp() + eps) / math.sqrt(y.shape[-1])

    torch.testing.assert_close(Positive(w, hyperbolic, eps, 0.8)(x), plain(x))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_powers_have_powers_of_dot_products(order, width):
    q, k = normal(7, width), normal(7, width, seed=2)
    fmap = Powers(order)
    assert fmap(q).shape == (7, fmap.width(width))
    torch.testing.assert_close(fmap(q) @ fmap(k).T, (q @ k.T) ** order)


def test_powers_are_the_tensor_power_with_equal_entries_merged():
    x = normal(3)
    full = torch.einsum("i,j,k->ijk", x, x, x)
    index = list(itertools.combinations_with_replacement(range(3), 3))
    count = [len(set(itertools.permutations(i))) for i in index]
    want = torch.stack([full[i] * math.sqrt(n) for i, n in zip(index, count, strict=True)])
    torch.testing.assert_close(Powers(3)(x), want)


@pytest.mark.parametrize("orders", [(0,), (1,), (0, 1, 2), (1, 3), (3, 0)])
def test_taylor_features_sum_the_orders_of_the_exponential(orders):
    q, k = normal(7, 3), normal(7, 3, seed=2)
    want = sum((q @ k.T) ** n / math.factorial(n) for n in orders)
    torch.testing.assert_close(Taylor(orders)(q) @ Taylor(orders)(k).T, want)
    assert Taylor(orders)(q).shape[1] == Taylor(orders).width(3)


@pytest.mark.parametrize("order", [2, 3])
def test_powers_have_true_gradients(order):
    assert torch.autograd.gradcheck(Powers(order), normal(3, 4).requires_grad_())


def test_powers_compile_to_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(Taylor((0, 1, 2, 3)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(normal(5, 3)), Taylor((0, 1, 2, 3))(normal(5, 3)))


def test_rectified_features_follow_their_formula():
    w, x = gaussian(6, 4, generator=fixed(), dtype=torch.float64), normal(5, 4)
    torch.testing.assert_close(Rectified(w)(x), (x @ w.T).relu() / math.sqrt(6) + 1e-3)
    torch.testing.assert_close(Rectified()(x), x.relu() + 1e-3)


@pytest.mark.parametrize(
    ("kind", "want"),
    [("elu+1", lambda x: torch.where(x > 0, x + 1, x.exp())), ("exp", torch.exp), ("relu", torch.relu)],
)
def test_pointwise_features_follow_their_formula(kind, want):
    torch.testing.assert_close(Pointwise(kind)(normal(9)), want(normal(9)))
    torch.testing.assert_close(Pointwise(kind, eps=0.5)(normal(9)), want(normal(9)) + 0.5)


@pytest.mark.parametrize("kind", ["elu+1", "relu", "exp"])
def test_inputs_are_not_written_to(kind):
    for fmap in (Pointwise(kind), Rectified(), Softmax(), Positive(gaussian(3, 4), eps=0.1), FeatureMap()):
        x = normal(5, 4)
        fmap.scaled(x)
        assert torch.equal(x, normal(5, 4))


def test_half_precision_is_mapped_in_float32():
    x, w = normal(5, 4).bfloat16(), gaussian(3, 4)
    for fmap in (Pointwise(), Softmax(), Positive(w), Trigonometric(w), Taylor(), Rectified(w)):
        assert fmap(x).dtype == torch.float32
        torch.testing.assert_close(fmap(x), fmap(x.float()))


def test_a_pair_of_maps_is_for_queries_and_keys():
    assert pair((Softmax(), Pointwise("exp")))[1].kind == "exp"
    with pytest.raises(TypeError, match="features: expected a FeatureMap or a pair"):
        pair(torch.relu)
    with pytest.raises(TypeError, match="features: expected a FeatureMap or a pair"):
        pair((Softmax(),) * 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Positive(torch.ones(3)), r"projection: expected a floating \(m, D\)"),
        (lambda: Positive(torch.ones(3, 2).long()), r"projection: expected a floating \(m, D\)"),
        (lambda: Trigonometric(torch.ones(0, 2)), r"projection: expected a floating \(m, D\) with m >= 1"),
        (lambda: Positive(torch.ones(3, 2), eps=-1.0), "eps: expected a number from 0, got -1"),
        (lambda: Positive(torch.ones(3, 2))(torch.ones(4, 3)), r"projection: expected shape \(m, D=3\), got \(3, 2\)"),
        (lambda: Rectified(torch.ones(3, 2), eps=math.nan), "eps: expected a number from 0"),
        (lambda: Powers(-1), "order: expected a number from 0"),
        (lambda: Taylor(()), "orders: expected distinct numbers"),
        (lambda: Taylor((1, 1)), "orders: expected distinct numbers"),
        (lambda: Pointwise("relo"), "unknown pointwise feature map 'relo': did you mean 'relu'"),
        (lambda: orthogonal(0, 3), "features: expected at least one row"),
        (lambda: gaussian(3, 0), "features: expected at least one row"),
        (lambda: orthogonal(3, 3, norms="ch"), "unknown norms 'ch': did you mean 'chi'"),
    ],
)
def test_wrong_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
