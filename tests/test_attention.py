"""The front door: what it takes, whom it asks, what it says, and how it refuses."""

from __future__ import annotations

import math

import pytest
import torch

import manyheads as mh
from manyheads.engine.tiled import products
from manyheads.testing import assert_within_budget


@pytest.fixture
def qkv(generator):
    return [torch.randn(2, h, 20, 8, generator=generator) for h in (4, 2, 2)]


def test_text_value_and_tensor_mean_the_same(qkv):
    value = mh.Causal() & mh.Window(5)
    want = mh.attention(*qkv, mask=value)
    torch.testing.assert_close(mh.attention(*qkv, mask="causal & window(5)"), want)
    torch.testing.assert_close(mh.attention(*qkv, mask=value.dense(20)), want)
    torch.testing.assert_close(mh.attention(*qkv, mask=value.dense(20)[0, 0]), want)


def test_no_mask_means_every_key(qkv):
    torch.testing.assert_close(mh.attention(*qkv), mh.attention(*qkv, mask=mh.Full(), backend="reference"))


@pytest.mark.parametrize("mask", [None, "causal", "window(7)", "causal & (window(3) | sink(2))"])
@pytest.mark.parametrize("backend", mh.attention.__globals__["BACKENDS"])
def test_every_backend_agrees_or_says_why_not(qkv, mask, backend):
    want = mh.attention(*qkv, mask=mask, backend="reference")
    if mh.explain(*qkv, mask=mask).refusals[backend]:
        with pytest.raises(mh.UnsupportedError, match=f"backend '{backend}' cannot take this call: "):
            mh.attention(*qkv, mask=mask, backend=backend)
    else:
        torch.testing.assert_close(mh.attention(*qkv, mask=mask, backend=backend), want)


def test_the_layer_below_is_asked_only_for_what_it_can_do(qkv):
    refused = lambda **o: bool(mh.explain(*qkv, **o).refusals["sdpa"])  # noqa: E731
    assert not refused()
    assert not refused(mask="causal")
    assert not refused(return_lse=True)
    assert refused(mask="window(3)")
    assert refused(key_padding=torch.ones(2, 20, dtype=torch.bool))
    assert refused(positions=(torch.arange(20), torch.arange(20)))
    assert refused(softcap=3.0)
    assert refused(dropout_p=0.1)
    assert bool(mh.explain(qkv[0][:, :, :7], *qkv[1:], mask="causal").refusals["sdpa"])
    grads = [t.clone().requires_grad_() for t in qkv]
    assert mh.explain(*grads, return_lse=True).refusals["sdpa"] == ["its lse is not differentiable"]


def test_fewer_queries_are_the_last_ones(qkv):
    q, k, v = qkv
    whole = mh.attention(q, k, v, mask="causal")
    for backend in ("blocked", "reference"):
        torch.testing.assert_close(
            mh.attention(q[:, :, 13:], k, v, mask="causal", backend=backend), whole[:, :, 13:]
        )
    torch.testing.assert_close(mh.attention(q[:, :, 19:], k, v, mask="causal"), whole[:, :, 19:])


def test_delegated_lse_is_the_engines(qkv):
    for mask in (None, "causal"):
        got = mh.attention(*qkv, mask=mask, return_lse=True)
        want = mh.attention(*qkv, mask=mask, return_lse=True, backend="reference")
        torch.testing.assert_close(got.lse, want.lse)
        torch.testing.assert_close(got.out, want.out)


def test_lse_is_differentiable_through_auto(qkv):
    q, k, v = (t.double().requires_grad_() for t in qkv)
    got = torch.autograd.grad(mh.attention(q, k, v, return_lse=True).lse.sum(), (q, k))
    scores = torch.einsum("bhid,bhjd->bhij", q, k.repeat_interleave(2, 1)) * 8**-0.5
    want = torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_scale_may_be_zero_and_positions_may_be_scrambled(qkv, generator):
    q, k, v = qkv
    torch.testing.assert_close(mh.attention(q, k, v, scale=0.0)[0, 0, 3], v[0, 0].mean(0))
    order = torch.randperm(20, generator=generator)
    want = mh.attention(q, k, v, mask="causal & window(6)")[:, :, order]
    got = mh.attention(
        q[:, :, order], k[:, :, order], v[:, :, order], mask="causal & window(6)", positions=(order, order)
    )
    torch.testing.assert_close(got, want)


