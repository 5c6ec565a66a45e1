"""Packed rows compute what the sequences compute alone, and come apart again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from manyheads.method.packing import PackedBatch, Packing, collate, greedy, spfhp

VOCABULARY, WIDTH, HEADS, CAPACITY = 31, 12, 3, 24
LENGTHS = (7, 24, 1, 5, 11, 2, 9, 3, 13, 6)


class Encoder(nn.Module):
    """Two layers of a post-norm encoder with learned positions, and a head that predicts tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CAPACITY, WIDTH)
        self.project = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.feed = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)) for _ in "ab")
        self.norm = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, positions: Tensor, attend) -> tuple[Tensor, Tensor]:
        x = self.tokens(ids) + self.positions(positions)
        for layer in range(2):
            q, k, v = self.project[layer](x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            x = self.norm[2 * layer](x + self.mix[layer](attend(q, k, v).transpose(1, 2).flatten(2)))
            x = self.norm[2 * layer + 1](x + self.feed[layer](x))
        return x, self.head(x)


def attend_with(form: str, batch: PackedBatch):
    if form == "dense":
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=batch.dense())
    import manyheads as mh

    return lambda q, k, v: mh.attention(q, k, v, mask=batch.mask())


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(5)
    return Encoder().double()


@pytest.fixture
def data() -> tuple[list[list[int]], list[list[int]]]:
    draw = np.random.default_rng(11)
    tokens = [draw.integers(1, VOCABULARY, n).tolist() for n in LENGTHS]
    labels = [np.where(draw.random(n) < 0.4, draw.integers(1, VOCABULARY, n), -100).tolist() for n in LENGTHS]
    return tokens, labels


def alone(encoder: Encoder, tokens: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
    full = lambda q, k, v: scaled_dot_product_attention(q, k, v)  # noqa: E731
    found = []
    for sequence in tokens:
        hidden, logits = encoder(torch.tensor([sequence]), torch.arange(len(sequence))[None], full)
        found.append((hidden[0], logits[0]))
    return found


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    losses = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape)


def gradients(encoder: Encoder, loss: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters()}


@pytest.mark.parametrize("end_to_end", [False, True])
@pytest.mark.parametrize("form", ["dense", "document"])
def test_packed_outputs_and_gradients_equal_unpacked(encoder, data, form, end_to_end):
    tokens, labels = data
    batch = collate(tokens, spfhp(LENGTHS, CAPACITY), end_to_end=end_to_end)
    hidden, logits = encoder(batch.input_ids, batch.position_ids, attend_with(form, batch))
    single = alone(encoder, tokens)
    for index, packed in zip(batch.sequences.tolist(), batch.unpack(hidden), strict=True):
        torch.testing.assert_close(packed, single[index][0], rtol=1e-12, atol=1e-12)

    laid = batch.lay(labels, -100)
    loss = batch.loss(token_losses(logits, laid), laid != -100)
    means = [
        cross_entropy(logit, torch.tensor(label))
        for (_, logit), label in zip(single, labels, strict=True)
        if any(value != -100 for value in label)
    ]
    unpacked = torch.stack(means).mean()
    torch.testing.assert_close(loss, unpacked, rtol=1e-12, atol=1e-12)
    ours, theirs = gradients(encoder, loss), gradients(encoder, unpacked)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("form", ["dense", "document"])
def test_order_inside_a_pack_changes_nothing(encoder, data, form):
    tokens, labels = data
    packing = spfhp(LENGTHS, CAPACITY)
    draw = np.random.default_rng(0)
    turned = Packing(tuple(tuple(draw.permutation(row).tolist()) for row in packing.packs), LENGTHS, CAPACITY)
    assert turned.packs != packing.packs
    outputs, losses = [], []
    for chosen in (packing, turned):
        batch = collate(tokens, chosen)
        hidden, logits = encoder(batch.input_ids, batch.position_ids, attend_with(form, batch))
        found = dict(zip(batch.sequences.tolist(), batch.unpack(hidden), strict=True))
        outputs.append(torch.cat([found[index] for index in range(len(tokens))]))
        laid = batch.lay(labels, -100)
        losses.append(batch.loss(token_losses(logits, laid), laid != -100))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)


