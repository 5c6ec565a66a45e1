"""The scan engine: token by token, all pairs and chunks agree; states carry; nothing passes borders or padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from manyheads import Document
from manyheads.common.errors import UnsupportedError
from manyheads.engine.scan import State, refuse, scan, step
from manyheads.engine.scan import reference as definition
from manyheads.engine.scan.check import packed_state
from manyheads.engine.scan.problem import Problem
from manyheads.testing import assert_within_budget

B, H, HKV, N, D, DV = 2, 4, 2, 37, 6, 3
F64 = torch.float64

KINDS = {
    "plain": {},
    "head": {"decay": "head"},
    "token": {"decay": "token"},
    "channel": {"decay": "channel"},
    "plain sum": {"normalise": "sum"},
    "head sum": {"decay": "head", "normalise": "sum"},
    "token abs": {"decay": "token", "normalise": "abs"},
    "channel sum": {"decay": "channel", "normalise": "sum"},
    "gate": {"gate": True},
    "head gate": {"decay": "head", "gate": True, "normalise": "sum"},
    "mlstm": {"decay": "token", "gate": True, "normalise": "max1"},
    "delta": {"beta": True},
    "head delta": {"decay": "head", "beta": True},
    "gated delta": {"decay": "token", "beta": True},
}


def close(got, want, size=1e-10):
    """Equal up to rounding in float64, relative to the larger of one and the values."""
    torch.testing.assert_close(got, want, rtol=size, atol=size)


def draw(generator, kind, n=N, dtype=F64, *, d=D, state=True, b=B):
    """Inputs, options and a state of one kind, drawn in float64 and rounded once; logs and states stay wide."""
    kind = KINDS[kind]

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64)

    q, k, v = normal(b, H, n, d), normal(b, HKV, n, d), normal(b, HKV, n, DV)
    wide = torch.promote_types(dtype, torch.float32)
    options = {}
    if "decay" in kind:
        shape = {"head": (H,), "token": (b, H, n), "channel": (b, H, n, d)}[kind["decay"]]
        options["decay"] = -normal(*shape).abs().to(wide)
    if "gate" in kind:
        options["gate"] = (2 * normal(b, H, n)).to(wide)
    if "beta" in kind:
        options["beta"] = 2 * torch.rand(b, H, n, generator=generator, dtype=F64).to(wide)
        k = F.normalize(k, dim=-1)
    norm = kind.get("normalise", "")
    sign = -1 if norm == "abs" else 1
    if norm in ("sum", "abs"):  # weights of one sign, so that no divisor is zero by chance
        q, k = q.abs(), sign * k.abs()
    initial = None
    if state:
        keys = sign * normal(b, H, d).abs() if norm else None
        parts = [normal(b, H, d, DV), keys, normal(b, H) if "gate" in kind else None]
        initial = State(*[None if t is None else t.to(wide) for t in parts])
    return tuple(t.to(dtype) for t in (q, k, v)), options, {"normalise": norm or False, "state": initial, "scale": 0.7}


def problem(qkv, options, rest, starts=None):
    """The problem that a call states."""
    q, k, v = qkv
    norm = rest["normalise"] or ""
    total, m = packed_state(rest["state"], q, v, norm, "gate" in options)
    tensors = [options.get(name) for name in ("decay", "beta", "gate")]
    return Problem(q, k, v, *tensors, total, m, starts, rest["scale"], norm, 64)


def by_pairs(qkv, options, rest, starts=None):
    """Output and state of the form that knows no chunks."""
    p = problem(qkv, options, rest, starts)
    out, total, m = definition.parallel(p)
    return out, State(total[..., :-1], total[..., -1], m) if p.normalise else State(total, None, m)


def assert_same_state(got, want, size=1e-10):
    """The same state, part by part."""
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close(a, b, size)


def leaves_of(qkv, options, rest):
    """Everything that takes gradients."""
    state = rest["state"]
    parts = [] if state is None else [state.S, *([] if state.n is None else [state.n])]
    return [t.requires_grad_() for t in (*qkv, *options.values(), *parts)]


def gradients(run, qkv, options, rest, seed=3):
    """Gradients of everything, through the output and through the final state."""
    leaves = leaves_of(qkv, options, rest)
    out, state = run(qkv, options, rest)
    draws = torch.Generator().manual_seed(seed)
    results = [out, state.S, *([] if state.n is None else [state.n])]
    loss = sum((r * torch.randn(r.shape, generator=draws, dtype=F64)).sum() for r in results)
    return torch.autograd.grad(loss, leaves)


def by_chunks(chunk=None, backend="blocked"):
    """The engine as a function of inputs, options and the rest."""
    return lambda qkv, options, rest: scan(
        *qkv, **options, **rest, return_state=True, chunk=chunk, backend=backend
    )


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, N])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_all_pairs(kind, chunk, generator):
    inputs = draw(generator, kind)
    want, state = by_pairs(*inputs)
    got, last = by_chunks(chunk)(*inputs)
    close(got, want)
    assert_same_state(last, state)


@pytest.mark.parametrize("kind", KINDS)
def test_token_by_token_equals_all_pairs(kind, generator):
    inputs = draw(generator, kind)
    want, state = by_pairs(*inputs)
    got, last = by_chunks(backend="reference")(*inputs)
    close(got, want)
    assert_same_state(last, state)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_that_of_the_recurrence(kind, chunk, generator):
    inputs = draw(generator, kind, n=21)

    def recurrence(qkv, options, rest):
        p = problem(qkv, options, rest)
        out, total, m = definition.recurrent(p)
        return out, State(total[..., :-1], total[..., -1], m) if p.normalise else State(total, None, m)

    want = gradients(recurrence, *inputs)
    for got, expected in zip(gradients(by_chunks(chunk), *inputs), want, strict=True):
        close(got, expected, 1e-9)
    for got, expected in zip(gradients(by_chunks(backend="reference"), *inputs), want, strict=True):
        close(got, expected, 1e-9)


@given(n=st.integers(1, 90), d=st.sampled_from([1, 5, 8]), chunk=st.integers(1, 70), kind=st.sampled_from([*KINDS]),
       seed=st.integers(0, 2**20))  # fmt: skip
def test_any_length_and_chunk_agree(n, d, chunk, kind, seed):
    inputs = draw(torch.Generator().manual_seed(seed), kind, n=n, d=d)
    want, state = by_pairs(*inputs)
    got, last = by_chunks(chunk)(*inputs)
    close(got, want, 1e-9)
    assert_same_state(last, state, 1e-9)


@pytest.mark.parametrize("strength", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("kind", ["plain", "head", "token", "token abs", "channel", "channel sum", "gated delta"])
def test_mild_and_steep_decays_take_another_form_and_agree(kind, strength, generator, monkeypatch):
    qkv, options, rest = draw(generator, kind, n=150)
    if "decay" in options:
        options["decay"] = options["decay"] * strength
    taken = forms_taken(monkeypatch)
    want, state = by_pairs(qkv, options, rest)
    got, last = by_chunks(8)(qkv, options, rest)
    close(got, want)
    assert_same_state(last, state)
    assert all(taken) if kind == "plain" or strength < 0.1 else strength < 2 or not any(taken)


def forms_taken(monkeypatch):
    """Segments of one head; a list that fills with whether each head's decays were factored."""
    from manyheads.engine.scan import blocked

    taken, choose = [], blocked._chosen
    monkeypatch.setattr(blocked, "_ROWS", 40)

    def recorded(found, rows):
        weights = choose(found, rows)
        if found is not None:  # the tokens behind the last whole chunk are always exact
            taken.append(weights is not None)
        return weights

    monkeypatch.setattr(blocked, "_chosen", recorded)
    return taken


