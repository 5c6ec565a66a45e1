"""NAtS-L: its two limits, decoding, gradients of types, and that a type acts on later chunks only."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from manyheads import Causal, Document, attention
from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.linear.gated_delta import gated_delta
from manyheads.mechanism.linear.natsl import Branches, NATSConfig, branches, choose, gated_norm, natsl, reference, step
from manyheads.nn import NATSL

B, H, N, D, DV, C = 2, 2, 29, 4, 6, 4
F64 = torch.float64
CONFIGS = {
    "plain": NATSConfig(chunk=C),
    "split": NATSConfig(chunk=C, split=2),
    "fade kept": NATSConfig(chunk=C, decay_kept=False),
    "both": NATSConfig(chunk=C, both=True),
}


def close(got, want, size=1e-9):
    torch.testing.assert_close(got, want, rtol=size, atol=size)


def draw(generator, n=N, dtype=F64, b=B):
    """Queries, keys, values and gates."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    gates = {"decay": -0.2 * normal(b, H, n).abs(), "beta": normal(b, H, n).sigmoid()}
    gates["attend"] = (normal(b, H, n) > 0).to(dtype)
    return (normal(b, H, n, D), normal(b, H, n, D), normal(b, H, n, DV)), gates


def raw(qkv, gates, config=CONFIGS["plain"]):
    """The two branches on inputs as they are."""
    return branches(qkv, qkv, **gates, config=config)[0]


def test_chunks_that_all_attend_are_causal_attention(generator):
    qkv, gates = draw(generator)
    found = raw(qkv, gates | {"attend": torch.ones(B, H, N)})
    close(found.attention, attention(*qkv, mask="causal"))


def test_chunks_that_none_attends_are_the_plain_memory_and_local_attention(generator):
    (q, k, v), gates = draw(generator)
    k = F.normalize(k, dim=-1)
    found = raw((q, k, v), gates | {"attend": torch.zeros(B, H, N, dtype=torch.bool)})
    plain = gated_delta(q, k, v, decay=gates["decay"], beta=gates["beta"], unit=False, scale=1.0)
    close(found.memory, plain)
    chunk = torch.arange(N) // C
    close(found.attention, attention(q, k, v, mask=(chunk[:, None] == chunk) & torch.ones(N, N).tril().bool()))


@pytest.mark.parametrize("fade", [True, False])
def test_taken_back_writes_leave_the_memory_that_faded(generator, fade):
    (q, k, v), gates = draw(generator, n=3 * C)
    attend = torch.zeros(B, H, 3 * C, dtype=F64)
    attend[:, :, C : 2 * C] = 1
    config = dataclasses.replace(CONFIGS["plain"], decay_kept=fade)
    _, state = branches((q, k, v), (q, k, v), **gates | {"attend": attend}, config=config)
    silent = gates["beta"].clone()
    silent[:, :, C : 2 * C] = 0
    decay = gates["decay"].clone()
    if not fade:
        decay[:, :, C : 2 * C] = 0
    _, plain = gated_delta(q, k, v, decay=decay, beta=silent, unit=False, return_state=True)
    close(state.memory.start, plain.S)
    assert torch.equal(state.memory.start, state.memory.now)
    assert torch.equal(state.attention.keys, k[:, :, C : 2 * C]) and (state.attention.kept == C).all()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_its_reference_with_all_gradients(generator, config):
    qkv, gates = draw(generator)
    mix = torch.randn(B, H * config.split, N, 2, generator=generator, dtype=F64).softmax(-1)
    leaves = [t.requires_grad_() for t in (*qkv, *gates.values(), mix)]

    def run(form):
        return form(*qkv, **gates, mix=mix, config=config)

    got, want = run(natsl), run(reference)
    close(got, want)
    weight = torch.randn(got.shape, generator=generator, dtype=F64)
    for a, b in zip(*(torch.autograd.grad(y, leaves, weight) for y in (got, want)), strict=True):
        close(a, b, 1e-8)


