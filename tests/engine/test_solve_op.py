"""The tiled part of the solve engine: values, gradients, registration, memory, and what it refuses."""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from manyheads import Causal, Document, Window
from manyheads.common.errors import UnsupportedError
from manyheads.engine.solve import ConvergenceError, Solver, local_linear, probe, refuse
from manyheads.engine.solve.op import ops
from manyheads.testing import nan_poisoned, sample_qkv

WIDE = torch.float64


def inputs(n=21, heads=4, kv=2, d=5, dv=3, batch=2, dtype=WIDE, grad=True, keys=None, seed=0):
    """Queries, keys, values, probes and ridges."""
    q, k, v = sample_qkv(batch, heads, n, kv_heads=kv, keys=keys, width=d, value_width=dv, dtype=dtype, seed=seed)
    r = sample_qkv(batch, heads, n, width=d, dtype=dtype, seed=seed + 1)[0]
    ridge = torch.linspace(0.2, 0.9, heads, dtype=torch.promote_types(dtype, torch.float32))
    return [t.requires_grad_(grad) for t in (q, k, v, r, ridge)]


def call(name, q, k, v, r, ridge, mask, **options):
    """One of the two words of the engine."""
    if name == "probe":
        options.pop("solver", None)
        return probe(q, r, k, v, mask, return_lse=True, **options)
    return local_linear(q, k, v, mask, ridge=ridge, return_lse=True, **options)


