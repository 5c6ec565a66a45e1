"""The kernels of the tiled engine on layouts, shapes, strides and options that test_tiled does not reach."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads import ALiBi, Causal, Dense, Document, Full, Pair, PerBlock, PerHead, PerKey, Relative, Window
from manyheads.common.errors import UnsupportedError
from manyheads.engine import gpu
from manyheads.engine import tiled as engine
from manyheads.engine.tiled import launch, tiled
from manyheads.mask.layout import TileLayout
from manyheads.testing import assert_within_budget, nan_poisoned
from tests.engine.kernel_calls import Inputs, agree, draw, outcome, tiles

pytest.importorskip("triton")
FULL, HALF = torch.float32, torch.float16


@pytest.fixture
def generator():
    """The same draw every day: a budget is a bound on typical rounding, and rounding has unlucky days."""
    return torch.Generator().manual_seed(0)


def ids_of(generator, nq, nk, tile, batch=1, heads=1, mask=None):
    """Layouts from ids in any order, ragged, one row without any."""
    tq, tk = -(-nq // tile[0]), -(-nk // tile[1])
    ids = torch.rand(batch, heads, tq, tk, generator=generator).argsort(-1)
    keep = torch.rand(ids.shape, generator=generator) < 0.7
    keep[..., tq // 2, :] = False
    return TileLayout.from_ids(ids.masked_fill(~keep, -1), nq=nq, nk=nk, tile=tile, mask=mask)


# --- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "heads", "mask", "tile"),
    [
        (1, 1, None, (16, 16)),
        (1, 4, None, (16, 32)),
        (1, 4, Causal(), (16, 16)),
        (2, 1, Causal() & Window(30), (32, 16)),
        (1, 1, Causal(), (1, 16)),
        (1, 1, Window(20), (64, 64)),
    ],
    ids=["ragged", "per head", "with bitmaps", "per batch entry", "of one query", "of large tiles"],
)
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_padded_ids(batch, heads, mask, tile, dtype, device, generator):
    nq = 5 if tile[0] == 1 else 41
    layout = ids_of(generator, nq, 53, tile, batch, heads, mask)
    layout = layout.to(device) if device != "cpu" else layout
    inputs = draw(generator, nq, 53, heads=4, kv_heads=2, batch=batch)
    with tiles(32, 32, device):
        agree(inputs, layout, dtype, device)


def test_ids_are_inverted_on_the_device_as_on_the_host(device, generator, monkeypatch):
    layout = ids_of(generator, 41, 53, (16, 16), heads=2, mask=Causal())
    inputs = draw(generator, 41, 53)
    want = outcome(inputs, layout, FULL, "triton", device)
    monkeypatch.setattr(launch, "by_keys", lambda layout, place: launch_inverted(layout, place))
    got = outcome(inputs, replace(layout), FULL, "triton", device)
    assert all(torch.equal(got[name], want[name]) for name in got)


def launch_inverted(layout, place):
    """What a layout on a GPU is read through."""
    from manyheads.engine.tiled.rows import _inverted

    return _inverted(layout, place)


@pytest.mark.parametrize("group", [1, 2, 3, 7])
@pytest.mark.parametrize("tile", [(1, 16), (4, 32)], ids=str)
def test_small_query_tiles_take_the_heads_of_a_group_as_rows(tile, group, device, generator):
    inputs = draw(generator, 6, 40, heads=group * (2 if group < 3 else 1), kv_heads=2 if group < 3 else 1)
    layout = (Causal() & Window(25)).tiles(6, 40, tile=tile, heads=inputs.q.shape[1])
    assert launch.packs(layout, group) == group
    agree(inputs, layout, FULL if tile[0] == 1 else HALF, device)


def test_heads_of_a_group_may_differ_at_small_query_tiles(device, generator):
    inputs = draw(generator, 5, 40, heads=4, kv_heads=2)
    layout = PerHead([Causal(), Window(9), Full(), Full()]).tiles(5, 40, tile=(1, 16), heads=4)
    agree(inputs, layout, FULL, device)


@pytest.mark.parametrize("tile", [(48, 80), (20, 24), (7, 130), (16, 8)], ids=str)
def test_tiles_of_any_size_are_taken(tile, device, generator):
    inputs = draw(generator, 50, 90)
    layout = (Causal() & Window(33)).tiles(50, 90, tile=tile, heads=2)
    with tiles(32, 32, device):
        agree(inputs, layout, FULL, device)


@pytest.mark.parametrize(("batch", "heads"), [(1, 3), (2, 1), (2, 2)])
def test_a_layout_for_other_heads_or_batch_entries_is_refused(batch, heads, device, generator):
    layout = ids_of(generator, 40, 40, (16, 16), batch, heads)
    q = torch.ones(1, 2, 40, 8, device=device)
    with pytest.raises(ValueError, match=rf"mask: a layout for {max(batch, heads)} .* does not fit"):
        tiled(q, q, q, layout, backend="triton")


# --- shapes and strides -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("d", "dv"), [(1, 1), (5, 5), (72, 72), (80, 40), (129, 129), (256, 256), (16, 200), (256, 3)], ids=str
)
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_widths(d, dv, dtype, device, generator):
    with tiles(16, 16, device):
        agree(draw(generator, 17, 20, d=d, dv=dv), Causal(), dtype, device)


@pytest.mark.parametrize(
    ("nq", "nk"), [(1, 1), (1, 70), (33, 1), (70, 33), (17, 50), (16, 16), (2, 129)], ids=str
)
@pytest.mark.parametrize("mask", [Full(), Causal()], ids=str)
def test_lengths_that_fill_no_tile(nq, nk, mask, device, generator):
    # of a single key only the gradient of lse is left, the rest is the rounding of a difference of equal sums
    coarse = torch.bfloat16 if nk == 1 else None
    agree(draw(generator, nq, nk, heads=3, kv_heads=3), mask, FULL, device, coarse)


SIZE = st.integers(1, 66)


@settings(max_examples=6)
@given(
    nq=SIZE, nk=SIZE, kv=st.integers(1, 2), group=st.integers(1, 3), d=st.integers(1, 40), dv=st.integers(1, 40),
    window=st.integers(1, 90), tile=st.sampled_from([None, (1, 16), (16, 32), (24, 40)]), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([FULL, HALF]), bias=st.booleans(),
)  # fmt: skip
def test_any_shape(nq, nk, kv, group, d, dv, window, tile, seed, dtype, bias):
    generator = torch.Generator().manual_seed(seed)
    inputs = draw(generator, nq, nk, kv * group, kv, d, dv)
    mask = Causal() & Window(window)
    mask = mask if tile is None or tile[0] == 1 and nq > 8 else mask.tiles(nq, nk, tile=tile, heads=kv * group)
    leaves = {"pair": torch.randn(1, kv * group, nq, nk, generator=generator, dtype=torch.float64)} if bias else {}

    def build(pair=None):
        return {} if pair is None else {"bias": Pair(pair)}

    with tiles(32, 32):
        # the budget of bfloat16: random shapes should find wrong addresses, not unlucky rounding
        agree(inputs, mask, dtype, coarse=torch.bfloat16, leaves=leaves, build=build)


def strided(t, how):
    """The same values under other strides."""
    if how == "tokens first":
        return t.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    if how == "heads inside tokens":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "every other channel":
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    return torch.nn.functional.pad(t, (3, 5))[..., 3 : 3 + t.shape[3]]


@pytest.mark.parametrize("how", ["tokens first", "heads inside tokens", "every other channel", "inside wider rows"])
def test_strides_do_not_matter(how, device, generator):
    inputs = draw(generator, 33, 40, heads=2, kv_heads=2, batch=2)

    def grads(change):
        q, k, v, g = (change(t.float().to(device)) for t in inputs[:4])
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = tiled(*leaves, Causal(), backend="triton")
        return [out, *torch.autograd.grad(out, leaves, g)]

    odd = strided(inputs.q.float(), how)
    assert not odd.is_contiguous() and torch.equal(odd, inputs.q.float())
    with tiles(32, 32, device):
        for got, want in zip(grads(lambda t: strided(t, how)), grads(lambda t: t.contiguous()), strict=True):
            assert torch.equal(got, want)


def test_expanded_inputs_are_read_in_place(device, generator):
    q = torch.randn(1, 1, 33, 16, generator=generator).to(device).expand(2, 2, -1, -1)
    k, v = (torch.randn(1, 1, 1, 16, generator=generator).to(device).expand(2, 2, 40, -1) for _ in range(2))
    assert k.stride()[:3] == (0, 0, 0)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = tiled(*leaves, Causal(), backend="triton")
    want = tiled(*(t.detach().contiguous() for t in leaves), Causal(), backend="triton")
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert [g.shape for g in grads] == [t.shape for t in leaves]


def test_tokens_too_far_apart_for_a_tile_are_brought_together(generator):
    near = torch.randn(1, 1, 2, 4, generator=generator, dtype=torch.float16)
    far = torch.zeros(gpu.FAR + 4, dtype=torch.float16).as_strided(near.shape, (0, 0, gpu.FAR, 1))
    far.copy_(near)
    assert gpu.readable(near) is near
    assert gpu.readable(far).stride(2) == 4 and torch.equal(gpu.readable(far), near)


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_persistent_programs_change_nothing(programs, dtype, device, generator):
    q, k, v = (t.to(device, dtype) for t in draw(generator, 90, 90, heads=4, kv_heads=2)[:3])
    found = []
    for persistent in (0, programs):
        with tiles(32, 32, device, persistent=persistent), nan_poisoned():
            found.append(tiled(q, k, v, Causal(), return_lse=True, backend="triton"))
    assert torch.equal(found[0].out, found[1].out)
    assert torch.equal(found[0].lse, found[1].lse)
    assert found[0].out.isfinite().all()


def normal(generator, *shape):
    """Standard normal, float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


