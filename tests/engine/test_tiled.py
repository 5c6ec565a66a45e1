"""The tiled engine: blocked against the definition in float64, values and every gradient."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from manyheads import ALiBi, Causal, Document, Full, Pair, PerBlock, PerHead, PerKey, Prefix, Relative, Window
from manyheads.common.errors import UnsupportedError
from manyheads.engine.tiled import WEIGHTS, passes, pieces, products, tiled
from manyheads.engine.tiled.dropout import keep
from manyheads.engine.tiled.plan import plan_of
from manyheads.testing import assert_within_budget

B, H, HKV, NQ, NK = 2, 6, 2, 70, 130
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["fused", "passes", "triton"])
def way(request, monkeypatch):
    """The kernels, and both ways of computing a piece without them, whichever wins on this machine."""
    monkeypatch.setattr(products, "fused_wins", lambda dtype: request.param == "fused")
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


PLACE = torch.device("cpu")


@pytest.fixture(autouse=True)
def _place(device, monkeypatch):
    """Inputs go where ``--device`` says."""
    monkeypatch.setitem(globals(), "PLACE", torch.device(device))


@pytest.fixture
def generator():
    """The same draw every day: a budget is a bound on typical rounding, and rounding has unlucky days."""
    return torch.Generator().manual_seed(0)


def make(generator, d=16, dv=16, nq=NQ, nk=NK, deviation=1.0):
    """Inputs in float64 with logits of a given deviation, and seeds for the gradients."""
    q = torch.randn(B, H, nq, d, generator=generator, dtype=torch.float64) * deviation
    k = torch.randn(B, HKV, nk, d, generator=generator, dtype=torch.float64)
    v = torch.randn(B, HKV, nk, dv, generator=generator, dtype=torch.float64)
    g = torch.randn(B, H, nq, dv, generator=generator, dtype=torch.float64)
    gl = torch.randn(B, H, nq, generator=generator, dtype=torch.float64)
    return tuple(t.to(PLACE) for t in (q, k, v, g, gl))


def run(inputs, mask, dtype, backend, extra=(), lse=True, **options):
    """Values and gradients of all inputs; ``extra`` builds keyword arguments from fresh leaf tensors."""
    q, k, v, g, gl = inputs
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    wide = torch.promote_types(dtype, torch.float32)
    more = {}
    for name, build, tensor in extra:
        leaf = tensor.to(PLACE, wide).requires_grad_()
        leaves.append(leaf)
        term = build(leaf)
        more[name] = more[name] + term if name in more else term
    result = tiled(*leaves[:3], mask, return_lse=lse, backend=backend, **more, **options)
    out, stats = result if lse else (result, None)
    loss = (out * g.to(out.dtype)).sum()
    if lse:
        loss = loss + torch.where(stats == -math.inf, 0.0, stats * gl.to(stats.dtype)).sum()
    names = ["out", *(["lse"] if lse else []), "dq", "dk", "dv", *(f"d{n}" for n, _, _ in extra)]
    grads = torch.autograd.grad(loss, leaves)
    return dict(zip(names, [out.detach(), *([stats.detach()] if lse else []), *grads], strict=True))


def backend_of(way):
    """The backend of a way of computing."""
    return "triton" if way == "triton" else "blocked"


def check(inputs, mask, dtype, extra=(), way="passes", **options):
    """A backend within budget of the reference backend in float64."""
    backend = backend_of(way)
    if way == "triton":  # the interpreter takes milliseconds a tile
        inputs = [t[:1] for t in inputs]
        extra = [(name, build, t[:1] if t.dim() > 2 else t) for name, build, t in extra]
    exact = run(inputs, mask, torch.float64, "reference", extra, **options)
    same = run(inputs, mask, dtype, "reference", extra, **options)
    got = run(inputs, mask, dtype, backend, extra, **options)
    for name, value in got.items():
        assert value.isfinite().all() or name == "lse", name
        assert_within_budget(value, exact[name], same[name], what=name)


MASKS = {
    "full": Full(),
    "causal": Causal(),
    "window": Causal() & Window(20),
    "nothing": ~Prefix(NK),
    "per head": PerHead([Causal(), Window(5), Full(), Causal(), Causal(), Window(3)]),
    "documents": Document([20, 0, 50], [60, 30, 40]) & Causal(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_values_and_gradients_match_the_definition(mask, dtype, way, generator):
    check(make(generator), mask, dtype, way=way)


@pytest.mark.parametrize("deviation", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_sharp_scores_stay_within_budget(dtype, deviation, way, generator):
    check(make(generator, d=64, dv=64, deviation=deviation), Causal() & Window(90), dtype, way=way)


@pytest.mark.parametrize(("d", "dv"), [(8, 24), (40, 8), (72, 72), (5, 3), (1, 1)])
def test_widths_may_be_odd_and_differ(d, dv, way, generator):
    check(make(generator, d, dv), Causal(), torch.float32, way=way)


def test_more_queries_than_keys_leave_empty_rows(way, generator):
    inputs = make(generator, nq=NK, nk=NQ)
    check(inputs, Causal() & Window(3), torch.float32, way=way)
    out, lse = tiled(*(t.float() for t in inputs[:3]), Causal(), return_lse=True, backend=backend_of(way))
    assert (out[:, :, : NK - NQ] == 0).all()
    assert (lse[:, :, : NK - NQ] == -math.inf).all()


def test_rows_that_see_nothing_pass_no_gradient_whatever_comes_in(way, generator):
    q, k, v = (t.float().requires_grad_() for t in make(generator, nq=NK, nk=NQ)[:3])
    out, lse = tiled(q, k, v, Causal(), return_lse=True, backend=backend_of(way))
    grads = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.exp(lse) / torch.exp(lse)])
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, : NK - NQ] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sink_joins_the_normaliser(dtype, way, generator):
    sink = torch.randn(H, generator=generator, dtype=torch.float64)
    extra = [("sink", lambda t: t, sink)]
    got, exact = (
        run(make_again(generator), Causal(), d, b, extra)
        for d, b in ((dtype, backend_of(way)), (torch.float64, "reference"))
    )
    same = run(make_again(generator), Causal(), dtype, "reference", extra)
    for name in got:
        assert_within_budget(got[name], exact[name], same[name], what=name)


def make_again(generator):
    """The same inputs on every call."""
    return make(torch.Generator().manual_seed(generator.initial_seed()))


@pytest.mark.parametrize("way", ["passes", "triton"])
def test_every_batch_entry_has_its_own_mask_and_positions(way, generator):
    mask = Document([[40, 30], [10, 60]], [[70, 60], [100, 30]]) & Causal()
    inputs = make(generator)
    exact, same = (run(inputs, mask, d, "reference") for d in (torch.float64, torch.float32))
    for name, value in run(inputs, mask, torch.float32, backend_of(way)).items():
        assert_within_budget(value, exact[name], same[name], what=name)


TERMS = {
    "alibi": lambda r: [("bias", ALiBi, r(H).abs())],
    "relative": lambda r: [("bias", Relative, r(H, 63))],
    "relative shared": lambda r: [("bias", Relative, r(1, 301))],
    "pair": lambda r: [("bias", Pair, r(B, 1, NQ, NK))],
    "pair of keys": lambda r: [("bias", Pair, r(1, H, 1, NK))],
    "per key": lambda r: [("bias", PerKey, r(B, H, NK))],
    "per block": lambda r: [("bias", lambda t: PerBlock(t, (32, 16)), r(B, H, 3, 9))],
    "sum": lambda r: [("bias", ALiBi, r(H).abs()), ("bias", PerKey, r(1, 1, NK))],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("way", ["passes", "triton"])
def test_biases_and_their_gradients(terms, dtype, way, generator):
    extra = terms(lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64))
    check(make(generator), Causal(), dtype, extra, way=way)


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_biases_read_positions_not_storage(backend, generator):
    q, k, v, *_ = (t.float() for t in make(generator, nq=NK))
    order = torch.randperm(NK, generator=generator).to(PLACE)
    slopes = torch.rand(H, generator=generator).to(PLACE)
    options = {"bias": ALiBi(slopes), "backend": backend}
    plain = tiled(q, k, v, Causal(), **options)
    moved = tiled(q[:, :, order], k[:, :, order], v[:, :, order], Causal(), positions=(order, order), **options)
    torch.testing.assert_close(moved, plain[:, :, order])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"dropout_p": 0.3, "seed": 5},
        {"skip_threshold": 0.2, "tile": (16, 16)},
        {"scale": -0.5},
    ],
    ids=str,
)
def test_what_changes_the_scores(options, dtype, way, generator):
    check(make(generator), Window(40), dtype, way=way, **options)


def test_a_scale_of_zero_is_a_plain_mean(way, generator):
    q, k, v, *_ = (t.float() for t in make(generator))
    out, lse = tiled(q, k, v, Window(1000), scale=0.0, return_lse=True, backend=backend_of(way))
    torch.testing.assert_close(out, v.mean(2, keepdim=True).repeat_interleave(3, 1).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(NK)))


@pytest.mark.parametrize("way", ["passes", "triton"])
@pytest.mark.parametrize("weight", sorted(WEIGHTS))
def test_every_weight(weight, way, generator):
    if weight == "cone" and way == "triton":
        q, k, v, *_ = (t.float() for t in make(generator))
        with pytest.raises(UnsupportedError, match="no kernel has the weight 'cone'"):
            tiled(q, k, v, Causal(), weight=weight, backend="triton")
        return
    check(make(generator), Causal(), torch.float32, weight=weight, lse=WEIGHTS[weight].normalised, way=way)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_small_chunks_agree_with_one(dtype, generator, monkeypatch):
    monkeypatch.setattr(products, "fused_wins", lambda dtype: False)
    monkeypatch.setattr(passes, "_CHUNK", 2000)
    check(make(generator), Causal(), dtype, tile=(16, 16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_tall_shared_pieces_agree_with_one_call_a_row(mask, dtype, generator, monkeypatch):
    monkeypatch.setattr(products, "fused_wins", lambda dtype: True)
    for name in ("_TALL", "_SHARED", "_SPLIT"):
        monkeypatch.setattr(pieces, name, 32 if name == "_TALL" else 16)
    check(make(generator), mask, dtype, tile=(8, 16))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_pieces_hold_every_visible_pair_once(mask, monkeypatch):
    for name in ("_TALL", "_SHARED", "_SPLIT"):
        monkeypatch.setattr(pieces, name, 32 if name == "_TALL" else 16)
    layout = mask.tiles(NQ, NK, tile=(8, 16), batch=B, heads=H)
    plan = plan_of(layout)
    seen = torch.zeros(len(plan.rows), NQ, NK, dtype=torch.int64)
    for row_set in range(len(plan.rows)):
        started: set[int] = set()
        for piece in pieces.pieces_of(plan, row_set):
            assert piece.first == (piece.q0 not in started)
            started.update(range(piece.q0, piece.q1))
            additive = plan.pattern(piece.segments, piece.q1 - piece.q0, torch.float32)[0]
            at = 0
            for k0, k1, _ in piece.segments:
                seen[row_set, piece.q0 : piece.q1, k0:k1] += additive[:, at : at + k1 - k0] == 0
                at += k1 - k0
    assert torch.equal(seen[layout.index.long()], layout.dense().long())


@pytest.mark.parametrize("way", ["fused", "passes"], indirect=True)
def test_gradcheck_in_float64(way):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(1, 2, n, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (5, 7, 7)
    )
    slopes = torch.rand(2, generator=generator, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda q, k, v: tuple(tiled(q, k, v, Causal(), return_lse=True)), (q, k, v))
    torch.autograd.gradcheck(
        lambda q, k, v, s: tiled(q, k, v, Window(4), bias=ALiBi(s), softcap=2.0, dropout_p=0.3, seed=1),
        (q, k, v, slopes),
    )


def test_the_definition_matches_torch_on_a_dense_call(generator):
    q, k, v, *_ = make(generator)
    k6, v6 = (t.repeat_interleave(3, 1) for t in (k, v))
    allowed = Causal().dense(NQ, NK)[0, 0]
    want = torch.nn.functional.scaled_dot_product_attention(q, k6, v6, attn_mask=allowed)
    got = tiled(q, k, v, Causal(), backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_padded_keys_may_hold_nan(way, generator):
    q, k, v, *_ = (t.float() for t in make(generator))
    real = (torch.rand(B, NK, generator=generator) > 0.4).to(PLACE)
    options = {"key_padding": real, "backend": backend_of(way)}
    want = tiled(q, k, v, Causal() & Window(60), **options)
    poisoned = [t.masked_fill(~real[:, None, :, None], math.nan).requires_grad_() for t in (k, v)]
    got = tiled(q, *poisoned, Causal() & Window(60), **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    got.sum().backward()
    assert all(t.grad.isfinite().all() for t in poisoned)


def test_views_give_the_same_bits(way, generator):
    q, k, v, *_ = (t.float() for t in make(generator))
    odd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert not odd[0].is_contiguous()
    got, want = (tiled(*some, Window(20), backend=backend_of(way)) for some in (odd, (q, k, v)))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_two_runs_give_the_same_bits(way, generator):
    first, second = (run(make_again(generator), Causal(), torch.bfloat16, backend_of(way)) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_layouts_are_taken_as_they_are(way, generator):
    q, k, v, *_ = (t.float() for t in make(generator))
    mask = Causal() & Window(31)
    layout = mask.tiles(NQ, NK, tile=(32, 16), batch=B, heads=H)
    want = tiled(q, k, v, mask)
    torch.testing.assert_close(tiled(q, k, v, layout, backend=backend_of(way)), want)
    single = mask.tiles(NQ, NK, tile=(1, 16), batch=B, heads=H)
    torch.testing.assert_close(tiled(q, k, v, single, backend=backend_of(way)), want)


def test_dropout_keeps_the_expected_share_and_depends_on_positions_only():
    b, h = torch.arange(2), torch.arange(3)
    pos = torch.arange(400)[None]
    whole = keep(7, b, h, pos, pos, 0.25)
    assert abs(float(whole.float().mean()) - 0.75) < 0.005
    assert torch.equal(keep(7, b, h, pos[:, 100:150], pos[:, 30:], 0.25), whole[:, :, 100:150, 30:])
    assert torch.equal(keep(7, b[1:], h[2:], pos, pos, 0.25), whole[1:, 2:])
    assert not torch.equal(whole[0, 0], whole[0, 1])
    assert not torch.equal(keep(8, b, h, pos, pos, 0.25), whole)


def test_dropout_is_right_on_average(generator):
    q, k, v, *_ = (t.float() for t in make(generator))
    mean = sum(tiled(q, k, v, Causal(), dropout_p=0.2, seed=s) for s in range(400)) / 400
    assert (mean - tiled(q, k, v, Causal())).abs().mean() < 0.03


@pytest.mark.parametrize("backend", ["blocked", "triton"])
def test_skipping_follows_the_rule(backend):
    q = torch.ones(1, 1, 4, 1, device=PLACE)
    k = torch.zeros(1, 1, 64, 1, device=PLACE)
    k[0, 0, 0] = 30.0
    v = torch.arange(64.0, device=PLACE).view(1, 1, 64, 1)
    options = {"scale": 1.0, "skip_threshold": 1e-3, "tile": (4, 16), "return_lse": True, "backend": backend}
    _, forward = tiled(q, k, v, Full(), **options)
    _, reverse = tiled(q, k.flip(2), v.flip(2), Full(), **options)
    torch.testing.assert_close(forward, torch.full_like(forward, math.log(math.exp(30) + 15)))
    torch.testing.assert_close(reverse, torch.full_like(reverse, math.log(math.exp(30) + 63)))


def test_a_reduced_precision_flag_never_leaks(generator, monkeypatch):
    q, k, v, *_ = (t.to(torch.bfloat16) for t in make(generator))
    before = torch.get_float32_matmul_precision()
    for backend in ("blocked", "reference"):
        tiled(q, k, v, Causal(), softcap=5.0, backend=backend)
    assert torch.get_float32_matmul_precision() == before
    seen = []
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread()])
    with products.reduced_precision() as granted:
        other = threading.Thread(target=lambda: seen.append(products.reduced_precision().__enter__()))
        other.start()
        other.join()
    assert seen == [False]
    assert torch.get_float32_matmul_precision() == before
    assert granted


def test_the_operator_passes_torchs_own_checks(generator):
    from manyheads.engine.tiled.op import op

    q, k, v = (torch.randn(1, 2, 40, 8, generator=generator).requires_grad_() for _ in range(3))
    mask = Causal() & Document([10, 30])
    slopes, sink = (torch.rand(2, generator=generator).requires_grad_() for _ in range(2))
    args = (
        q,
        k,
        v,
        mask.text,
        list(mask.data),
        None,
        None,
        None,
        "alibi",
        [slopes],
        sink,
        0.3,
        0.0,
        0.0,
        None,
        0.0,
        "softmax",
        "auto exact",
        [64, 64],
        [0, 0],
        False,
        "blocked",
    )
    torch.library.opcheck(op, args)
    with torch.no_grad():
        half = [t.detach().bfloat16() for t in (q, k, v)]
        torch.library.opcheck(op, (*half, *args[3:19], [2, 5], True, "blocked"))


def test_a_new_length_compiles_nothing():
    import manyheads as mh

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, m: mh.attention(q, k, v, mask=m), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for n in (40, 56, 72):
        mask = Causal() & Document([10, n - 10])
        q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v, mask), mh.attention(q, k, v, mask=mask))
        compiled(q, k, v, mask).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        q, k, v = (torch.randn(1, 2, 90, 8, requires_grad=True) for _ in range(3))
        compiled(q, k, v, Causal() & Document([30, 60]))


def test_inductor_compiles_the_engine_once():
    import manyheads as mh

    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    compiled = torch.compile(
        lambda q, k, v: mh.attention(q * 2, k, v, mask="causal & window(9)") + 1, fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k, v), mh.attention(q * 2, k, v, mask="causal & window(9)") + 1)


def test_autocast_reaches_the_engine():
    q = torch.randn(1, 2, 32, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = tiled(q, q, q, Window(5), return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32


def test_checkpointing_recomputes_the_same(generator):
    q, k, v, g, _ = (t.float() for t in make(generator))
    q, k, v = (t.requires_grad_() for t in (q, k, v))

    def f(q, k, v):
        return tiled(q, k, v, Causal(), dropout_p=0.4, seed=9)

    plain = torch.autograd.grad((f(q, k, v) * g).sum(), (q, k, v))
    again = torch.autograd.grad(
        (torch.utils.checkpoint.checkpoint(f, q, k, v, use_reentrant=False) * g).sum(), (q, k, v)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_what_is_not_supported_is_refused():
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    with pytest.raises(UnsupportedError, match="gradients of gradients"):
        (grad,) = torch.autograd.grad(tiled(q, q, q, Window(2)).sum(), q, create_graph=True)
        grad.sum().backward()
    with pytest.raises(UnsupportedError, match="vmap"):
        torch.vmap(lambda t: tiled(t, t, t, Window(2)))(torch.randn(2, 1, 1, 4, 8))
    with pytest.raises(UnsupportedError, match="no lse"):
        tiled(q, q, q, Full(), weight="sigmoid", return_lse=True)
    with pytest.raises(UnsupportedError, match="sink"):
        tiled(q, q, q, Full(), weight="relu", sink=torch.zeros(1))


def test_memory_is_linear_in_length():
    n = 20_000
    q = torch.zeros(1, 1, n, 8)
    out = tiled(q, q, q, Causal() & Window(64))
    assert out.shape == q.shape  # a mask of all pairs would take 400 million entries
