"""The mLSTM: its forms agree, its kernels' backward is exact behind a norm, its gates neither overflow nor need to."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from manyheads import Causal, Document
from manyheads.common.errors import UnsupportedError
from manyheads.engine.scan import State
from manyheads.mechanism.linear.mlstm import flops, mlstm, reference, step, transfer
from manyheads.spec import Size, find

B, H, N, D, DV = 2, 3, 131, 5, 7
F64 = torch.float64
KINDS = [("exp", None), ("exp", "abs"), ("exp", False), ("sigmoid", None), ("sigmoid", "max1")]


def close(got, want, size=1e-9):
    torch.testing.assert_close(got, want, rtol=size, atol=size)


def draw(generator, n=N, dtype=F64, h=H, hkv=H):
    """Queries, keys, values and gates."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    gates = {"input_gate": normal(B, h, n), "forget_gate": normal(B, h, n) + 2}
    return (normal(B, h, n, D), normal(B, hkv, n, D), normal(B, hkv, n, DV)), gates


def initial(generator, gate, normalise, dtype=F64):
    """A state that something came before."""
    normed = normalise or (normalise is None and gate == "exp")
    parts = [torch.randn(*s, generator=generator, dtype=dtype) for s in ((B, H, D, DV), (B, H, D), (B, H))]
    return State(parts[0], parts[1] if normed else None, parts[2] if gate == "exp" else None)


def by_steps(qkv, gates, options, state):
    """The recurrent form."""
    outs = []
    for t in range(qkv[0].shape[2]):
        at = {name: g[:, :, t] for name, g in gates.items()}
        out, state = step(*(x[:, :, t] for x in qkv), state, **at, **options)
        outs.append(out)
    return torch.stack(outs, 2), state


def assert_same_state(got, want):
    """Equal in what they stand for."""
    for part in ("S", "n"):
        a, b = getattr(got, part), getattr(want, part)
        assert (a is None) == (b is None)
        if a is not None:
            shift = 0 if got.m is None else (got.m - want.m).exp().view(*got.m.shape, *[1] * (a.dim() - 2))
            close(a * shift if got.m is not None else a, b)


@pytest.mark.parametrize("chunk", [1, 7, 64, N])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize(("gate", "normalise"), KINDS)
def test_recurrent_parallel_and_chunked_forms_agree(generator, gate, normalise, carried, chunk):
    qkv, gates = draw(generator)
    options = {"gate": gate, "normalise": normalise}
    state = initial(generator, gate, normalise) if carried else None
    out, end = mlstm(*qkv, **gates, **options, state=state, return_state=True, chunk=chunk)
    stepped, last = by_steps(qkv, gates, options, state)
    close(out, stepped)
    close(out, reference(*qkv, **gates, **options, state=state))
    assert_same_state(end, last)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_float32_forms_agree(generator, gate):
    qkv, gates = draw(generator, dtype=torch.float32)
    gates["input_gate"] = gates["input_gate"] - 4
    out = mlstm(*qkv, **gates, gate=gate)
    close(out, by_steps(qkv, gates, {"gate": gate}, None)[0], 1e-4)
    close(out, reference(*qkv, **gates, gate=gate), 1e-4)


def test_open_forget_gate_is_normalised_linear_attention(generator):
    (q, k, v), gates = draw(generator)
    gates = {"input_gate": torch.zeros_like(gates["input_gate"]), "forget_gate": torch.full((B, H, N), 60.0, dtype=F64)}
    weights = (q @ k.mT * D**-0.5).tril()
    want = weights @ v / weights.sum(-1, keepdim=True).abs().clamp(min=1)
    close(mlstm(q, k, v, **gates), want)


def manual_backward(dh, q, k, v, i, f, exponential=True):
    """The backward that the published kernels run: divisor and maximum are constants."""
    scale, total = q.shape[-1] ** -0.5, F.logsigmoid(f).cumsum(-1)
    log = total[..., :, None] - total[..., None, :] + (i if exponential else F.logsigmoid(i))[..., None, :]
    log = log.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf)
    m = log.amax(-1, keepdim=True)
    gains, scores = (log - m).exp(), q @ k.mT * scale
    divisor = torch.maximum((scores * gains).sum(-1, keepdim=True).abs(), (-m).exp())
    p = dh / divisor @ v.mT * gains
    dq, dk = p @ k * scale, p.mT @ q * scale
    dv = (scores * gains).mT @ (dh / divisor)
    di = (p * scores).sum(-2)
    df = ((q * dq).sum(-1) - (k * dk).sum(-1)).flip(-1).cumsum(-1).flip(-1) * torch.sigmoid(-f)
    return dq, dk, dv, di if exponential else di * torch.sigmoid(-i), df


