"""RAT: its limits are a recurrence and attention; it decodes, packs and differentiates."""

from __future__ import annotations

import pytest
import torch

from manyheads import Causal, Document, attention
from manyheads.common.errors import UnsupportedError
from manyheads.common.rope import RoPE
from manyheads.engine.merge import merge
from manyheads.mechanism.linear.chunks import cut
from manyheads.mechanism.linear.rat import RATState, rat, reference, step
from manyheads.nn import RAT

B, H, N, D = 2, 3, 29, 6
F64 = torch.float64


def close(got, want, size=1e-9):
    torch.testing.assert_close(got, want, rtol=size, atol=size)


def draw(generator, n=N, dtype=F64, b=B):
    """Queries, keys, values and gates."""
    q, k, v, g = (torch.randn(b, H, n, D, generator=generator, dtype=F64) for _ in range(4))
    return (q.to(dtype), k.to(dtype), v.to(dtype)), g.sigmoid().to(dtype)


@pytest.mark.parametrize("chunk", [N, N + 4])
def test_one_chunk_is_the_pure_recurrence(generator, chunk):
    (q, k, v), forget = draw(generator)
    past, outs = torch.zeros(B, H, D, dtype=F64), []
    for t in range(N):
        past = forget[:, :, t] * past + (1 - forget[:, :, t]) * v[:, :, t]
        outs.append(past)
    close(rat(q, k, v, forget=forget, chunk=chunk, rope=RoPE()), torch.stack(outs, 2))


def test_one_chunk_of_the_layer_is_a_gated_recurrence(generator):
    layer = RAT(12, 2, chunk=64).double()
    x = torch.randn(2, 20, 12, generator=generator, dtype=F64)
    z, v, gamma, _ = layer.in_proj(x).split([12, 12, 12, 24], -1)
    forget, past, outs = torch.sigmoid(gamma + layer.gate_bias), torch.zeros(2, 12, dtype=F64), []
    for t in range(20):
        past = forget[:, t] * past + (1 - forget[:, t]) * v[:, t]
        outs.append(past)
    close(layer(x), layer.out_proj(z.sigmoid() * torch.stack(outs, 1)))


def test_chunks_of_one_token_without_memory_are_causal_attention(generator):
    (q, k, v), _ = draw(generator)
    rope, at = RoPE(), torch.arange(N)
    got = rat(q, k, v, forget=torch.zeros_like(k), chunk=1, rope=rope)
    close(got, attention(rope(q, at), rope(k, at), v, mask="causal"))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_share_queries_and_keys_in_turn(generator, groups):
    layer = RAT(16, 4, chunk=1, groups=groups, rope=None).double()
    torch.nn.init.constant_(layer.gate_bias, -100.0)
    x = torch.randn(1, 9, 16, generator=generator, dtype=F64)
    z, v, _, q, k = layer.in_proj(x).split([16, 16, 16, 4 * groups, 4 * groups], -1)
    q, k = (t.unflatten(-1, (groups, 4))[:, :, [h % groups for h in range(4)]].transpose(1, 2) for t in (q, k))
    out = attention(q, k, v.unflatten(-1, (4, 4)).transpose(1, 2), mask="causal")
    close(layer(x), layer.out_proj(z.sigmoid() * out.transpose(1, 2).flatten(-2)))


@pytest.mark.parametrize("chunk", [1, 4, 29, 40])
@pytest.mark.parametrize("rope", [None, RoPE()], ids=["plain", "rotated"])
def test_steps_equal_one_call(generator, chunk, rope):
    qkv, forget = draw(generator)
    options = {"chunk": chunk, "rope": rope}
    whole, end = rat(*qkv, forget=forget, **options, return_state=True)
    close(whole, reference(*qkv, forget=forget, **options))
    state, outs = None, []
    for t in range(N):
        out, state = step(*(x[:, :, t] for x in qkv), state, forget=forget[:, :, t], **options)
        outs.append(out)
    close(torch.stack(outs, 2), whole)
    assert state.tokens == end.tokens == N
    for a, b in zip(state[:4], end[:4], strict=True):
        close(a, b)


def test_a_chunk_that_is_never_full_costs_no_more_than_its_tokens(generator):
    qkv, forget = draw(generator)
    once = rat(*qkv, forget=forget, chunk=10**9)
    state, outs = None, []
    for part in (slice(0, 11), slice(11, 12), slice(12, N)):
        out, state = rat(*(t[:, :, part] for t in qkv), forget=forget[:, :, part], chunk=10**9, state=state,
                         return_state=True)  # fmt: skip
        outs.append(out)
    close(torch.cat(outs, 2), once)
    assert state.keys.shape[2] == 0 and state.tokens == N