def test_dropout_is_replayed_by_its_generator(qkv):
    draw = lambda s: mh.attention(*qkv, dropout_p=0.5, generator=torch.Generator().manual_seed(s))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("fused", [True, False])
def test_the_measured_way_is_taken_and_explained(qkv, fused, monkeypatch):
    monkeypatch.setattr(products, "fused_wins", lambda dtype: fused)
    text = str(mh.explain(*qkv, mask="window(3)"))
    assert ("fused kernel" in text) == fused
    big = [torch.zeros(1, 4, 1100, 8) for _ in range(3)]
    assert mh.explain(*big).taken == ("sdpa" if fused else "blocked")


def test_explain_names_cost_and_surprises(qkv):
    text = str(mh.explain(*qkv, mask="causal | window(4)"))
    assert "blocked: taken" in text
    assert "sdpa: refused" in text
    assert "visited tiles" in text
    assert "later key" in text
    assert "later key" not in str(mh.explain(*qkv, mask="causal & window(4)"))


def test_weights_are_those_of_the_definition(qkv):
    q, k, v = qkv
    options = {"mask": "causal & window(9)", "softcap": 2.0}
    weights = mh.attention_weights(q, k, **options)
    got = torch.einsum("bhij,bhjd->bhid", weights, v.repeat_interleave(2, 1))
    torch.testing.assert_close(got, mh.attention(q, k, v, **options))
    torch.testing.assert_close(mh.attention_weights(q, k, rows=[5, -1], **options), weights[:, :, [5, 19]])
    assert (mh.attention_weights(q, k, mask="~full") == 0).all()


BIASES = {
    "alibi": lambda r: mh.ALiBi(r(4)),
    "relative": lambda r: mh.Relative(r(1, 9)),
    "pair": lambda r: mh.Pair(r(2, 1, 20, 20)),
    "per key": lambda r: mh.PerKey(r(1, 4, 20)),
    "per block": lambda r: mh.PerBlock(r(2, 4, 7, 4), (3, 5)),
    "sum": lambda r: mh.ALiBi(r(4)) + mh.Pair(r(1, 4, 1, 20)),
}