def leaves(generator, gate):
    """Leaves that take gradients, with gates at which both sides of the floor of the divisor occur."""
    qkv, gates = draw(generator)
    gates["input_gate"] = gates["input_gate"] - 2 if gate == "exp" else gates["input_gate"] + 2
    return [t.requires_grad_() for t in (*qkv, *gates.values())]


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_frozen_denominators_give_the_manual_backward(generator, gate):
    q, k, v, i, f = leaves(generator, gate)
    raw = mlstm(q, k, v, input_gate=i, forget_gate=f, gate=gate, normalise=False)
    ones = v.new_ones(*v.shape[:3], 1)
    sums = mlstm(q, k, ones, input_gate=i, forget_gate=f, gate=gate, normalise=False)
    below = sums.abs().detach() < 1
    assert 0.05 < below.double().mean() < 0.95
    h = raw / sums.detach().abs().clamp(min=1)
    close(h, mlstm(q, k, v, input_gate=i, forget_gate=f, gate=gate, normalise=True))
    dh = torch.randn(h.shape, generator=generator, dtype=F64)
    found = torch.autograd.grad(h, [q, k, v, i, f], dh)
    for got, want in zip(found, manual_backward(dh, q, k, v, i, f, gate == "exp"), strict=True):
        close(got, want)


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_behind_a_scale_free_norm_the_manual_backward_is_exact(generator, gate):
    q, k, v, i, f = leaves(generator, gate)
    h = mlstm(q, k, v, input_gate=i, forget_gate=f, gate=gate, normalise=True)
    direction = h / h.norm(dim=-1, keepdim=True)
    seed = torch.randn(h.shape, generator=generator, dtype=F64)
    dh, *found = torch.autograd.grad(direction, [h, q, k, v, i, f], seed)
    for got, want in zip(found, manual_backward(dh, q, k, v, i, f, gate == "exp"), strict=True):
        close(got, want, 1e-8)
    plain = torch.autograd.grad(mlstm(q, k, v, input_gate=i, forget_gate=f, gate=gate, normalise=True), q, seed)
    assert (plain[0] - manual_backward(seed, q, k, v, i, f, gate == "exp")[0]).abs().max() > 1e-3


def test_a_huge_input_gate_does_not_overflow(generator):
    (q, k, v), gates = draw(generator, dtype=torch.float32)
    q, k = q.abs(), k.abs()  # so that no divisor is zero by chance
    huge = gates | {"input_gate": torch.full((B, H, N), 100.0)}
    leaf = huge["input_gate"].requires_grad_()
    out, state = mlstm(q, k, v, **huge, return_state=True)
    assert out.isfinite().all() and all(part.isfinite().all() for part in state)
    assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()
    assert by_steps((q, k, v), huge, {}, None)[0].isfinite().all()
    assert torch.isinf(torch.tensor(100.0).exp())
    wide = {name: g.double() for name, g in huge.items()}
    want = reference(q.double(), k.double(), v.double(), **wide)
    assert (out - want).abs().max() < 1e-5 * want.abs().max()


def test_the_sigmoid_gate_needs_no_maximum(generator):
    (q, k, v), gates = draw(generator, dtype=torch.float32)
    gates["input_gate"] = 100 * gates["input_gate"].sign()
    out, state = mlstm(q, k, v, **gates, gate="sigmoid", return_state=True)
    assert state.m is None and state.n is None
    total = F.logsigmoid(gates["forget_gate"]).cumsum(-1)
    log = total[..., :, None] - total[..., None, :] + F.logsigmoid(gates["input_gate"])[..., None, :]
    weights = log.exp().tril()
    assert weights.max() <= 1
    close(out, (q @ k.mT * D**-0.5 * weights) @ v, 1e-4)


def test_a_state_of_the_sigmoid_gate_continues_with_keys_grouped(generator):
    (q, k, v), gates = draw(generator, n=20, h=4, hkv=2)
    whole, end = mlstm(q, k, v, **gates, gate="sigmoid", normalise=True, return_state=True)
    state, parts = None, []
    for cut in (slice(0, 9), slice(9, 20)):
        some = {name: g[:, :, cut] for name, g in gates.items()}
        out, state = mlstm(*(t[:, :, cut] for t in (q, k, v)), **some, gate="sigmoid", normalise=True, state=state,
                           return_state=True)  # fmt: skip
        parts.append(out)
    close(torch.cat(parts, 2), whole)
    assert_same_state(state, end)