def test_a_cache_holds_one_entry_for_each_chunk(generator):
    qkv, forget = draw(generator)
    _, state = rat(*qkv, forget=forget, chunk=8, return_state=True)
    assert state.keys.shape == state.values.shape == (B, H, N // 8, D) and state.k.shape == (B, H, D)


@pytest.mark.parametrize("split", [3, 8, 13])
def test_a_state_enters_the_first_document(generator, split):
    qkv, forget = draw(generator, b=1)
    options = {"chunk": 4, "rope": RoPE()}
    _, state = rat(*(t[:, :, :split] for t in qkv), forget=forget[:, :, :split], **options, return_state=True)
    rest = [t[:, :, split:] for t in (*qkv, forget)]
    lens = [5, 0, N - split - 5]
    packed, end = rat(
        *rest[:3], forget=rest[3], mask=Document(lens) & Causal(), state=state, **options, return_state=True
    )
    first = rat(*(t[:, :, :5] for t in rest[:3]), forget=rest[3][:, :, :5], state=state, **options)
    second, last = rat(*(t[:, :, 5:] for t in rest[:3]), forget=rest[3][:, :, 5:], **options, return_state=True)
    close(packed, torch.cat([first, second], 2))
    assert end.tokens == last.tokens
    for a, b in zip(end[:4], last[:4], strict=True):
        close(a, b)


def test_a_state_leaves_the_document_that_it_entered(generator):
    qkv, forget = draw(generator, b=1)
    _, state = rat(*qkv, forget=forget, chunk=4, return_state=True)
    plain = rat(*qkv, forget=forget, chunk=4, state=state, return_state=True)
    packed = rat(*qkv, forget=forget, chunk=4, state=state, return_state=True, mask=Document([N, 0]) & Causal())
    close(plain[0], packed[0])
    assert plain[1].tokens == packed[1].tokens == 2 * N
    for a, b in zip(plain[1][:4], packed[1][:4], strict=True):
        close(a, b)


def test_documents_may_differ_between_batch_entries(generator):
    qkv, forget = draw(generator)
    lens = [[10, 19], [25, 4]]
    packed = rat(*qkv, forget=forget, chunk=4, rope=RoPE(), mask=Document(lens) & Causal())
    for row, (n, _) in enumerate(lens):
        for part in (slice(0, n), slice(n, N)):
            alone = rat(*(t[row : row + 1, :, part] for t in qkv), forget=forget[row : row + 1, :, part], chunk=4,
                        rope=RoPE())  # fmt: skip
            close(packed[row : row + 1, :, part], alone)


def test_compiled_documents_give_the_same(generator):
    qkv, forget = draw(generator, b=1)

    def run(q, k, v, g, mask):
        return rat(q, k, v, forget=g, chunk=4, rope=RoPE(), mask=mask)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for lens in ([10, 19], [1, 28]):
        mask = Document(lens) & Causal()
        close(compiled(*qkv, forget, mask), run(*qkv, forget, mask))


def test_merging_the_own_entry_passes_gradcheck(generator):
    out, own = (torch.randn(2, 5, 3, generator=generator, dtype=F64, requires_grad=True) for _ in range(2))
    lse, score = (torch.randn(2, 5, generator=generator, dtype=F64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *t: tuple(merge((t[0], t[1]), (t[2], t[3]))), [out, lse, own, score])


def test_parameters_add_up_to_the_published_model():
    with torch.device("meta"):
        layer = RAT(2048, 16, groups=2, chunk=16, whole=True)
    count = sum(p.numel() for p in layer.parameters())
    assert count == 2048 * (3 * 2048 + 2 * 2 * 128) + 2048**2 + 2 * 2048 == 17_829_888
    ffn, norm, embedding = 8 * 2048**2, 2048, 32_000 * 2048
    assert 24 * (count + ffn + norm) + 2 * embedding + 2048 == 1_364_346_880


def test_chunks_put_every_token_into_one_slot():
    chunks = cut(12, 4, torch.tensor([[5, 7], [12, 0]]), offset=0)
    x = torch.arange(12.0).expand(2, 1, 12)
    assert torch.equal(chunks.join(chunks.split(x, -1.0)), x)
    assert chunks.split(x, -1.0)[0, 0].tolist() == [[0, 1, 2, 3], [4, -1, -1, -1], [5, 6, 7, 8], [9, 10, 11, -1]]
    assert chunks.rank.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]  # the last chunk of the second row is empty
    assert torch.equal(chunks.empty, chunks.split(x, -1.0)[:, 0] == -1)
    shifted = cut(5, 4, None, offset=3)
    assert shifted.split(x[:, :, :5], -1.0)[0, 0].tolist() == [[-1, -1, -1, 0], [1, 2, 3, 4]]
    assert torch.equal(shifted.empty[0], shifted.split(x[:, :, :5], -1.0)[0, 0] == -1)


STATE = RATState(torch.zeros(B, H, D), torch.zeros(B, H, D), torch.zeros(B, H, 1, D), torch.zeros(B, H, 1, D), 9)
WRONG = {
    "gate range": ({"forget": torch.full((B, H, 4, D), 1.5)}, ValueError, r"forget: expected gates in \[0, 1\]"),
    "gate shape": ({"forget": torch.ones(B, H, 4)}, ValueError, "forget: expected the shape of k"),
    "gate missing": ({"forget": None}, TypeError, "forget: expected a floating tensor"),
    "chunk": ({"chunk": 0}, ValueError, "chunk: expected a positive number of tokens, got 0"),
    "mask": ({"mask": "window(2)"}, UnsupportedError, "rat does not support mask"),
    "state": ({"state": (1, 2)}, TypeError, "state: expected a RATState, got tuple"),
    "state of other chunks": ({"state": STATE, "chunk": 4}, ValueError, "after 9 tokens in chunks of 4"),
    "state of another shape": ({"state": STATE._replace(v=torch.zeros(1)), "chunk": 8}, ValueError, "state: v must"),
    "backend": ({"backend": "bloked"}, ValueError, "did you mean 'blocked'"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_input_is_named(generator, case):
    options, error, words = case
    qkv, forget = draw(generator, n=4, dtype=torch.float32)
    with pytest.raises(error, match=words):
        rat(*qkv, **{"forget": forget} | options)


def test_states_of_documents_that_differ_are_refused(generator):
    qkv, forget = draw(generator)
    with pytest.raises(UnsupportedError, match="documents that differ between batch entries"):
        rat(*qkv, forget=forget, mask=Document([[10, 19], [25, 4]]) & Causal(), return_state=True)