def test_a_steep_head_takes_its_own_form(generator, monkeypatch):
    qkv, options, rest = draw(generator, "token", n=128)
    options["decay"] = options["decay"] * torch.tensor([0.05, 20.0, 0.05, 20.0])[None, :, None]
    taken = forms_taken(monkeypatch)
    want, _ = by_pairs(qkv, options, rest)
    close(by_chunks(8)(qkv, options, rest)[0], want)
    assert taken == [True, False] * (len(taken) // 2) and taken


@pytest.mark.parametrize("kind", ["head", "gated delta", "mlstm", "channel"])
def test_many_segments_equal_one(kind, generator, monkeypatch):
    from manyheads.engine.scan import blocked

    inputs = draw(generator, kind, n=150)
    run = by_chunks(8)
    whole = [*run(*inputs)[:1], *gradients(run, *inputs)]
    monkeypatch.setattr(blocked, "_ROWS", 40)
    assert 3 <= sum(len(s.segments) for s in blocked._spans(problem(*inputs))) <= blocked.checkpoints(B, H, 150, 64)
    for got, want in zip([*run(*inputs)[:1], *gradients(run, *inputs)], whole, strict=True):
        close(got, want, 1e-9)


@pytest.mark.parametrize("cut", [0, 1, 16, 36, 37])
@pytest.mark.parametrize("kind", KINDS)
def test_splitting_anywhere_and_carrying_the_state_changes_nothing(kind, cut, generator):
    def halves(qkv, options, rest):
        def part(at):
            return [t[:, :, at] for t in qkv], {n: t if t.dim() == 1 else t[:, :, at] for n, t in options.items()}

        (first, a), (second, b) = part(slice(None, cut)), part(slice(cut, None))
        out, middle = scan(*first, **a, **rest, return_state=True, chunk=8)
        more, last = scan(*second, **b, **{**rest, "state": middle}, return_state=True, chunk=8)
        return torch.cat([out, more], 2), last

    inputs = draw(generator, kind)
    (whole, state), (split, last) = by_chunks()(*inputs), halves(*inputs)
    close(split, whole)
    assert_same_state(last, state)
    for got, want in zip(gradients(halves, *inputs), gradients(by_chunks(), *inputs), strict=True):
        close(got, want, 1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_equal_the_scan(kind, generator):
    (q, k, v), options, rest = draw(generator, kind, n=11, state=False)
    want, last = by_chunks()((q, k, v), options, rest)
    state, rows = rest.pop("state"), []
    for t in range(11):
        now = {n: x if x.dim() == 1 else x[:, :, t] for n, x in options.items()}
        row, state = step(q[:, :, t], k[:, :, t], v[:, :, t], state, **now, **rest)
        rows.append(row)
    close(torch.stack(rows, 2), want)
    assert_same_state(state, last)


def test_without_decay_it_is_masked_products(generator):
    (q, k, v), _, _ = draw(generator, "plain")
    want = ((q @ k.repeat_interleave(2, 1).mT).tril()) @ v.repeat_interleave(2, 1)
    close(scan(q, k, v), want)


def test_a_large_decay_leaves_each_token_to_itself(generator):
    (q, k, v), _, _ = draw(generator, "plain")
    alone = (q * k.repeat_interleave(2, 1)).sum(-1, keepdim=True) * v.repeat_interleave(2, 1)
    for decay in (torch.full((H,), -1e4, dtype=F64), torch.full((B, H, N), -torch.inf, dtype=F64),
                  torch.full((B, H, N, D), -1e4, dtype=F64)):  # fmt: skip
        close(scan(q, k, v, decay=decay), alone)


def test_a_decay_per_channel_that_is_equal_in_all_is_one_per_token(generator):
    (q, k, v), options, _ = draw(generator, "token")
    decay = options["decay"]
    close(scan(q, k, v, decay=decay[..., None].expand(B, H, N, D)), scan(q, k, v, decay=decay))


def test_orthonormal_keys_are_recalled_exactly(generator):
    keys = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=F64))[0]
    values = torch.randn(1, 1, 16, 5, generator=generator, dtype=F64)
    k = keys.repeat(2, 1)[None, None]  # every key is written twice: the second write replaces the first
    out, state = scan(k, k, values, beta=torch.ones(1, 1, 16, dtype=F64), return_state=True, chunk=4)
    close(out, values)
    close(keys @ state.S[0, 0], values[0, 0, 8:])