@pytest.mark.parametrize("make", BIASES.values(), ids=BIASES)
def test_weights_are_those_of_the_definition_under_every_bias(make, generator):
    q, k, v = (torch.randn(2, h, 20, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    leaves = []

    def leaf(*shape):
        leaves.append(torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_())
        return leaves[-1]

    order = torch.randperm(20, generator=generator)
    options = {"mask": "causal & window(9)", "bias": make(leaf), "positions": (order, order), "softcap": 3.0}
    weights = mh.attention_weights(q, k, **options)
    got = torch.einsum("bhij,bhjd->bhid", weights, v.repeat_interleave(2, 1))
    want = mh.attention(q, k, v, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves)
    )
    for rows in ([5, -1], [3, 4, 5, 2, 2], []):
        torch.testing.assert_close(mh.attention_weights(q, k, rows=rows, **options), weights[:, :, rows])


def test_weights_of_few_rows_do_not_make_the_others():
    q = torch.zeros(1, 1, 200_000, 2)  # all pairs under the bias would take 160 GB
    got = mh.attention_weights(q, q, mask="causal", bias=mh.ALiBi(torch.ones(1)), rows=[150_000])
    assert got[0, 0, 0, 149_999] / got[0, 0, 0, 150_000] == pytest.approx(math.exp(-1))


def test_weights_refuse_a_bias_that_does_not_fit(qkv):
    with pytest.raises(ValueError, match=r"bias ALiBi: expected a tensor of shape \(H,\) = \(4\), got \(3,\)"):
        mh.attention_weights(*qkv[:2], bias=mh.ALiBi(torch.ones(3)))
    with pytest.raises(TypeError, match="bias: expected ALiBi, .* got a tensor"):
        mh.attention_weights(*qkv[:2], bias=torch.ones(20, 20))


@pytest.mark.parametrize("deviation", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sharp_attention_stays_within_budget(dtype, deviation):
    from manyheads.testing import sample_qkv

    inputs = sample_qkv(2, 4, 300, kv_heads=2, width=64, deviation=deviation, dtype=dtype, seed=0)
    exact = mh.attention(
        *(
            t.double()
            for t in sample_qkv(
                2, 4, 300, kv_heads=2, width=64, deviation=deviation, dtype=torch.float64, seed=0
            )
        ),
        backend="reference",
    )
    for mask in (None, "causal", "causal & window(100)"):
        exact = mh.attention(*(t.double() for t in inputs), mask=mask, backend="reference")
        assert_within_budget(
            mh.attention(*inputs, mask=mask), exact, mh.attention(*inputs, mask=mask, backend="reference")
        )


def test_one_query_token_reads_a_group_at_once(generator):
    q, k, v = (torch.randn(2, h, n, 8, generator=generator) for h, n in ((6, 1), (2, 33), (2, 33)))
    torch.testing.assert_close(mh.attention(q, k, v), mh.attention(q, k, v, backend="reference"))


@pytest.mark.parametrize("backend", ["blocked", "sdpa"])
@pytest.mark.parametrize("mask", [None, "causal & window(9)"])
def test_gradients_that_arrive_as_views_are_read_as_such(mask, backend, generator):
    if mask and backend == "sdpa":
        pytest.skip("takes no window")
    q, k, v = (torch.randn(2, 2, 40, 16, generator=generator, requires_grad=True) for _ in range(3))
    wide = torch.randn(2, 2, 40, 32, generator=generator)
    out = mh.attention(q, k, v, mask=mask, backend=backend)
    for view in (wide[..., ::2], wide[..., :1].expand(2, 2, 40, 16), wide[..., :16].mT.contiguous().mT):
        got, want = (torch.autograd.grad(out, (q, k, v), g, retain_graph=True) for g in (view, view.contiguous()))
        torch.testing.assert_close(got, want)


def test_a_bias_over_no_queries_or_no_keys_is_no_matter():
    some, none = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 0, 8)
    bias = mh.ALiBi(torch.ones(2))
    assert mh.attention(none, some, some, bias=bias).shape == none.shape
    assert (mh.attention(some, none, none, bias=bias) == 0).all()


def test_no_keys_give_nothing():
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 0, 4)
    out, lse = mh.attention(q, k, k, return_lse=True)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def ones(*shape, **options):
    return torch.ones(*shape, **options)