def results(name, given, mask, **options):
    """Output, lse and the gradients of both."""
    out, lse = call(name, *given, mask, **options)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(t.shape, generator=generator, dtype=WIDE) for t in (out, lse)]
    loss = sum((t.masked_fill(t.isinf(), 0.0) * w).sum() for t, w in zip((out, lse), weights, strict=True))
    leaves = given[:4] if name == "probe" else [*given[:3], given[4]]
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def agree(got, want, tolerance=1e-10):
    """Equal, part by part."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


MASKS = {
    "full": "full",
    "causal": "causal",
    "window": "causal & window(5)",
    "empty rows": "causal & ~window(4)",
    "sink": "causal & (window(3) | sink(2))",
    "documents": Document([8, 0, 13]) & Causal(),
}
WAYS = {"probe": ("probe", "auto"), "direct": ("local_linear", "direct"), "cg": ("local_linear", "cg")}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_tiles_agree_with_the_definition(way, mask):
    name, method = way
    given, solver = inputs(), Solver(method, tol=1e-13, steps=200) if method == "cg" else Solver(method)
    want = results(name, given, mask, backend="reference")
    for tile in (None, (16, 8)):
        got = results(name, given, mask, solver=solver, tile=tile)
        agree(got, want)
        with torch.no_grad():
            agree(call(name, *given, mask, solver=solver, tile=tile), want[:2])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_portions_of_keys_are_merged_exactly(way, monkeypatch):
    from manyheads.engine.solve import blocked, normal

    given = inputs(n=70)
    want = results(way[0], given, "causal", solver=way[1])
    monkeypatch.setattr(blocked, "_WHOLE", 0)
    monkeypatch.setattr(blocked, "_CHUNK", 64)
    monkeypatch.setattr(normal, "_KEPT", 0)
    monkeypatch.setattr(normal, "_FEATURES", 100)
    monkeypatch.setattr(normal, "_MOMENTS", 200)
    got = results(way[0], given, "causal", solver=way[1], tile=(16, 8))
    agree(got, want, 1e-8 if way[1] == "cg" else 1e-10)
    with torch.no_grad():
        agree(call(way[0], *given, "causal", solver=way[1], tile=(16, 8)), want[:2], 1e-8)


def test_positions_and_padding_mean_what_they_mean_elsewhere():
    given = inputs(n=12, keys=30)
    generator = torch.Generator().manual_seed(2)
    positions = torch.randperm(30, generator=generator)[:12], torch.randperm(30, generator=generator)
    real = torch.rand(2, 30, generator=generator) < 0.7
    options = {"positions": positions, "key_padding": real}
    hidden = ~real[:, None, :, None]
    with torch.no_grad():
        given[1].masked_fill_(hidden, float("nan"))
        given[2].masked_fill_(hidden, float("inf"))
    for name in ("probe", "local_linear"):
        want = results(name, given, "causal & window(11)", backend="reference", **options)
        agree(results(name, given, "causal & window(11)", **options), want)
        assert all(t.nan_to_num(neginf=0.0).isfinite().all() for t in want)


@pytest.mark.parametrize("name", ["probe", "local_linear"])
def test_half_precision_keeps_statistics_in_float32(name):
    for dtype in (torch.bfloat16, torch.float16):
        given = inputs(dtype=dtype)
        out, lse = call(name, *given, "causal")
        assert out.dtype == dtype and lse.dtype == torch.float32
        exact = [t.detach().double() for t in given]
        torch.testing.assert_close(out.double(), call(name, *exact, "causal").out, rtol=0.05, atol=0.05)
        grads = torch.autograd.grad(out.float().sum() + lse.sum(), given[:3])
        assert all(g.dtype == dtype for g in grads)


# --- registration -------------------------------------------------------------------------------------------------


def arguments(name, backend="blocked", keep=0, grad=True, mask="causal"):
    """The arguments of an operator."""
    q, k, v, r, ridge = inputs(n=9, grad=grad)
    more = r if name == "probe" else ridge
    return q, k, v, more, mask, [], None, None, None, 0.4, Solver().text, [0, 0], backend, keep


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("name", ["probe", "local_linear"])
def test_the_operators_keep_to_their_schema(name, backend):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for keep in (0, 1, 2):
        torch.library.opcheck(ops[name], arguments(name, backend, keep), test_utils=checks)
    torch.library.opcheck(ops[name], arguments(name, backend), test_utils="test_aot_dispatch_static")
    detached = arguments(name, backend, 2, grad=False)
    saved = ops[name](*detached)
    back = getattr(torch.ops.manyheads, f"{name}_backward").default
    given = (torch.ones_like(saved[0]), None, *saved, *detached[:-1])
    torch.library.opcheck(back, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_gradients_match_finite_differences(way):
    name, method = way
    q, k, v, r, ridge = inputs(n=9, d=3, heads=2, kv=1, batch=1)
    more = r if name == "probe" else ridge
    solver = Solver(method, tol=1e-13, steps=100) if method == "cg" else Solver(method)

    def run(q, k, v, more):
        return tuple(call(name, q, k, v, more, more, "causal", solver=solver))

    assert torch.autograd.gradcheck(run, (q, k, v, more))


@pytest.mark.parametrize("name", ["probe", "local_linear"])
def test_one_graph_serves_every_length_of_documents(name):
    torch._dynamo.reset()
    given = inputs(n=24, batch=1)
    graphs = []

    def counting(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(functools.partial(call, name), fullgraph=True, backend=counting)
    for lengths in ([24], [10, 14]):
        mask = Document(lengths) & Causal()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agree(compiled(*given, mask), call(name, *given, mask))
    assert len(graphs) <= 2


def test_autocast_computes_in_its_dtype():
    q, k, v, r, ridge = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outs = [probe(q, r, k, v, "causal"), local_linear(q, k, v, "causal", ridge=ridge)]
    assert all(out.dtype == torch.bfloat16 for out in outs)
    torch.testing.assert_close(outs[0].float(), probe(q, r, k, v, "causal"), rtol=0.1, atol=0.1)
    grads = torch.autograd.grad(sum(out.float().sum() for out in outs), (q, k, v, r, ridge))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_checkpointing_recomputes_the_same():
    for name in ("probe", "local_linear"):
        given = inputs()

        def run(*given, name=name):
            return call(name, *given, "causal").out.square()

        leaves = given[:4] if name == "probe" else [*given[:3], given[4]]
        plain = torch.autograd.grad(run(*given).sum(), leaves)
        again = torch.autograd.grad(checkpoint(run, *given, use_reentrant=False).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["probe", "local_linear"])
def test_nothing_is_read_before_it_is_written_and_no_input_is_written_to(name):
    given = inputs(n=75, grad=False)
    before = [t.clone() for t in given]
    with nan_poisoned():
        got = call(name, *given, "causal")
    agree(got, call(name, *given, "causal", backend="reference"))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


def test_sequences_without_tokens_pass():
    for shape in ((1, 0, 0), (1, 0, 5), (2, 5, 0)):
        batch, n, keys = shape
        q, r = (torch.randn(batch, 2, n, 3, requires_grad=True) for _ in range(2))
        k, v = (torch.randn(batch, 1, keys, 3, requires_grad=True) for _ in range(2))
        for out in (probe(q, r, k, v, "full"), local_linear(q, k, v, "full", ridge=0.1)):
            assert out.shape == q.shape and (out == 0).all()
            out.sum().backward()


def test_memory_is_linear_in_the_tokens():
    code = """
import resource, sys, torch
torch.set_num_threads(1)
from manyheads.engine.solve import Solver, local_linear, probe
def peak(n, train, what):
    q, k, v, r = (torch.randn(1, 1, n, 16, requires_grad=train) for _ in range(4))
    if what == "probe":
        out = probe(q, r, k, v, "causal & window(256)")
    else:
        out = local_linear(q, k, v, "causal & window(256)", ridge=0.5, solver=Solver(what, tol=1e-2))
    if train:
        out.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