def test_rows_hold_the_tokens_their_positions_and_their_owners(data):
    tokens, _ = data
    batch = collate(tokens, spfhp(LENGTHS, CAPACITY))
    for row in range(len(batch.input_ids)):
        for place in range(CAPACITY):
            owner, position = int(batch.sequence_ids[row, place]), int(batch.position_ids[row, place])
            assert int(batch.input_ids[row, place]) == (tokens[owner][position] if owner >= 0 else 0)
    assert (batch.document_lengths.sum(1) == CAPACITY).all()
    assert batch.waste == pytest.approx(1 - sum(LENGTHS) / batch.input_ids.numel())


@pytest.mark.parametrize("end_to_end", [False, True])
def test_the_three_forms_of_the_mask_agree(data, end_to_end):
    tokens, _ = data
    batch = collate(tokens, greedy(LENGTHS, CAPACITY), end_to_end=end_to_end)
    rows, size = batch.input_ids.shape
    assert torch.equal(batch.mask().dense(size), batch.dense())
    assert batch.cu_seqlens().dtype == torch.int32
    starts = batch.cu_seqlens().long()
    flat = torch.searchsorted(starts, torch.arange(rows * size), right=True).view(rows, size)
    assert torch.equal(flat[:, None, :, None] == flat[:, None, None, :], batch.dense())
    assert int(starts[-1]) == rows * size


def test_end_to_end_wastes_nothing(data):
    tokens, _ = data
    batch = collate(tokens, spfhp(LENGTHS, CAPACITY), rows=[0, 2], end_to_end=True)
    assert batch.waste == 0.0
    assert batch.input_ids.shape == (1, int(batch.lengths.sum()))
    assert (batch.position_ids[0, batch.starts] == 0).all()


def test_results_per_sequence_are_gathered_from_where_they_are(data):
    tokens, _ = data
    batch = collate(tokens, spfhp(LENGTHS, CAPACITY))
    outputs = torch.randn(*batch.input_ids.shape, 4, dtype=torch.float64)
    parts = batch.unpack(outputs)
    assert torch.equal(batch.first(outputs), torch.stack([part[0] for part in parts]))
    torch.testing.assert_close(batch.mean(outputs), torch.stack([part.mean(0) for part in parts]))
    weights = torch.rand(batch.input_ids.shape, dtype=torch.float64)
    expected = [(p * w[:, None]).sum(0) / w.sum() for p, w in zip(parts, batch.unpack(weights), strict=True)]
    torch.testing.assert_close(batch.mean(outputs, weights), torch.stack(expected))
    assert batch.mean(outputs.bfloat16()).dtype == torch.float32


def test_losses_average_over_sequences_or_over_tokens(data):
    tokens, _ = data
    batch = collate(tokens, greedy(LENGTHS, CAPACITY))
    losses = torch.rand(batch.input_ids.shape, dtype=torch.float64)
    parts = batch.unpack(losses)
    torch.testing.assert_close(batch.loss(losses), torch.stack([p.mean() for p in parts]).mean())
    torch.testing.assert_close(batch.loss(losses, over="tokens"), torch.cat(parts).mean())
    assert batch.loss(losses, torch.zeros_like(losses)) == 0.0


def test_a_batch_without_rows():
    batch = collate([[1, 2]], greedy([2], 4), rows=[])
    assert batch.input_ids.shape == (0, 4) and batch.unpack(torch.zeros(0, 4, 3)) == []


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, b: collate(t[:1] * len(t), spfhp(LENGTHS, CAPACITY)), "expected 24 values, got shape"),
        (lambda t, b: collate(t, spfhp(LENGTHS, CAPACITY), rows=[99]), "rows: expected 0 to"),
        (lambda t, b: b.unpack(torch.zeros(1, 3)), "outputs: expected"),
        (lambda t, b: b.loss(torch.zeros(b.input_ids.shape), over="rows"), "over: expected"),
    ],
)
def test_bad_input_is_named(data, call, words):
    with pytest.raises(ValueError, match=words):
        call(data[0], collate(data[0], spfhp(LENGTHS, CAPACITY)))
