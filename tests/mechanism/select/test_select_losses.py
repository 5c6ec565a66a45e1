"""The loss of an indexer: its value, its analytic gradients, who gets none, and that nothing of all pairs is made."""

from __future__ import annotations

import pytest
import torch

from manyheads.mechanism.select import block_causal, index_loss, top_k


def draw(generator, *shape):
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def plainly(q, k, index_q, index_k, visible, weights=None):
    """The mean divergence on a matrix of chosen pairs (B, S, Nq, Nk), by autograd."""
    sets = visible.shape[1]
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = visible.repeat_interleave(q.shape[1] // sets, 1)

    def logs(scores, seen):
        return scores.masked_fill(~seen, -1e9).log_softmax(-1).masked_fill(~seen, 0.0)

    teacher = logs(q @ keys.mT * q.shape[3] ** -0.5, seen).exp() * seen
    teacher = teacher.unflatten(1, (sets, -1)).mean(2)
    products = index_q @ index_k.mT * index_q.shape[3] ** -0.5
    if weights is not None:
        products = (products.relu() * weights[..., None]).unflatten(1, (sets, -1)).sum(2)
    loss = (teacher * (teacher.clamp(min=1e-300).log() - logs(products, visible))).sum(-1)
    return loss[visible.any(-1)].mean()


def matrix(ids, n):
    """Ids as bools."""
    found = torch.zeros(*ids.shape[:3], n + 1, dtype=torch.bool)
    return found.scatter(3, torch.where(ids < 0, n, ids).long(), True)[..., :-1]


def compare(leaves, ours, plain):
    """Both losses and all gradients."""
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-12)
    for a, b in zip(torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * plain, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def causal(nq, nk):
    """The visible pairs of queries at the end of the keys."""
    return torch.ones(nq, nk, dtype=torch.bool).tril(nk - nq)


@pytest.fixture(params=[0, 1000], ids=["gathered", "in-place"])
def _both_ways(request, monkeypatch):
    """Chosen keys are gathered for each query, or all are multiplied where they are."""
    monkeypatch.setattr("manyheads.mechanism.select.losses._GATHERED", request.param)


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(("nq", "nk"), [(37, 37), (11, 40)])
@pytest.mark.parametrize("q_block", [1, 4])
def test_over_chosen_blocks_gradients_are_those_of_autograd(generator, chunk, nq, nk, q_block):
    q, k = draw(generator, 2, 6, nq, 8), draw(generator, 2, 2, nk, 8)
    index_q, index_k = draw(generator, 2, 2, nq, 5).requires_grad_(), draw(generator, 2, 1, nk, 5).requires_grad_()
    rows, blocks = -(-nq // q_block), -(-nk // 4)
    ids = top_k(draw(generator, 2, 2, rows, blocks), 3, visible=block_causal(nq, nk, q_block, 4))
    chosen = matrix(ids, blocks).repeat_interleave(q_block, 2)[:, :, :nq].repeat_interleave(4, 3)[..., :nk]
    ours = index_loss(q, k, index_q, index_k, ids, block=4, q_block=q_block, chunk=chunk)
    compare((index_q, index_k), ours, plainly(q, k, index_q, index_k, chosen & causal(nq, nk)))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("sets", [1, 2, 4])
def test_over_token_ids_with_weighted_heads(generator, sets):
    n = 23
    q, k = draw(generator, 2, 4, n, 8), draw(generator, 2, 2, n, 8)
    leaves = draw(generator, 2, 8, n, 5), draw(generator, 2, sets, n, 5), draw(generator, 2, 8, n)
    index_q, index_k, weights = (t.requires_grad_() for t in leaves)
    ids = top_k(draw(generator, 2, sets, n, n), 6, visible=causal(n, n))
    ours = index_loss(q, k, index_q, index_k, ids, weights=weights, chunk=5)
    wide = index_k.repeat_interleave(8 // sets, 1)
    compare((index_q, index_k, weights), ours, plainly(q, k, index_q, wide, matrix(ids, n), weights))


@pytest.mark.parametrize("weighted", [False, True])
def test_without_ids_it_is_over_all_visible_keys(generator, weighted):
    q, k = draw(generator, 2, 4, 19, 8), draw(generator, 2, 4, 30, 8)
    index_q, index_k = draw(generator, 2, 4, 19, 5).requires_grad_(), draw(generator, 2, 1, 30, 5).requires_grad_()
    weights = draw(generator, 2, 4, 19).requires_grad_() if weighted else None
    leaves = (index_q, index_k, *((weights,) if weighted else ()))
    visible = causal(19, 30).expand(2, 1 if weighted else 4, -1, -1)
    ours = index_loss(q, k, index_q, index_k, weights=weights, chunk=4)
    compare(leaves, ours, plainly(q, k, index_q, index_k, visible, weights))


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("all_keys", [False, True])
def test_packed_documents_see_only_themselves(generator, all_keys):
    lens = torch.tensor([9, 0, 14])
    q, k, index_q, index_k = (draw(generator, 1, h, 23, 4) for h in (2, 2, 2, 1))
    ids = None if all_keys else torch.arange(6).expand(1, 2, 23, 6)
    whole = index_loss(q, k, index_q, index_k, ids, block=4, lens=lens)
    parts = [(slice(0, 9), 9), (slice(9, 23), 14)]
    alone = [index_loss(*(t[:, :, at] for t in (q, k, index_q, index_k))) * n / 23 for at, n in parts]
    torch.testing.assert_close(whole, sum(alone))


def test_only_the_indexer_learns(generator):
    q, k, index_q, index_k = (draw(generator, 1, 2, 9, 4).requires_grad_() for _ in range(4))
    index_loss(q, k, index_q, index_k, torch.zeros(1, 2, 9, 1, dtype=torch.int32)).backward()
    assert q.grad is None and k.grad is None and index_q.grad is not None
    assert index_q.grad.abs().max() < 1e-12  # one chosen key: nothing to learn
    index_loss(q, k, index_q, index_k).backward()
    assert index_q.grad.abs().max() > 1e-4 and index_k.grad.abs().max() > 1e-4


def test_a_perfect_indexer_has_no_loss(generator):
    q, k = draw(generator, 1, 2, 12, 4), draw(generator, 1, 2, 12, 4)
    assert index_loss(q, k, q, k).abs() < 1e-12 < index_loss(q, k, -q, k)


@pytest.mark.usefixtures("_both_ways")
def test_rows_that_see_nothing_count_for_nothing(generator):
    q, k, index_q, index_k = (draw(generator, 1, 2, 9, 4).requires_grad_() for _ in range(4))
    none = torch.full((1, 2, 9, 2), -1)
    loss = index_loss(q, k, index_q, index_k, none)
    loss.backward()
    assert loss == 0 and not index_q.grad.any()
    some = none.clone()
    some[:, :, 5] = torch.tensor([1, 4])
    some_loss = index_loss(q, k, index_q, index_k, some)
    alone = index_loss(q[:, :, 5:6], k[:, :, :6], index_q[:, :, 5:6], index_k[:, :, :6], some[:, :, 5:6])
    torch.testing.assert_close(some_loss, alone)


def test_half_precision_inputs_give_gradients_of_their_dtype(generator):
    q, k, index_q, index_k = (draw(generator, 1, 2, 40, 8).bfloat16() for _ in range(4))
    index_q.requires_grad_()
    loss = index_loss(q, k, index_q, index_k)
    (grad,) = torch.autograd.grad(loss, index_q)
    assert loss.dtype == torch.float32 and grad.dtype == torch.bfloat16
    exact = index_loss(*(t.detach().double() for t in (q, k, index_q, index_k)))
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


def test_memory_does_not_grow_with_all_pairs(generator):
    """All the tensors that one step makes are smaller than the matrix of pairs."""
    n = 1024
    q, k, index_q, index_k = (draw(generator, 1, 1, n, 4).float() for _ in range(4))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
            return out

    with Watch():
        index_loss(q, k, index_q.requires_grad_(), index_k, chunk=32).backward()
    assert 32 * n <= largest <= n * n // 8


@pytest.mark.usefixtures("_both_ways")
def test_it_compiles_to_one_graph(generator):
    q, k, index_q, index_k = (draw(generator, 1, 2, 12, 4).requires_grad_() for _ in range(4))
    ids = torch.arange(3).expand(1, 2, 12, 3)
    compiled = torch.compile(index_loss, fullgraph=True, backend="aot_eager")
    a, b = (f(q, k, index_q, index_k, ids, block=4) for f in (index_loss, compiled))
    compare((index_q, index_k), a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_q": (1, 2, 8, 4)}, "index_q: expected"),
        ({"index_k": (1, 2, 9, 5)}, "index_k: expected"),
        ({"index_k": (1, 3, 9, 4)}, "index_k: expected"),
        ({"weights": (1, 2, 8)}, "weights: expected"),
        ({"ids": (1, 2, 8, 3)}, "ids: expected integers"),
        ({"ids": (1, 3, 9, 3), "index_k": (1, 1, 9, 4)}, "3 sets do not fit the 2 heads of k"),
        ({"ids": (1, 1, 9, 3), "index_k": (1, 1, 9, 4)}, "each set has one index head"),
        ({"q": (1, 3, 9, 4)}, "q: its 3 heads"),
        ({"block": 0}, "block: expected at least 1"),
        ({"lens": [4, 4]}, "documents that sum to the 9"),
        ({"lens": [4, 4], "q": (1, 2, 5, 4), "index_q": (1, 2, 5, 4)}, "as many queries as keys"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    shapes = {"q": (1, 2, 9, 4), "k": (1, 2, 9, 4), "index_q": (1, 2, 9, 4), "index_k": (1, 2, 9, 4)}
    given = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, value in changes.items():
        dtype = torch.int32 if name == "ids" else None
        given[name] = torch.zeros(value, dtype=dtype) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        index_loss(**given)