Q = (1, 4, 6, 8)
BAD = {
    "rank": (
        lambda: (ones(4, 6, 8), ones(Q), ones(Q), {}),
        ValueError,
        r"q: expected 4 dimensions \(B, H, N, D\)",
    ),
    "heads": (
        lambda: (ones(1, 5, 6, 8), ones(1, 2, 6, 8), ones(1, 2, 6, 8), {}),
        ValueError,
        "5 heads .* multiple of the 2",
    ),
    "width": (
        lambda: (ones(Q), ones(1, 4, 6, 9), ones(Q), {}),
        ValueError,
        r"k: expected shape .*D=8.*, got \(1, 4, 6, 9\)",
    ),
    "length": (lambda: (ones(Q), ones(Q), ones(1, 4, 7, 8), {}), ValueError, "v: expected shape .*Nk=6"),
    "integers": (
        lambda: (ones(Q).long(), ones(Q).long(), ones(Q).long(), {}),
        TypeError,
        "q: expected float16.*int64",
    ),
    "dtypes": (lambda: (ones(Q), ones(Q).half(), ones(Q), {}), TypeError, "k: expected the dtype of q"),
    "devices": (
        lambda: (ones(Q), ones(Q, device="meta"), ones(Q), {}),
        ValueError,
        "k: expected the device of q",
    ),
    "scale": (
        lambda: (ones(Q), ones(Q), ones(Q), {"scale": float("nan")}),
        ValueError,
        "scale: expected a finite",
    ),
    "softcap": (
        lambda: (ones(Q), ones(Q), ones(Q), {"softcap": -1.0}),
        ValueError,
        "softcap: expected a positive",
    ),
    "dropout": (
        lambda: (ones(Q), ones(Q), ones(Q), {"dropout_p": 1.0}),
        ValueError,
        r"dropout_p: .*\[0, 1\)",
    ),
    "sink": (
        lambda: (ones(Q), ones(Q), ones(Q), {"sink": ones(3)}),
        ValueError,
        r"sink: expected shape \(Hq=4,\)",
    ),
    "bias tensor": (lambda: (ones(Q), ones(Q), ones(Q), {"bias": ones(6, 6)}), TypeError, "wrap .* as Pair"),
    "bias shape": (
        lambda: (ones(Q), ones(Q), ones(Q), {"bias": mh.ALiBi(ones(3))}),
        ValueError,
        "ALiBi: .*got",
    ),
    "positions range": (
        lambda: (
            ones(Q),
            ones(Q),
            ones(Q),
            {"mask": mh.Document([6]), "positions": (torch.arange(6), torch.arange(1, 7))},
        ),
        ValueError,
        "range|position",
    ),
    "positions type": (
        lambda: (ones(Q), ones(Q), ones(Q), {"positions": (ones(6), ones(6))}),
        TypeError,
        "integer",
    ),
    "positions shape": (
        lambda: (ones(Q), ones(Q), ones(Q), {"positions": (torch.arange(5), torch.arange(6))}),
        ValueError,
        "q_pos",
    ),
    "window": (lambda: (ones(Q), ones(Q), ones(Q), {"mask": "window(-3)"}), ValueError, "-3"),
    "documents": (
        lambda: (ones(Q), ones(Q), ones(Q), {"mask": mh.Document([2, 3])}),
        ValueError,
        "5.*6|6.*5",
    ),
    "mask length": (
        lambda: (ones(Q), ones(Q), ones(Q), {"mask": torch.ones(5, 5, dtype=torch.bool)}),
        ValueError,
        "mask|5",
    ),
    "mask text": (lambda: (ones(Q), ones(Q), ones(Q), {"mask": "causal & widow(3)"}), ValueError, "window"),
    "mask type": (lambda: (ones(Q), ones(Q), ones(Q), {"mask": 3}), TypeError, "mask"),
    "mask heads": (
        lambda: (ones(Q), ones(Q), ones(Q), {"mask": mh.PerHead([mh.Full()] * 3)}),
        ValueError,
        "heads size is 3",
    ),
    "padding": (
        lambda: (ones(Q), ones(Q), ones(Q), {"key_padding": ones(1, 6)}),
        TypeError,
        "key_padding: expected a bool",
    ),
    "padding shape": (
        lambda: (ones(Q), ones(Q), ones(Q), {"key_padding": torch.ones(1, 5, dtype=torch.bool)}),
        ValueError,
        "Nk=6",
    ),
    "backend": (
        lambda: (ones(Q), ones(Q), ones(Q), {"backend": "blokced"}),
        ValueError,
        "did you mean 'blocked'",
    ),
}


@pytest.mark.parametrize(("make", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named(make, error, words):
    q, k, v, options = make()
    with pytest.raises(error, match=words):
        mh.attention(q, k, v, **options)


def test_rows_of_weights_are_checked():
    with pytest.raises(ValueError, match="rows: expected indices of 6 queries"):
        mh.attention_weights(ones(Q), ones(Q), rows=[6])
