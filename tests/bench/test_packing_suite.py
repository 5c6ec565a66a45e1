"""The packing suite runs a real encoder on real documents, and says when it cannot."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from manyheads.bench.suite import Options, load
from manyheads.bench.suites import packing
from manyheads.bench.suites.packing import SUITE, encoder_case, padded, padding_share, real_documents
from manyheads.integration.encoder import BUNDLED

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec(BUNDLED.replace("-", "_")) is None or importlib.util.find_spec("transformers") is None,
    reason=f"needs {BUNDLED} and transformers",
)


class Quiet:
    """A context that shows nothing."""

    def __init__(self, **options):
        self.options = Options(level="quick", **options)

    def say(self, text):
        pass


def test_documents_are_real_mixed_and_always_the_same():
    texts = real_documents(512)
    assert texts == real_documents(512) and len(set(texts)) == 512
    assert texts[:40] == real_documents(40)
    assert real_documents(40, seed=1) != texts[:40]
    words = sorted(len(text.split()) for text in texts)
    assert words[0] < 12 and words[-1] > 300
    with pytest.raises(ValueError, match="documents: the standard library has"):
        real_documents(10**6)


@needs_encoder
def test_documents_have_about_seventy_tokens_and_at_most_512(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from manyheads.integration import encoder

    _, tokenizer = encoder.load()
    lengths = [len(ids) for ids in tokenizer(real_documents(512), truncation=True, max_length=512)["input_ids"]]
    assert 55 < sum(lengths) / 512 < 85 and max(lengths) == 512


@needs_encoder
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_sides_embed_alike(monkeypatch, dtype):
    monkeypatch.setitem(packing.ROUNDS, "quick", 1)
    monkeypatch.setattr(packing, "TOKENS", 256)
    case = encoder_case(dtype, Options(level="quick"), documents=12, seed=3)
    rows = case.run(Quiet())
    assert [row.provider for row in rows] == list(packing.PROVIDERS)
    assert all(row.status == "measured" and row.gate == "green" and row.agreement > 0.9999 for row in rows)
    assert all(row.rate > 0 and row.rate_unit == "sentences/s" and row.dtype == dtype for row in rows)
    waste = {row.provider: row.waste for row in rows}
    assert waste["padded"] >= waste["sorted"] > waste["packed-spfhp"] == waste["packed-nnlshp"] == 0.0
    assert rows[0].ratio is None and all(row.ratio for row in rows[1:])


def test_a_missing_encoder_is_a_refused_row(monkeypatch):
    from manyheads.integration import encoder

    monkeypatch.setattr(encoder, "BUNDLED", "no-such-package")
    monkeypatch.setattr(encoder.load, "__defaults__", ("no-such-package",))
    rows = encoder_case("float32", Options(), documents=4).run(Quiet())
    assert {row.status for row in rows} == {"refused"}
    assert "pip install no-such-package" in rows[0].reason


def test_only_chosen_providers_are_run_besides_the_baseline():
    options = Options(providers=("packed-spfhp",))
    assert encoder_case("float32", options).providers == ("packed-spfhp",)
    assert [case.name for case in SUITE.cases(Options(level="quick", dtypes=("bfloat16",)))] == ["encoder-64-bfloat16"]
    assert load("packing") is SUITE


def test_padding_is_counted_batch_by_batch():
    lengths = [1] * 32 + [5] * 32 + [9]
    assert padding_share(lengths, by_length=False) == 0.0
    mixed = [1, 9] * 16
    assert padding_share(mixed, by_length=False) == pytest.approx(1 - 160 / (9 * 32))


def test_padded_batches_average_real_tokens_only():
    class Model:
        def __call__(self, input_ids, attention_mask):
            return type("Out", (), {"last_hidden_state": torch.stack([input_ids, 1 + 0 * input_ids], -1).float()})

    tokens = [torch.full((n,), n) for n in (3, 1, 2)]
    expected = torch.nn.functional.normalize(torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 1.0]]), dim=-1)
    for by_length in (False, True):
        torch.testing.assert_close(padded(Model(), tokens, by_length=by_length), expected)