TERMS = {
    "alibi": (lambda t: ALiBi(t), (2,)),
    "relative": (lambda t: Relative(t), (2, 21)),
    "shared relative": (lambda t: Relative(t), (1, 1)),
    "pair": (lambda t: Pair(t), (1, 2, 37, 53)),
    "pair of keys": (lambda t: Pair(t), (1, 1, 1, 53)),
    "per key": (lambda t: PerKey(t), (1, 2, 53)),
    "per block": (lambda t: PerBlock(t, (16, 24)), (1, 2, 3, 3)),
}


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_a_bias_together_with_everything_else(name, dtype, device, generator, monkeypatch):
    make, shape = TERMS[name]
    monkeypatch.setattr(launch, "_STRIP_BYTES", 1)  # a strip for each row of tiles
    leaves = {"term": normal(generator, *shape), "sink": normal(generator, 2)}

    def build(term, sink):
        return {"bias": make(term), "sink": sink}

    with tiles(16, 32, device):
        options = {"softcap": 4.0, "dropout_p": 0.2, "seed": 11, "leaves": leaves, "build": build}
        agree(draw(generator.manual_seed(3)), Causal() & Window(40), dtype, device, **options)


def test_terms_of_one_kind_add_up(device, generator):
    leaves = {f"x{i}": normal(generator, *shape) for i, (_, shape) in enumerate(TERMS.values())}
    leaves |= {f"y{i}": normal(generator, *shape) for i, (_, shape) in enumerate(TERMS.values()) if i not in (1, 2)}
    leaves["z"] = normal(generator, 1, 21)

    def build(z, **rest):
        made = [list(TERMS.values())[int(name[1:])][0](t) for name, t in rest.items() if name != "x2"]
        return {"bias": sum(made[1:], Relative(z) + made[0])}

    kept = {name: t for name, t in leaves.items() if name != "x2"}
    with tiles(32, 32, device):
        agree(draw(generator), Causal(), FULL, device, leaves=kept, build=build, scale=-0.4)