def test_open_forget_gates_and_zero_input_gates_average(generator):
    q, k, v = (t.abs() for t in draw(generator, "plain")[0])
    shape = (B, H, N)
    out = scan(q, k, v, decay=torch.zeros(shape, dtype=F64), gate=torch.zeros(shape, dtype=F64), normalise="sum")
    weights = (q @ k.repeat_interleave(2, 1).mT).tril()
    close(out, weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1))


def test_the_gate_means_what_it_says_without_any_stabiliser(generator):
    (q, k, v), options, _ = draw(generator, "mlstm")
    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    b = options["decay"].cumsum(-1)
    weights = (q @ k.mT * 0.7) * (b[..., :, None] - b[..., None, :] + options["gate"][..., None, :]).exp().tril()
    for name, floor in (("max1", 1.0), ("abs", 0.0)):
        want = weights @ v / weights.sum(-1, keepdim=True).abs().clamp_min(floor)
        close(scan(q, k, v, **options, scale=0.7, normalise=name), want, 1e-8)
    close(scan(q, k, v, **options, scale=0.7, normalise=True), scan(q, k, v, **options, scale=0.7, normalise="max1"))
    close(scan(q, k, v, **options, scale=0.7), weights @ v, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_extreme_gates_stay_finite_and_right(size, dtype, generator):
    (q, k, v), options, _ = draw(generator, "mlstm", n=70, dtype=dtype)
    q, k = q.abs(), k.abs()
    gate = torch.randn(B, H, 70, generator=generator).sign() * size
    gate[:, :, :3] = -1e4
    decay = options["decay"].masked_fill(torch.rand(B, H, 70, generator=generator) < 0.1, -1e4)
    leaves = [t.requires_grad_() for t in (q, k, v, decay, gate)]
    out, state = scan(q, k, v, decay=decay, gate=gate, normalise="sum", return_state=True, chunk=16)
    exact = definition.recurrent(problem(
        [t.detach().double() for t in (q, k, v)], {"decay": decay.detach().double(), "gate": gate.detach().double()},
        {"normalise": "sum", "state": None, "scale": 1.0}))[0]  # fmt: skip
    plain = definition.parallel(problem(
        [t.detach() for t in (q, k, v)], {"decay": decay.detach(), "gate": gate.detach()},
        {"normalise": "sum", "state": None, "scale": 1.0}))[0]  # fmt: skip
    assert_within_budget(out, exact, plain.to(dtype))
    assert all(t.isfinite().all() for t in (*torch.autograd.grad(out.float().square().sum(), leaves), *state))


def test_a_reset_in_the_middle_of_a_chunk_costs_its_neighbours_no_digits(generator):
    (q, k, v), options, _ = draw(generator, "token", n=64, dtype=torch.float32)
    for decay in (options["decay"] / 10, (options["decay"] / 10)[..., None].expand(B, H, 64, D).clone()):
        decay[:, :, 20] = -1e4
        exact = scan(*(t.double() for t in (q, k, v)), decay=decay.double())
        assert_within_budget(scan(q, k, v, decay=decay), exact, exact.float())


@pytest.mark.parametrize("lens", [[5, 16, 16], [0, 20, 0, 17, 0], [1] * N, [N]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_a_loop(kind, lens, generator):
    (q, k, v), options, rest = draw(generator, kind, state=False)
    got, last = scan(q, k, v, **options, **rest, lens=lens, return_state=True, chunk=8)
    begin = 0
    for n in [n for n in lens if n]:
        at = slice(begin, begin := begin + n)
        now = {name: x if x.dim() == 1 else x[:, :, at] for name, x in options.items()}
        want, state = scan(q[:, :, at], k[:, :, at], v[:, :, at], **now, **rest, return_state=True)
        close(got[:, :, at], want)
    assert_same_state(last, state)


def test_each_sequence_may_have_its_own_documents(generator):
    (q, k, v), options, _ = draw(generator, "gated delta")
    lens = torch.tensor([[10, 27], [30, 7]])
    got = scan(q, k, v, **options, lens=lens)
    close(got, scan(q, k, v, **options, lens=Document(lens)))
    for i in range(B):
        close(got[i : i + 1], scan(*(t[i : i + 1] for t in (q, k, v)), lens=lens[i].tolist(),
                                   **{n: t[i : i + 1] for n, t in options.items()}))  # fmt: skip


def test_no_gradient_passes_a_border(generator):
    (q, k, v), options, _ = draw(generator, "gated delta")
    leaves = [t.requires_grad_() for t in (k, v, options["decay"], options["beta"])]
    out = scan(q, k, v, **options, lens=[20, 17])
    for grad in torch.autograd.grad(out[:, :, 20:].sum(), leaves):
        assert (grad[:, :, :20] == 0).all() and (grad[:, :, 20:] != 0).any()
    (grad,) = torch.autograd.grad(scan(q, k, v, **options, lens=[20, 17]).sum(), leaves[2])
    assert (grad[:, :, 20] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_state_enters_the_first_document_only(kind, generator):
    (q, k, v), options, rest = draw(generator, kind)
    got = scan(q, k, v, **options, **rest, lens=[15, 22])
    close(got[:, :, :15], scan(q, k, v, **options, **rest)[:, :, :15])
    close(got[:, :, 15:], scan(q, k, v, **options, **{**rest, "state": None}, lens=[15, 22])[:, :, 15:])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_neither_writes_nor_decays(kind, generator):
    qkv, options, rest = draw(generator, kind)
    real = torch.rand(N, generator=generator) < 0.6
    real[[0, -1]] = False
    poisoned = [t.clone() for t in qkv]
    noisy = {n: t if t.dim() == 1 else t.clone() for n, t in options.items()}
    for t in (*poisoned, *(t for t in noisy.values() if t.dim() > 1)):
        t[:, :, ~real] = torch.nan
    padding = real.expand(B, N)

    def padded(qkv, options, rest):
        return scan(*qkv, **options, **rest, key_padding=padding, return_state=True, chunk=8)

    def alone(qkv, options, rest):
        kept = {n: t if t.dim() == 1 else t[:, :, real] for n, t in options.items()}
        out, state = scan(*(t[:, :, real] for t in qkv), **kept, **rest, return_state=True, chunk=8)
        return torch.zeros(B, H, N, DV, dtype=F64).index_copy(2, real.nonzero()[:, 0], out), state

    want, got = alone(qkv, options, rest), padded(poisoned, noisy, rest)
    close(got[0], want[0])
    assert_same_state(got[1], want[1])
    for a, b in zip(gradients(padded, poisoned, noisy, rest), gradients(alone, qkv, options, rest), strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_reverse_is_the_scan_of_the_flipped_sequence(kind, generator):
    qkv, options, rest = draw(generator, kind)
    want, last = scan(*(t.flip(2) for t in qkv), **{n: t if t.dim() == 1 else t.flip(2) for n, t in options.items()},
                      **rest, lens=[16, 21], return_state=True)  # fmt: skip
    got, state = scan(*qkv, **options, **rest, lens=[21, 16], reverse=True, return_state=True)
    close(got, want.flip(2))
    assert_same_state(state, last)


def test_both_directions_without_the_diagonal_see_everything(generator):
    (q, k, v), _, _ = draw(generator, "plain")
    wide = [t.repeat_interleave(2, 1) for t in (k, v)]
    own = (q * wide[0]).sum(-1, keepdim=True) * wide[1]
    close(scan(q, k, v) + scan(q, k, v, reverse=True) - own, q @ (wide[0].mT @ wide[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind, generator):
    qkv, options, rest = draw(generator, kind)
    odd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv]
    strange = {n: t if t.dim() == 1 else t.movedim(2, 0).contiguous().movedim(0, 2) for n, t in options.items()}
    close(scan(*odd, **strange, **rest), scan(*qkv, **options, **rest))
    assert scan(*odd, **strange, **rest).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gate"])
def test_lower_precision_stays_within_budget(kind, dtype):
    inputs = draw(torch.Generator().manual_seed(0), kind, n=150, dtype=dtype, d=16)
    (q, k, v), options, rest = inputs
    wide = (tuple(t.double() for t in (q, k, v)), {n: t.double() for n, t in options.items()},
            {**rest, "state": State(*[None if t is None else t.double() for t in rest["state"]])})  # fmt: skip
    exact, exact_state = by_pairs(*wide)
    plain, plain_state = by_pairs(*inputs)
    got, state = by_chunks()(*inputs)
    assert got.dtype == dtype and state.S.dtype == torch.float32
    assert_within_budget(got, exact, plain.to(dtype), what="out")
    assert_within_budget(state.S, exact_state.S, plain_state.S, what="S")


@pytest.mark.parametrize("sizes", [(0, H, N), (B, H, 0), (1, H, 1)], ids=str)
def test_empty_and_single_calls(sizes, generator):
    b, h, n = sizes
    q, k, v = (torch.randn(b, h, n, w, dtype=F64, requires_grad=True) for w in (D, D, DV))
    start = State(torch.randn(b, h, D, DV, dtype=F64, requires_grad=True))
    out, state = scan(q, k, v, decay=torch.zeros(h, dtype=F64), state=start, return_state=True)
    assert out.shape == (b, h, n, DV)
    grads = torch.autograd.grad(out.sum() + state.S.sum(), [q, k, v, start.S])
    assert all(g.isfinite().all() for g in grads)
    if n == 0:
        close(state.S, start.S)
        assert (grads[3] == 1).all()


def test_nothing_uninitialised_is_read(generator):
    from manyheads.testing import nan_poisoned

    for kind in KINDS:
        inputs = draw(generator, kind)
        with nan_poisoned():
            got = [by_chunks(8)(*inputs)[0], *gradients(by_chunks(8), *inputs)]
        assert all(t.isfinite().all() for t in got)


def test_memory_is_linear_in_length():
    q = torch.zeros(1, 1, 30_000, 4)
    assert scan(q, q, q, decay=torch.zeros(1)).shape == q.shape  # all pairs would take 900 million entries


def test_wrong_input_is_named(generator):
    (q, k, v), options, _ = draw(generator, "gated delta")
    decay, beta = options["decay"], options["beta"]
    wrong = [
        (ValueError, "decay: log decays are at most 0, got 0.5", {"decay": torch.full((H,), 0.5)}),
        (ValueError, r"decay: expected shape \(H=4,\)", {"decay": decay[:, :2]}),
        (TypeError, "decay: expected a floating tensor, got torch.int64", {"decay": torch.zeros(H, dtype=torch.long)}),
        (ValueError, r"beta: expected values in \[0, 2\]", {"beta": beta + 2}),
        (ValueError, r"beta: expected values in \[0, 2\]", {"beta": beta - 2}),
        (ValueError, "beta: expected shape", {"beta": beta[0]}),
        (ValueError, "gate: expected shape", {"gate": beta[..., :3]}),
        (ValueError, "lens: documents must sum to the N=37", {"lens": [20, 16]}),
        (ValueError, "lens: borders out of order", {"lens": [40, -3]}),
        (ValueError, r"lens: expected shape \(n,\)", {"lens": torch.ones(3, 37, dtype=torch.long)}),
        (TypeError, "lens: expected integers", {"lens": torch.tensor([37.0])}),
        (ValueError, "lens: a recurrence has one token sequence", {"lens": Document([37], [40])}),
        (ValueError, "state: S must have shape", {"state": State(torch.zeros(B, H, DV, D, dtype=F64))}),
        (TypeError, "state: S must be torch.float64", {"state": State(torch.zeros(B, H, D, DV))}),
        (TypeError, "state: expected a State", {"state": torch.zeros(B, H, D, DV)}),
        (ValueError, "state: n is missing", {"state": State(torch.zeros(B, H, D, DV, dtype=F64)), "normalise": "abs"}),
        (ValueError, "chunk: expected a positive number", {"chunk": 0}),
        (ValueError, "did you mean 'sum'", {"normalise": "sums"}),
        (ValueError, "did you mean 'blocked'", {"backend": "blockd"}),
        (ValueError, "scale: expected a finite number", {"scale": float("nan")}),
        (ValueError, "normalise: 'sum' needs features", {"normalise": "sum"}),
        (ValueError, "key_padding: expected shape", {"key_padding": torch.ones(B, 3, dtype=torch.bool)}),
        (UnsupportedError, "per channel", {"beta": beta, "decay": decay[..., None].expand(B, H, N, D)}),
        (UnsupportedError, "multiply k by", {"gate": beta, "decay": decay[..., None].expand(B, H, N, D)}),
        (UnsupportedError, "beta is the input gate", {"beta": beta, "gate": beta}),
        (UnsupportedError, "with the delta rule", {"beta": beta, "normalise": True}),
    ]
    for error, words, keywords in wrong:
        with pytest.raises(error, match=words):
            scan(q, k, v, **keywords)
    with pytest.raises(ValueError, match="a key for each of the N=37 queries, got 36"):
        scan(q, k[:, :, 1:], v[:, :, 1:])
    with pytest.raises(ValueError, match="q: expected 3 dimensions"):
        step(q, k, v)
    with pytest.raises(ValueError, match="m takes no gradient"):
        s = State(torch.zeros(B, H, D, DV, dtype=F64), None, torch.zeros(B, H, dtype=F64, requires_grad=True))
        scan(q, k, v, gate=beta, state=s)
    with pytest.raises(ValueError, match="unknown backend"):
        refuse("tritn", "cpu")
    assert refuse("blocked", "meta") and not refuse("blocked", "cpu")