def test_documents_start_anew(generator):
    (q, k, v), gates = draw(generator, n=20)
    mask = Document([3, 17]) & Causal()
    alone = mlstm(*(t[:, :, 3:] for t in (q, k, v)), **{name: g[:, :, 3:] for name, g in gates.items()})
    close(mlstm(q, k, v, **gates, mask=mask)[:, :, 3:], alone)


def test_transfer_falls_with_the_input_gate_and_the_norm_restores_it(generator):
    gains = transfer([-20.0, -4.0, 0.0], [0.0, 5.0], gate="sigmoid", tokens=128, width=32, generator=generator)
    assert gains.before.shape == (3, 2)
    assert (gains.before.diff(dim=0) > 0).all() and (gains.before.diff(dim=1) > 0).all()
    assert (gains.after[0] < 0.01).all() and (gains.after[1:] > 0.3).all()
    again = transfer([-20.0], [0.0], gate="exp", tokens=64, width=16, norm_eps=1e-20, generator=generator)
    assert again.before < 1e-6 and again.after > 0.3


@pytest.mark.parametrize("gate", ["exp", "sigmoid"])
def test_agrees_with_the_published_functions(generator, gate):
    xlstm = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if xlstm.external_xlstm:
        pytest.skip("transformers delegates to the xlstm package")
    (q, k, v), gates = draw(generator, n=128, dtype=torch.float32)
    i, f = gates.values()
    i = i if gate == "exp" else F.logsigmoid(i)  # an exponential gate of the log of a sigmoid
    state = [torch.randn(*s, generator=generator) for s in ((B, H, D, DV), (B, H, D), (B, H, 1))]
    carried = dict(zip(("c_initial", "n_initial", "m_initial"), state, strict=True))
    names = {"query": q, "key": k, "value": v, "igate": i, "fgate": f, "return_last_states": True, "eps": 0.0}
    mine = State(state[0], state[1], state[2][..., 0])
    out, end = mlstm(q, k, v, input_gate=i, forget_gate=f, state=mine, return_state=True)
    for form in (xlstm.mlstm_chunkwise_native_autograd, xlstm.mlstm_recurrent_sequence_native):
        want, (c, n, m) = form(**names, **carried)
        assert (out - want).abs().max() < 1e-4 * want.abs().max()
        factor = (end.m - m[..., 0]).exp()
        close(end.S * factor[..., None, None], c, 1e-4)
        close(end.n * factor[..., None], n, 1e-4)


WRONG = {
    "rank": (lambda q, k, v, i, f: mlstm(q[0], k, v, input_gate=i, forget_gate=f), ValueError, "q: expected 4"),
    "gate shape": (lambda q, k, v, i, f: mlstm(q, k, v, input_gate=i[:, :, :3], forget_gate=f), ValueError,
                   r"input_gate: expected shape \(B, H, N\)"),
    "gate dtype": (lambda q, k, v, i, f: mlstm(q, k, v, input_gate=i, forget_gate=f.long()), TypeError,
                   "forget_gate: expected a floating"),
    "gate missing": (lambda q, k, v, i, f: mlstm(q, k, v, input_gate=None, forget_gate=f), TypeError, "input_gate"),
    "name": (lambda q, k, v, i, f: mlstm(q, k, v, input_gate=i, forget_gate=f, gate="sigmoi"), ValueError,
             "did you mean 'sigmoid'"),
    "normaliser": (lambda q, k, v, i, f: mlstm(q, k, v, input_gate=i, forget_gate=f, normalise="max"), ValueError,
                   "did you mean 'max1'"),
    "mask": (lambda q, k, v, i, f: mlstm(q, k, v, input_gate=i, forget_gate=f, mask="window(3)"), UnsupportedError,
             "does not support"),
    "state": (lambda q, k, v, i, f: mlstm(q, k, v, input_gate=i, forget_gate=f, gate="sigmoid", state=State(
        torch.zeros(B, H, D, DV), None, torch.zeros(B, H))), ValueError, "state: m is given"),
    "step": (lambda q, k, v, i, f: step(q, k, v, input_gate=i[..., 0], forget_gate=f[..., 0]), ValueError, "q: exp"),
    "transfer": (lambda q, k, v, i, f: transfer([0.0], [0.0], tokens=0), ValueError, "tokens: expected at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(generator, case):
    call, error, words = case
    qkv, gates = draw(generator, n=4, dtype=torch.float32)
    with pytest.raises(error, match=words):
        call(*qkv, *gates.values())


def test_flops_grow_linearly_with_the_tokens():
    spec = find("tfla-mlstm")
    short, long = (flops(spec.inputs(Size(queries=n, causal=True))) for n in (100, 300))
    assert long == 3 * short
