"""Captured queries, keys and values are those that the layers used, and damaged files say so."""

from __future__ import annotations

import pytest
import torch

from manyheads import attention
from manyheads.common.errors import UnsupportedError
from manyheads.integration.capture import capture, load_capture
from manyheads.integration.transformers import enable, is_enabled
from manyheads.mask import Causal, Document

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

IDS = torch.tensor([[5, 9, 12, 7, 31, 8, 2]])


def llama(implementation: str = "sdpa"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=implementation,
    )
    return transformers.LlamaForCausalLM(config).eval()


def outputs_of_attention(model, given) -> list[torch.Tensor]:
    """What enters the output projection of each layer."""
    found = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "manyheads_exact"])
def test_attention_over_the_file_gives_the_outputs_of_the_layers(tmp_path, implementation):
    model = llama()
    if implementation != "sdpa":
        enable(model)
    path = capture(model, {"input_ids": IDS}, tmp_path / "llama.safetensors")
    found = load_capture(path)
    assert [layer.module for layer in found.layers] == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert found.layers[0].k.shape == (1, 2, 7, 8)
    assert found.metadata["attention"] == implementation and found.metadata["dtype"] == "float32"
    for layer, expected in zip(found.layers, outputs_of_attention(model, {"input_ids": IDS}), strict=True):
        assert layer.causal
        out = attention(layer.q, layer.k, layer.v, mask=Causal(), scale=layer.scaling)
        torch.testing.assert_close(out.transpose(1, 2).flatten(2), expected, rtol=1e-4, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama.safetensors"]


def test_nothing_about_the_model_or_transformers_changes(tmp_path):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    model = llama()
    before = functions["sdpa"]
    capture(model, {"input_ids": IDS}, tmp_path / "a.safetensors")
    assert functions["sdpa"] is before and model.config._attn_implementation == "sdpa"
    own = lambda *given, **more: before(*given, **more)  # noqa: E731
    functions["sdpa"] = own
    try:
        capture(model, {"input_ids": IDS}, tmp_path / "a.safetensors")
        assert functions["sdpa"] is own
    finally:
        del functions["sdpa"]


def test_some_layers_a_name_and_padding(tmp_path):
    padding = torch.ones(2, 7, dtype=torch.int64)
    padding[1, 5:] = 0
    given = {"input_ids": IDS.repeat(2, 1), "attention_mask": padding}
    path = capture(llama(), given, tmp_path / "some.safetensors", layers=[2, 0], name="tiny")
    found = load_capture(path)
    assert [layer.index for layer in found.layers] == [0, 2] and found.model == "tiny"
    assert torch.equal(found.attention_mask, padding.bool()) and found.document_lengths is None


class Words:
    """A tokenizer of words, by their length."""

    def __call__(self, texts, truncation):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}


def test_several_texts_become_one_row_of_documents(tmp_path):
    model = llama()
    texts = ["one two three", "a", "some more words follow here"]
    path = capture(model, texts, tmp_path / "texts.safetensors", tokenizer=Words())
    found = load_capture(path)
    assert found.document_lengths.tolist() == [3, 1, 5] and not is_enabled(model)
    layer = found.layers[1]
    mask = Causal() & Document(found.document_lengths)
    out = attention(layer.q, layer.k, layer.v, mask=mask, scale=layer.scaling)
    parts = []
    for text in texts:
        ids = torch.tensor(Words()([text], True)["input_ids"])
        parts.append(outputs_of_attention(model, {"input_ids": ids})[1])
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), torch.cat(parts, 1), rtol=1e-4, atol=1e-5)
    single = load_capture(capture(model, texts[0], tmp_path / "one.safetensors", tokenizer=Words()))
    assert single.layers[0].q.shape[2] == 3 and single.document_lengths is None


def test_the_benchmark_reads_the_file(tmp_path):
    from manyheads.bench.workload import read_captured

    path = capture(llama(), {"input_ids": IDS}, tmp_path / "bench.safetensors", name="tiny")
    layers = read_captured(path)
    assert len(layers) == 3
    assert layers[0].source == "tiny" and layers[0].q.shape == (1, 4, 7, 8)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_files_say_so(tmp_path, keep):
    path = capture(llama(), {"input_ids": IDS}, tmp_path / "whole.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:keep])
    with pytest.raises(ValueError, match="whole.safetensors is truncated, damaged or no safetensors file"):
        load_capture(path)


def test_other_files_say_so(tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"x": torch.ones(2)}, str(other))
    with pytest.raises(ValueError, match="was not written by manyheads capture"):
        load_capture(other)
    save_file({"x": torch.ones(2)}, str(other), metadata={"format": "manyheads capture 1", "layers": '[{"index": 0}]'})
    with pytest.raises(ValueError, match="lacks what its metadata announces"):
        load_capture(other)
    with pytest.raises(ValueError, match="there is no file"):
        load_capture(tmp_path / "absent")


def test_bad_input_is_named_and_leaves_nothing_behind(tmp_path):
    given = {"input_ids": IDS}
    with pytest.raises(ValueError, match="path: cannot write"):
        capture(llama(), given, tmp_path / "no" / "folder.safetensors")
    with pytest.raises(ValueError, match="path: cannot write"):
        capture(llama(), given, tmp_path)
    with pytest.raises(ValueError, match="the model has 3 attention calls, there is no number 3"):
        capture(llama(), given, tmp_path / "a", layers=[1, 3])
    with pytest.raises(ValueError, match="tokenizer: needed"):
        capture(llama(), "text", tmp_path / "a")
    with pytest.raises(ValueError, match="inputs: expected arguments"):
        capture(llama(), [], tmp_path / "a", tokenizer=Words())
    with pytest.raises(UnsupportedError, match="eager attention cannot be listened to"):
        capture(llama("eager"), given, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
