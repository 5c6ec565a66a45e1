"""Gated DeltaNet: its forms agree with each other and with independent code; it overwrites what stands under a key."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn import functional as F

from manyheads.common.errors import UnsupportedError
from manyheads.mechanism.linear.gated_delta import gated_delta, gates, reference, step, unit_length
from manyheads.mechanism.linear.lightning import lightning_attention

B, H, N, D, DV = 2, 3, 75, 6, 5
F64 = torch.float64


def draw(generator, n=N, dtype=F64):
    """Queries, keys, values and gates."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)

    made = {"decay": -0.3 * normal(B, H, n).abs(), "beta": torch.sigmoid(normal(B, H, n))}
    return (normal(B, H, n, D), normal(B, H, n, D), normal(B, H, n, DV)), made


def close(got, want, size=1e-9):
    torch.testing.assert_close(got, want, rtol=size, atol=size)


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_steps_chunks_and_the_triangular_form_agree_with_a_state(generator, chunk):
    qkv, made = draw(generator)
    _, state = gated_delta(*draw(generator)[0], **made, return_state=True)
    out, end = gated_delta(*qkv, **made, state=state, return_state=True, chunk=chunk)
    close(out, reference(*qkv, **made, state=state))
    outs = []
    for t in range(N):
        o, state = step(*(x[:, :, t] for x in qkv), state, **{name: g[:, :, t] for name, g in made.items()})
        outs.append(o)
    close(out, torch.stack(outs, 2))
    close(end.S, state.S)


def test_beta_one_overwrites_what_stands_under_a_key():
    k = torch.eye(4, dtype=F64)[[0, 1, 2, 3, 1]].expand(1, 1, 5, 4)
    v = torch.arange(5, dtype=F64).view(1, 1, 5, 1)
    ones = torch.ones(1, 1, 5, dtype=F64)
    _, state = gated_delta(k, k, v, decay=0 * ones, beta=ones, unit=False, return_state=True)
    assert state.S.flatten().tolist() == [0.0, 4.0, 2.0, 3.0]


def test_orthonormal_keys_make_it_linear_attention(generator):
    keys, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=F64))
    k, q = keys.expand(1, 1, 8, 8), torch.randn(1, 1, 8, 8, generator=generator, dtype=F64)
    v, ones = torch.randn(1, 1, 8, 3, generator=generator, dtype=F64), torch.ones(1, 1, 8, dtype=F64)
    got = gated_delta(q, k, v, decay=0 * ones, beta=ones, unit=False, scale=1.0)
    close(got, (q @ k.mT).tril() @ v)


def test_agrees_with_two_naive_functions(generator):
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    (q, k, v), made = draw(generator, dtype=torch.float32)
    state = gated_delta(*draw(generator, dtype=torch.float32)[0], **made, return_state=True)[1]
    out, end = gated_delta(q, k, v, **made, state=state, return_state=True)
    swapped = [t.transpose(1, 2) for t in (unit_length(q), unit_length(k), v)]
    more = {"g": made["decay"].transpose(1, 2), "beta": made["beta"].transpose(1, 2), "initial_state": state.S}
    for form in (naive.naive_recurrent_gated_delta_rule, naive.naive_chunk_gated_delta_rule):
        want, last = form(*swapped, **more, output_final_state=True)
        close(out, want.transpose(1, 2), 1e-4)
        close(end.S, last, 1e-4)


def test_agrees_with_the_functions_of_a_released_model(generator):
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    (q, k, v), made = draw(generator, dtype=torch.float32)
    out, end = gated_delta(q, k, v, **made, return_state=True)
    swapped = {name: t.transpose(1, 2) for name, t in (("query", q), ("key", k), ("value", v))}
    more = {"g": made["decay"].transpose(1, 2), "beta": made["beta"].transpose(1, 2)}
    for form in (module.torch_chunk_gated_delta_rule, module.torch_recurrent_gated_delta_rule):
        plain = inspect.unwrap(form)  # without the kernels that an installed package puts in its place
        want, last = plain(**swapped, **more, output_final_state=True, use_qk_l2norm_in_kernel=True)
        close(out, want.transpose(1, 2), 1e-4)
        close(end.S, last, 1e-4)


def test_small_steps_of_the_rule_are_linear_attention(generator):
    (q, k, v), made = draw(generator)
    tiny = 1e-6 * torch.ones_like(made["beta"])
    got = gated_delta(q, k, v, decay=0 * tiny, beta=tiny, unit=False, scale=1.0) / 1e-6
    close(got, lightning_attention(q, k, v, slopes=torch.zeros(H, dtype=F64), scale=1.0), 1e-2)


def test_gates_are_log_decays_and_shares(generator):
    a, b = torch.randn(2, 4, 3, 7, generator=generator).bfloat16()
    decay, beta = gates(a, b, torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3))
    assert decay.dtype == beta.dtype == torch.float32
    close(decay[:, 1], -torch.e * F.softplus(a[:, 1].float()), 1e-5)
    close(beta, b.float().sigmoid(), 1e-6)


WRONG = {
    "decay shape": ({"decay": torch.zeros(2)}, ValueError, r"decay: expected shape \(B, H, N\), got \(2,\)"),
    "decay above 0": ({"decay": torch.ones(B, H, 4)}, ValueError, "decay: log decays are at most 0, got 1"),
    "beta range": ({"beta": torch.full((B, H, 4), 3.0)}, ValueError, r"beta: expected values in \[0, 2\]"),
    "beta missing": ({"beta": None}, TypeError, "beta: expected a floating tensor"),
    "mask": ({"mask": "full"}, UnsupportedError, "gated-delta-net does not support noncausal_self"),
    "tensor mask": ({"mask": torch.ones(4, 4, dtype=torch.bool)}, UnsupportedError, "does not support mask"),
    "backend": ({"backend": "bloked"}, ValueError, "did you mean 'blocked'"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(generator, case):
    options, error, words = case
    qkv, made = draw(generator, n=4, dtype=torch.float32)
    with pytest.raises(error, match=words):
        gated_delta(*qkv, **made | options)