def test_batch_entries_have_their_own_biases_and_positions(device, generator):
    leaves = {"pair": normal(generator, 2, 1, 20, 40), "block": normal(generator, 2, 1, 2, 2)}
    q_pos, k_pos = (torch.randint(0, 50, (2, n), generator=generator).to(device) for n in (20, 40))

    def build(pair, block):
        return {"bias": Pair(pair) + PerBlock(block, (16, 24)) + ALiBi(torch.full((2,), 0.1).to(pair))}

    with tiles(32, 32, device):
        options = {"leaves": leaves, "build": build, "positions": (q_pos, k_pos), "dropout_p": 0.3, "seed": 5}
        agree(draw(generator, 20, 40, batch=2), Causal(), FULL, device, **options)


def test_terms_that_do_not_add_up_are_refused(device):
    q = torch.ones(1, 2, 37, 8, device=device)
    two = Relative(torch.ones(2, 5)) + Relative(torch.ones(1, 7))
    blocks = PerBlock(torch.ones(1, 1, 3, 3), (16, 16)) + PerBlock(torch.ones(1, 1, 2, 2), (32, 32))
    for bias, why in (
        (two, r"different reach \(\[5, 7\]"),
        (blocks, r"different block sizes \[\(16, 16\), \(32, 32\)\]"),
    ):
        with pytest.raises(UnsupportedError, match=f"backend 'triton' cannot take this call.*{why}"):
            tiled(q, q, q, Full(), bias=bias, backend="triton")