def by_gates(q, k, v, decay, beta, keep, write):
    """Both branches with a number for every chunk that multiplies its weights, and one that multiplies its write."""
    number = torch.arange(N) // C
    factor = torch.where(number[None, :] < number[:, None], keep[:, :, None, number], 1.0)
    weights = factor * (q @ k.mT * D**-0.5).exp().tril()
    memory = start = torch.zeros(B, H, D, DV, dtype=F64)
    outs = []
    for t in range(N):
        if t % C == 0:
            start = memory
        fade = decay[:, :, t, None, None].exp()
        memory, start = fade * memory, fade * start
        key = k[:, :, t, :, None]
        memory = memory + beta[:, :, t, None, None] * key * (v[:, :, t, None] - key.mT @ memory)
        outs.append((q[:, :, t, None] @ memory)[:, :, 0])
        if t % C == C - 1:
            memory = start + write[:, :, t // C, None, None] * (memory - start)
    return torch.stack(outs, 2), weights @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("both", [False, True], ids=["chosen", "both"])
def test_gradients_of_types_are_those_of_multiplicative_gates(generator, both):
    qkv, gates = draw(generator)
    attend = gates.pop("attend").requires_grad_()
    found = branches(qkv, qkv, **gates, attend=attend, config=NATSConfig(chunk=C, both=both))[0]
    ends = torch.arange(C - 1, N, C)
    types = F.pad(attend.detach()[:, :, ends], (0, 1))
    keep, write = (t.clone().requires_grad_() for t in (types, 1 - types))
    want = by_gates(*qkv, *gates.values(), keep, write)
    draws = [torch.randn(t.shape, generator=generator, dtype=F64) for t in want]
    for n, weight in enumerate(draws):
        close(found[n], want[n])
        (got,) = torch.autograd.grad(found[n], attend, weight, retain_graph=True)
        gate = torch.autograd.grad(want[n], (write, keep)[n], weight, retain_graph=True)[0]
        gate = gate if both else torch.where((types > 0.5) == bool(n), gate, 0.0)
        sign = 1 if n else -1
        close(got[:, :, ends], sign * gate[:, :, :-1], 1e-8)
        others = got.clone()
        others[:, :, ends] = 0
        assert got.any() and not others.any()


@pytest.mark.parametrize("changed", [0, 2, 5, N // C])
def test_a_type_acts_on_later_chunks_only(generator, changed):
    qkv, gates = draw(generator)
    base = natsl(*qkv, **gates, config=CONFIGS["plain"])
    other = gates["attend"].clone()
    other[:, :, changed * C : (changed + 1) * C] = 1 - other[:, :, changed * C : (changed + 1) * C]
    got = natsl(*qkv, **gates | {"attend": other}, config=CONFIGS["plain"])
    after = (changed + 1) * C
    close(got[:, :, :after], base[:, :, :after], 1e-12)
    assert after >= N or ((got - base)[:, :, after:].abs() > 1e-6).any(-1).all()


def test_a_type_is_read_at_the_last_token_of_its_chunk_only(generator):
    qkv, gates = draw(generator)
    junk = torch.full_like(gates["attend"], float("nan"))
    ends = torch.arange(C - 1, N, C)
    junk[:, :, ends] = gates["attend"][:, :, ends]
    assert torch.equal(natsl(*qkv, **gates | {"attend": junk}, config=CONFIGS["plain"]),
                       natsl(*qkv, **gates, config=CONFIGS["plain"]))  # fmt: skip


def test_the_future_does_not_reach_the_past(generator):
    qkv, gates = draw(generator)
    base = natsl(*qkv, **gates, config=CONFIGS["plain"])
    at = 17
    later = [t.clone() for t in (*qkv, *gates.values())]
    for t in later:
        t[:, :, at:] = t[:, :, at:].flip(2)
    got = natsl(*later[:3], **dict(zip(gates, later[3:], strict=True)), config=CONFIGS["plain"])
    close(got[:, :, :at], base[:, :, :at], 1e-12)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("cut", [0, 6, 8])
def test_steps_equal_one_call(generator, config, cut):
    qkv, gates = draw(generator)
    whole, end = natsl(*qkv, **gates, config=config, return_state=True)
    state, outs = None, []
    if cut:
        out, state = natsl(*(t[:, :, :cut] for t in qkv), **{n: g[:, :, :cut] for n, g in gates.items()},
                           config=config, return_state=True)  # fmt: skip
        outs.append(out)
    for t in range(cut, N):
        at = {name: g[:, :, t] for name, g in gates.items()}
        if (t + 1) % C:
            at["attend"] = None
        out, state = step(*(x[:, :, t] for x in qkv), state, **at, config=config)
        outs.append(out[:, :, None])
    close(torch.cat(outs, 2), whole)
    for got, want in zip((*state.memory, *state.attention), (*end.memory, *end.attention), strict=True):
        if got.shape == want.shape == state.attention.keys.shape or got.shape == state.attention.values.shape:
            real = torch.arange(got.shape[2]) < state.attention.kept[..., None]
            got, want = (t * real[..., None] for t in (got, want))
        close(got, want)


def test_a_cache_holds_only_the_chunks_that_are_kept(generator):
    qkv, gates = draw(generator)
    _, state = natsl(*qkv, **gates, config=CONFIGS["plain"], return_state=True)
    kept = gates["attend"][:, :, C - 1 :: C].sum(-1).long() * C
    assert torch.equal(state.attention.kept, kept) and state.attention.keys.shape[2] == kept.max() < N
    assert state.attention.k.shape[2] == N % C


def test_documents_may_differ_between_batch_entries(generator):
    qkv, gates = draw(generator)
    lens = [[10, 19], [25, 4]]
    packed = natsl(*qkv, **gates, config=CONFIGS["plain"], mask=Document(lens) & Causal())
    for row, (n, _) in enumerate(lens):
        for part in (slice(0, n), slice(n, N)):
            at = (slice(row, row + 1), slice(None), part)
            alone = natsl(*(t[at] for t in qkv), **{name: g[at] for name, g in gates.items()}, config=CONFIGS["plain"])
            close(packed[at], alone)


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("beta", [True, False])
def test_other_memories_are_delta_rules_without_fading_and_additive_ones(generator, decay, beta):
    (q, k, v), gates = draw(generator)
    k, zero = 0.5 * F.normalize(k, dim=-1), torch.zeros(B, H, N, dtype=F64)
    found = raw((q, k, v), {"decay": gates["decay"] if decay else None, "beta": gates["beta"] if beta else None,
                            "attend": zero})  # fmt: skip
    memory, outs = torch.zeros(B, H, D, DV, dtype=F64), []
    for t in range(N):
        memory = memory * (gates["decay"][:, :, t, None, None].exp() if decay else 1)
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        memory = memory + key * (gates["beta"][:, :, t, None, None] * (value - key.mT @ memory) if beta else value)
        outs.append((q[:, :, t, None] @ memory)[:, :, 0])
    close(found.memory, torch.stack(outs, 2))


def test_choices_are_hard_and_gradients_soft(generator):
    logits = torch.randn(5, 2, generator=generator, dtype=F64, requires_grad=True)
    made, soft = choose(logits), logits.softmax(-1)[:, 0]
    assert torch.equal(made.detach(), (logits[:, 0] > logits[:, 1]).double())
    weight = torch.randn(5, generator=generator, dtype=F64)
    close(*(torch.autograd.grad(t, logits, weight)[0] for t in (made, soft)))
    flat = torch.zeros(4000, 2, dtype=F64)
    flat[:, 0] = 1.0
    share = choose(flat, gumbel=True, generator=generator).mean()
    assert abs(share - torch.tensor(1.0).sigmoid()) < 0.04


def test_the_gated_norm_is_two_norms_mixed_and_gated(generator):
    a, b, gate = torch.randn(3, 5, 8, generator=generator)
    weights, mix = torch.randn(2, 8, generator=generator), torch.rand(5, 2, generator=generator)
    normed = [F.rms_norm(t, (8,), w, 1e-5) for t, w in zip((a, b), weights, strict=True)]
    want = (mix[:, :1] * normed[0] + mix[:, 1:] * normed[1]) * F.silu(gate)
    close(gated_norm(a, b, weights=tuple(weights), mix=mix, gate=gate, eps=1e-5), want, 1e-5)


def test_large_projections_have_six_times_the_square_of_the_width():
    with torch.device("meta"):
        layer = NATSL(1024, 6)
    large = {name: getattr(layer, f"{name}_proj").weight.numel() / 1024**2 for name in "qkvgo"}
    assert large == {"q": 0.75, "k": 0.75, "v": 1.5, "g": 1.5, "o": 1.5} and sum(large.values()) == 6
    assert layer.attn_heads == 12 and layer.head_dim == 128


WRONG = {
    "attend shape": ({"attend": torch.ones(B, H, 1)}, ValueError, r"attend: expected shape \(2, 2, 4\)"),
    "attend dtype": ({"attend": torch.ones(B, H, 4).long()}, TypeError, "attend: expected a floating tensor or bool"),
    "beta": ({"beta": None}, TypeError, "beta: expected a floating tensor, got NoneType"),
    "decay": ({"decay": torch.ones(B, H, 4)}, ValueError, "decay: log decays are at most 0"),
    "mix": ({"mix": torch.ones(B, H, 4, 2), "config": NATSConfig(split=2)}, ValueError, r"mix: expected \w+ \(2, 4"),
    "split": ({"config": NATSConfig(split=3)}, ValueError, "q: its width 4 is not a multiple of config.split = 3"),
    "mask": ({"mask": "window(2)"}, UnsupportedError, "natsl does not support mask"),
    "state": ({"mask": Document([4]) & Causal(), "return_state": True}, UnsupportedError, "a state after packed"),
    "backend": ({"backend": "bloked"}, ValueError, "did you mean 'blocked'"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(generator, case):
    options, error, words = case
    qkv, gates = draw(generator, n=4, dtype=torch.float32)
    with pytest.raises(error, match=words):
        natsl(*qkv, **gates | options)


def test_wrong_options_and_missing_types_are_named(generator):
    with pytest.raises(ValueError, match="chunk: expected a positive number of tokens"):
        NATSConfig(chunk=0)
    with pytest.raises(ValueError, match="split: expected a positive number of heads"):
        NATSConfig(split=0)
    with pytest.raises(ValueError, match=r"logits: expected \(..., 2\)"):
        choose(torch.zeros(3))
    qkv, gates = draw(generator, n=2)
    one = [t[:, :, 0] for t in qkv]
    with pytest.raises(ValueError, match="attend: this token completes its chunk"):
        step(*one, decay=gates["decay"][:, :, 0], beta=gates["beta"][:, :, 0], config=NATSConfig(chunk=1))
    _, state = natsl(*qkv, **gates, return_state=True)
    with pytest.raises(UnsupportedError, match="a state with packed documents"):
        natsl(*qkv, **gates, state=state, mask=Document([2]) & Causal())
    assert isinstance(raw(qkv, gates), Branches)


def test_compiled_documents_give_the_same(generator):
    qkv, gates = draw(generator, b=1)

    def run(q, k, v, gates, mask):
        return natsl(q, k, v, **gates, config=CONFIGS["plain"], mask=mask)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for lens in ([10, 19], [1, 28]):
        mask = Document(lens) & Causal()
        close(compiled(*qkv, gates, mask), run(*qkv, gates, mask))
