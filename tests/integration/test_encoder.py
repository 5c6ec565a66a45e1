"""Sentence encoders on packed documents embed as they do on each document alone."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from manyheads.integration.encoder import BUNDLED, encode_packed, first_position, load
from manyheads.integration.transformers import enable
from manyheads.method.packing import ALGORITHMS, Packing, pack

transformers = pytest.importorskip("transformers")

LENGTHS = (7, 20, 3, 11, 5, 16, 4, 9)
SHAPE = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 24,
}


def encoder(family: str = "Bert"):
    torch.manual_seed(4)
    config = getattr(transformers, f"{family}Config")(**SHAPE, attn_implementation="sdpa")
    return getattr(transformers, f"{family}Model")(config).double().eval()


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 60, (n,), generator=generator) for n in LENGTHS]


def alone(model, pool: str) -> torch.Tensor:
    found = []
    with torch.no_grad():
        for each in sequences():
            hidden = model(each[None], attention_mask=torch.ones(1, len(each))).last_hidden_state[0]
            found.append(hidden.mean(0) if pool == "mean" else hidden[0])
    return torch.stack(found)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "Ernie"])
@pytest.mark.parametrize("pool", ["mean", "first"])
def test_embeddings_are_those_of_each_document_alone(family, pool):
    model = encoder(family)
    assert first_position(model) == (2 if family == "Roberta" else 0)
    expected = alone(model, pool)
    enable(model)
    for algorithm in ALGORITHMS:
        for tokens in (1, 40, 10_000):
            found = encode_packed(model, sequences(), packing=algorithm, tokens=tokens, pool=pool, normalize=False)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    found = encode_packed(model, sequences(), pool=pool)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=1e-9, atol=1e-11)


def test_longer_rows_than_documents_and_lists_of_ids():
    model = encoder()
    expected = alone(model, "mean")
    packing = pack(LENGTHS, 50)
    found = encode_packed(enable(model), [each.tolist() for each in sequences()], packing=packing, normalize=False)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_training_after_encoding_with_the_same_mask():
    model = enable(encoder())
    encode_packed(model, sequences())
    from manyheads.integration.transformers import documents

    row = torch.cat(sequences())[None]
    places = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    with documents(LENGTHS):
        with torch.inference_mode():
            model(row, position_ids=places)
        model(row, position_ids=places).last_hidden_state.sum().backward()
    assert model.embeddings.word_embeddings.weight.grad is not None


def test_no_documents():
    assert encode_packed(enable(encoder()), []).shape == (0, 24)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": "max"}, "pool: expected"),
        ({"packing": "spfph"}, "did you mean 'spfhp'"),
        ({"packing": Packing(((0,),), (7,), 24)}, "packing: made for sequences of other lengths"),
    ],
)
def test_bad_input_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        encode_packed(enable(encoder()), sequences(), **options)


def test_models_that_would_mix_documents_are_refused():
    with pytest.raises(ValueError, match="call manyheads.integration.transformers.enable"):
        encode_packed(encoder(), sequences())
    with pytest.raises(ValueError, match="24 positions, the longest document has 25"):
        encode_packed(enable(encoder()), [torch.ones(25, dtype=torch.int64)])


@pytest.mark.skipif(importlib.util.find_spec(BUNDLED.replace("-", "_")) is None, reason=f"needs {BUNDLED}")
def test_the_real_encoder_embeds_sentences_as_its_authors_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, tokenizer = load()
    texts = ["A man is eating food.", "Someone eats a meal.", "The sky above the port was grey.", "Hm?"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
    found = encode_packed(enable(model), tokenizer(texts)["input_ids"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    likeness = found @ found.T
    assert likeness[0, 1] > 0.6 > 0.2 > likeness[0, 2]