def on_gpu(width, value_width=8, dtype=FULL):
    """What the choice of a backend asks of tensors, as if they were on a GPU."""
    return tuple(
        SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype=dtype, shape=(1, 2, 4, w))
        for w in (width, value_width)
    )


def test_auto_takes_the_next_backend_where_the_kernels_refuse():
    two = (Relative(torch.ones(2, 5)), Relative(torch.ones(1, 7)))
    assert engine._backend("auto", *on_gpu(8), (), "softmax", "exact") == "triton"
    assert engine._backend("auto", *on_gpu(8), two, "softmax", "exact") == "blocked"
    assert engine._backend("auto", *on_gpu(257), (), "softmax", "exact") == "blocked"
    assert engine._backend("auto", *on_gpu(8, dtype=torch.float64), (), "softmax", "exact") == "blocked"
    assert engine._backend("auto", *on_gpu(8), (), "softmax", "int8") == "blocked"


@pytest.mark.parametrize(
    ("dtype", "d", "dv", "why"),
    [
        (torch.float64, 8, 8, "float64 has no matrix instruction"),
        (FULL, 257, 8, "got D = 257 and Dv = 8"),
        (FULL, 8, 300, "got D = 8 and Dv = 300"),
    ],
)
def test_what_no_kernel_takes_is_refused_with_the_reason(dtype, d, dv, why, device):
    q, v = (torch.ones(1, 2, 4, n, dtype=dtype, device=device) for n in (d, dv))
    with pytest.raises(UnsupportedError, match=why):
        tiled(q, q, v, Full(), backend="triton")


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"scale": -0.3}, {"scale": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_pairs_of_minus_infinity_are_hidden(options, dtype, device, generator):
    inputs = draw(generator)
    hidden = torch.rand(1, 2, 37, 53, generator=generator) < 0.3
    hidden[:, :, [3, 20]] = True
    hidden[:, 1, 4:7, :50] = True
    bias = normal(generator, 1, 2, 37, 53)

    def build(pair):
        return {"bias": Pair(pair)}

    def masked(pair):
        return {"bias": Pair(pair.masked_fill(hidden.to(device), -math.inf))}

    mask = Dense(~hidden)
    exact, plain = (
        outcome(inputs, mask, d, "reference", device, leaves={"pair": bias}, build=build, **options)
        for d in (torch.float64, dtype)
    )
    with tiles(32, 32, device):
        got = outcome(inputs, Full(), dtype, "triton", device, leaves={"pair": bias}, build=masked, **options)
    for name, value in got.items():
        assert_within_budget(value, exact[name], plain[name], what=name)
    assert not got["out"][:, :, 3].any() and bool((got["lse"][:, :, 3] == -math.inf).all())


@pytest.mark.parametrize("scale", [-0.7, 0.0, 2.0])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_scales_of_any_sign(scale, biased, device, generator):
    leaves = {"pair": normal(generator, 1, 1, 37, 53)} if biased else {}

    def build(pair=None):
        return {} if pair is None else {"bias": Pair(pair)}

    agree(draw(generator), Causal(), FULL, device, leaves=leaves, build=build, scale=scale)


SKIPS = {
    "softmax": ({}, (16, 16)),
    "heads of a pack": ({}, (8, 16)),
    "sigmoid": ({"weight": "sigmoid", "lse": False}, (16, 16)),
    "large sink": ({"sink": torch.full((4,), 9.0)}, (16, 16)),
    "small sink and cap": ({"sink": torch.full((4,), -9.0), "softcap": 5.0}, (16, 16)),
}


@pytest.mark.parametrize("name", SKIPS)
def test_skipping_means_the_same_as_in_the_definition(name, device, generator):
    options, tile = SKIPS[name]
    options = {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    q, k, *rest = draw(generator, 40, 64, heads=4, kv_heads=2)
    peaks = torch.linspace(3, 0.2, 64, dtype=torch.float64)[:, None] * (torch.arange(64)[:, None] % 16 < 12)
    inputs = Inputs(q, k * peaks, *rest)
    inputs.k[:, :, 20:36] *= 3.0
    with tiles(16, 32, device, rescale=8):
        got = agree(inputs, Window(60), FULL, device, tile=tile, skip_threshold=0.6, **options)
        whole = outcome(inputs, Window(60), FULL, "triton", device, **options)
    assert not torch.allclose(got["out"], whole["out"], rtol=1e-2)


def test_skipping_follows_the_keys_whatever_the_order_of_ids(device):
    ids = torch.tensor([3, 0, 2, 1]).expand(1, 1, 2, 4)
    layout = TileLayout.from_ids(ids, nq=32, nk=64, tile=16)
    layout = layout.to(device) if device != "cpu" else layout
    q = torch.ones(1, 1, 32, 16, dtype=torch.float64)
    k = torch.zeros(1, 1, 64, 16, dtype=torch.float64)
    k[:, :, 48:] = 0.75  # seen first, they would hide all others
    inputs = Inputs(q, k, torch.arange(64.0)[None, None, :, None].expand(1, 1, 64, 16).double(), q, q[..., 0])
    with tiles(16, 16, device):
        got = agree(inputs, layout, FULL, device, skip_threshold=0.5)
    assert float(got["out"].max()) < 54.0  # the mean of the last tile is 55.5


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
def test_what_padded_keys_hold_reaches_nothing(dtype, device, generator):
    inputs = draw(generator, 20, 40, batch=2)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[0, 30:], real[1, 7:29] = False, False
    poison = [t.masked_fill(~real[:, None, :, None], math.nan) for t in (inputs.k, inputs.v)]
    one = torch.ones(2, device=device)
    options = {"key_padding": real.to(device), "sink": one, "bias": ALiBi(one)}
    with tiles(32, 32, device), nan_poisoned():
        want = outcome(inputs, Causal(), dtype, "triton", device, **options)
        got = outcome(inputs._replace(k=poison[0], v=poison[1]), Causal(), dtype, "triton", device, **options)
    assert all(torch.equal(got[name], want[name]) and want[name].isfinite().all() for name in got)


def test_nothing_is_read_before_it_is_written(device, generator):
    inputs = draw(generator, 40, 33, heads=4, kv_heads=2)
    leaves = {"pair": normal(generator, 1, 1, 40, 33), "sink": normal(generator, 4)}

    def build(pair, sink):
        return {"bias": Pair(pair), "sink": sink}

    ragged = ids_of(generator, 40, 33, (16, 16), heads=4)
    for mask, dtype in ((Document([0, 20, 20], [13, 20, 0]), FULL), (ragged, HALF)):
        with tiles(32, 32, device), nan_poisoned():
            got = outcome(inputs, mask, dtype, "triton", device, leaves=leaves, build=build)
        assert all(value.isfinite().all() for value in got.values()), mask


# --- what a gradient costs ----------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch):
    """Which passes over rows of queries ran: 0 for queries, 1 for exact sums, 2 for a strip of a bias."""
    found = []
    original = launch._Call.rows_pass

    def spied(self, what, given, some=None):
        found.append(what)
        return original(self, what, given, some)

    monkeypatch.setattr(launch._Call, "rows_pass", spied)
    return found


@pytest.mark.parametrize(("dtype", "more"), [(FULL, []), (HALF, [1])], ids=str)
def test_a_bias_costs_a_pass_only_where_it_needs_gradients(dtype, more, device, generator, passes, monkeypatch):
    inputs = draw(generator)
    monkeypatch.setattr(launch, "_STRIP_BYTES", 4 * 2 * 53 * 32)  # two strips of 32 rows
    fixed, learned = normal(generator, 1, 1, 37, 53), normal(generator, 2)
    with tiles(32, 32, device):
        still = Pair(fixed.to(device, FULL))
        outcome(inputs, Causal(), dtype, "triton", device, bias=still + ALiBi(learned.to(device, FULL)))
        assert passes == [0]
        passes.clear()
        outcome(inputs, Causal(), dtype, "triton", device, bias=still, sink=learned.to(device, FULL))
        assert passes == [*more, 0]
        passes.clear()

        def build(slopes):
            return {"bias": Pair(fixed.to(slopes)) + ALiBi(slopes)}

        agree(inputs, Causal(), dtype, device, leaves={"slopes": learned}, build=build)
        assert passes == [*more, 0, 2, 2]


def test_gradients_of_the_keys_alone_are_those_of_a_whole_call(device, generator):
    q, k, v, g, _ = (t.float().to(device) for t in draw(generator))
    k.requires_grad_()
    (alone,) = torch.autograd.grad(tiled(q, k, v, Causal(), backend="triton"), k, g)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    assert torch.equal(alone, torch.autograd.grad(tiled(*leaves, Causal(), backend="triton"), leaves, g)[1])