what = sys.argv[1]
peak(512, True, what)
small = peak(2048, True, what)
large = peak(8192, True, what)
print(large - small)
"""
    for what in ("probe", "direct", "cg"):
        run = subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, check=True)
        # one matrix of pairs of the longer sequence is 256 MiB; its tokens with gradients and statistics some 10 MiB
        assert int(run.stdout) < 64 << 20, what


# --- refusals -----------------------------------------------------------------------------------------------------


def test_few_keys_without_a_ridge_are_an_error_that_says_so():
    q, k, v, *_ = inputs(n=12, d=5, grad=False)
    assert local_linear(q, k, v, "full", ridge=0.0).isfinite().all()
    for options in ({}, {"solver": "direct"}, {"backend": "reference"}):
        with pytest.raises(ValueError, match="ridge: 0 leaves the systems of .* queries singular"):
            local_linear(q, k, v, "causal", ridge=0.0, **options)
    flat = k.clone()
    flat[..., 0] = 1.0
    with pytest.raises(ValueError, match="expected a positive ridge"):
        local_linear(q, flat, v, "full", ridge=torch.tensor([0.1, 0.1, 0.0, 0.1], dtype=WIDE))


def test_conjugate_gradients_without_a_ridge_notice_a_singular_system():
    q, k, v, *_ = inputs(n=12, d=5, grad=False)
    with pytest.raises(ValueError, match="ridge: 0 leaves"):
        local_linear(q, k, v, "causal", ridge=0.0, solver="cg")


def test_too_few_steps_warn_or_raise_as_asked():
    q, k, v, *_ = inputs(n=40, d=8, grad=False)
    with pytest.warns(RuntimeWarning, match="local_linear: .* systems did not converge"):
        local_linear(q, k, v, "full", ridge=1e-3, solver=Solver("cg", steps=1))
    with pytest.raises(ConvergenceError, match="larger ridge"):
        local_linear(q, k, v, "full", ridge=1e-3, solver=Solver("cg", steps=1, unconverged="raise"))


WRONG = {
    "ridge below 0": ({"ridge": -0.1}, ValueError, "ridge: expected a finite number of at least 0"),
    "ridge of text": ({"ridge": "0.1"}, TypeError, "ridge: expected a number or a tensor"),
    "ridge per key head": ({"ridge": torch.ones(2)}, ValueError, r"ridge: expected a number or shape \(Hq=4,\)"),
    "ridges below 0": ({"ridge": -torch.ones(4)}, ValueError, "ridge: expected finite numbers of at least 0"),
    "ridge of integers": ({"ridge": torch.ones(4).int()}, TypeError, "ridge: expected a floating tensor"),
    "solver": ({"solver": "directly"}, ValueError, "did you mean 'direct'"),
    "backend": ({"backend": "block"}, ValueError, "did you mean 'blocked'"),
    "mask": ({"mask": "casual"}, ValueError, "did you mean 'causal'"),
    "scale": ({"scale": float("inf")}, ValueError, "scale: expected a finite number"),
    "padding": ({"key_padding": torch.ones(2, 5)}, TypeError, "key_padding: expected a bool tensor"),
}


@pytest.mark.parametrize(("options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(options, error, message):
    q, k, v, *_ = inputs(grad=False)
    given = {"mask": "causal", "ridge": 0.1} | options
    with pytest.raises(error, match=message):
        local_linear(q, k, v, given.pop("mask"), **given)


def test_probes_that_do_not_fit_are_refused():
    q, k, v, r, _ = inputs(grad=False)
    with pytest.raises(ValueError, match="r: expected the shape of q"):
        probe(q, r[:, :2], k, v, "causal")
    with pytest.raises(TypeError, match="r: expected torch.float64"):
        probe(q, r.float(), k, v, "causal")
    with pytest.raises(TypeError, match="r: expected a tensor"):
        probe(q, 0.5, k, v, "causal")


def test_what_is_not_supported_refuses():
    q, k, v, r, ridge = inputs(n=4)
    with pytest.raises(UnsupportedError, match="probe: gradients of gradients"):
        (grad,) = torch.autograd.grad(probe(q, r, k, v, "full").sum(), q, create_graph=True)
        grad.sum().backward()
    with pytest.raises(UnsupportedError, match="local_linear: torch.vmap"):
        torch.vmap(lambda q: local_linear(q, k, v, "full", ridge=0.1))(torch.stack([q, q]).detach())
    from torch.distributed.tensor import DTensor

    sharded = torch.Tensor._make_wrapper_subclass(DTensor, (1, 1, 4, 8))
    with pytest.raises(UnsupportedError, match="DTensors"):
        local_linear(sharded, sharded, sharded, "full", ridge=0.1)


def test_a_backend_says_why_it_cannot_run():
    assert refuse("blocked", "cpu") == [] and refuse("reference", "meta")
    with pytest.raises(ValueError, match="unknown backend of solve"):
        refuse("triton", "cuda")


def test_two_runs_give_the_same_bits():
    given = inputs(n=50, dtype=torch.float32, grad=False)
    for name in ("probe", "local_linear"):
        first, second = (call(name, *given, Causal() & Window(7)) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
