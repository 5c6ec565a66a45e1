"""Models of transformers compute the same with their attention replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.common.errors import UnsupportedError
from manyheads.integration.transformers import disable, documents, enable, is_enabled, register

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
DECODERS = {
    "Llama": {},
    "Mistral": {"sliding_window": 3},
    "Qwen3": {"use_sliding_window": True, "max_window_layers": 1, **MIXED},
    "Gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, **MIXED},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1, **MIXED},
}
ENCODER = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
}


def decoder(name: str, implementation: str = "eager", **more) -> nn.Module:
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **DECODERS[name], **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for module in model.modules():
        if hasattr(module, "sinks"):
            nn.init.normal_(module.sinks)
    return (model if implementation == "eager" else model.double()).eval()


def encoder(implementation: str = "sdpa") -> nn.Module:
    torch.manual_seed(4)
    config = transformers.BertConfig(**ENCODER, attn_implementation=implementation)
    return transformers.BertModel(config).double().eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(9))


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_give_the_same_logits(name):
    model, ids = decoder(name), tokens(2, 11)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    with torch.no_grad():
        expected = [model(ids).logits, model(ids, attention_mask=padding).logits]
        enable(model)
        actual = [model(ids).logits, model(ids, attention_mask=padding).logits]
    same(actual[0], expected[0])
    same(actual[1][padding.bool()], expected[1][padding.bool()])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate_the_same_tokens(name, cache):
    model, ids = decoder(name), tokens(2, 6)
    padding = torch.ones_like(ids)
    padding[1, :2] = 0
    options = {
        "attention_mask": padding,
        "max_new_tokens": 7,
        "do_sample": False,
        "cache_implementation": None if cache == "dynamic" else "static",
        "disable_compile": True,
    }
    expected = model.generate(ids, **options)
    assert torch.equal(enable(model).generate(ids, **options), expected)


@pytest.mark.parametrize("name", ["Llama", "GptOss", "Gemma2"])
def test_gradients_are_the_same(name):
    model, ids = decoder(name), tokens(2, 9)
    gradients = []
    for prepare in (lambda m: m, enable):
        model.zero_grad()
        prepare(model)(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-3, atol=1e-5, msg=key)


def test_gradient_checkpointing_sees_the_same_mask():
    model, ids = decoder("Qwen3"), tokens(1, 9)
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            enable(model).gradient_checkpointing_enable(options)
        model.train().zero_grad()
        with documents([4, 5]) if options is not None else documents([9]):
            places = torch.cat([torch.arange(4), torch.arange(5)])[None]
            model(ids, position_ids=places, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradients[2], gradients[1], rtol=1e-5, atol=1e-7)


def test_masks_of_the_user_are_honoured():
    model, ids = decoder("Llama", "sdpa"), tokens(2, 8)
    allowed = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed |= torch.eye(8, dtype=torch.bool)
    additive = torch.randn(2, 1, 8, 8, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    with torch.no_grad():
        expected = [model(ids, attention_mask=mask).logits for mask in (allowed, additive)]
        enable(model)
        actual = [model(ids, attention_mask=mask).logits for mask in (allowed, additive)]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_continuing_from_a_cache_equals_one_pass():
    model, ids = enable(decoder("Qwen3")), tokens(1, 10)
    with torch.no_grad():
        whole = model(ids).logits
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 9), (9, 10))]
    same(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_packed_decoders_keep_documents_apart(name):
    model, lengths = enable(decoder(name)), (5, 1, 7)
    ids = [tokens(1, 13)[:, a:b] for a, b in ((0, 5), (5, 6), (6, 13))]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    row = torch.cat(ids, 1)
    with torch.inference_mode():
        alone = torch.cat([model(each).logits for each in ids], 1)
        detected = model(row, position_ids=places, use_cache=False).logits
        with documents(lengths):
            announced = model(row, position_ids=places).logits
    same(detected, alone)
    same(announced, alone)


def test_packed_encoders_keep_documents_apart_and_train_the_same():
    model, lengths = encoder(), (5, 1, 7)
    ids = [tokens(1, 13)[:, a:b] for a, b in ((0, 5), (5, 6), (6, 13))]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([model(each).last_hidden_state for each in ids], 1)
    alone.square().mean().backward()
    expected = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    starts = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    enable(model)
    with documents(lengths):
        announced = model(torch.cat(ids, 1), position_ids=places).last_hidden_state
    passed = model(torch.cat(ids, 1), position_ids=places, cu_seq_lens_q=starts, cu_seq_lens_k=starts).last_hidden_state
    torch.testing.assert_close(announced, alone, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(passed, alone, rtol=1e-9, atol=1e-11)
    model.zero_grad()
    announced.square().mean().backward()
    for key, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[key].grad, gradient, rtol=1e-8, atol=1e-12, msg=key)


def test_packed_rows_of_different_documents():
    model = enable(encoder())
    lengths, ids = torch.tensor([[4, 3, 2], [2, 7, 0]]), tokens(2, 9)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5, 6]])
    with torch.no_grad(), documents(lengths):
        packed = model(ids, position_ids=places).last_hidden_state
    with torch.no_grad():
        for row in range(2):
            parts = [p for p in ids[row].split(lengths[row].tolist()) if len(p)]
            alone = torch.cat([model(p[None]).last_hidden_state[0] for p in parts])
            torch.testing.assert_close(packed[row], alone, rtol=1e-9, atol=1e-11)


def test_padded_encoders_ignore_what_padding_holds():
    model, ids = encoder(), tokens(2, 9)
    padding = torch.ones_like(ids)
    padding[1, 5:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=padding).last_hidden_state
        actual = enable(model)(ids, attention_mask=padding).last_hidden_state
    real = padding.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-9, atol=1e-11)


def test_layers_without_masks_say_themselves_whether_they_are_causal():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20, image_size=8, patch_size=4
    )
    model = transformers.ViTModel(config).eval()
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        actual = enable(model)(pixels).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_values_of_another_width():
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4, "head_dim": 8},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=4,
        v_head_dim=6,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        first_k_dense_replace=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()
    with torch.no_grad():
        expected = model(tokens(1, 9)).logits
        actual = enable(model)(tokens(1, 9)).logits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_cross_attention_sees_all_of_the_other_side():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=60,
        d_model=24,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_position_embeddings=32,
    )
    model = transformers.BartModel(config).double().eval()
    padding = torch.ones(2, 9, dtype=torch.int64)
    padding[0, 6:] = 0
    given = {"input_ids": tokens(2, 9), "attention_mask": padding, "decoder_input_ids": tokens(2, 5)}
    with torch.no_grad():
        expected = model(**given).last_hidden_state
        actual = enable(model)(**given).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_dropout_in_training_is_applied_and_averages_out():
    model, ids = enable(encoder()), tokens(1, 6)
    layer = model.encoder.layer[0].attention.self
    hidden = torch.randn(1, 6, 24, dtype=torch.float64)
    with torch.no_grad():
        exact = layer(hidden)[0]
        layer.train()
        draws = torch.stack([layer(hidden)[0] for _ in range(600)])
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - exact).abs().max() < 0.25 * draws.std(0).max()
    assert ids.shape == (1, 6)


def test_disable_restores_every_part_of_a_model():
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config={"model_type": "llama", **SMALL},
        attn_implementation={"text_config": "eager", "vision_config": "sdpa"},
    )
    model = transformers.LlavaForConditionalGeneration(config)
    parts = [model.config, model.config.text_config, model.config.vision_config]
    before = [part._attn_implementation for part in parts]
    assert before[1:] == ["eager", "sdpa"]
    assert enable(enable(model)) is model and is_enabled(model)
    assert parts[1]._attn_implementation == parts[2]._attn_implementation == "manyheads_exact"
    assert disable(model) is model and not is_enabled(model)
    assert [part._attn_implementation for part in parts] == before
    disable(model)


def test_names_serve_transformers_own_argument():
    name = register("exact")
    model = transformers.BertModel(transformers.BertConfig(**ENCODER, attn_implementation=name)).eval()
    assert is_enabled(model) and "flash" not in name and "/" not in name
    assert model(tokens(1, 5)).last_hidden_state.shape == (1, 5, 24)


def test_what_cannot_be_honoured_is_refused():
    ids = tokens(1, 5)
    with pytest.raises(ValueError, match="did you mean 'exact'"):
        enable(encoder(), "exakt")
    with pytest.raises(TypeError, match="model: expected a model of transformers, got Linear"):
        enable(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="output_attentions"):
        enable(encoder())(ids, output_attentions=True)
    with pytest.raises(UnsupportedError, match="config asks for attention weights"):
        model = encoder("eager")
        model.config.output_attentions = True
        enable(model)
    with pytest.raises(ValueError, match="document is for 4"), documents([3, 1]):
        enable(encoder())(ids)
    with pytest.raises(UnsupportedError, match="paged caches"):
        attend = transformers.AttentionInterface()[register()]
        attend(nn.Identity(), *[torch.ones(1, 1, 2, 4)] * 3, None, cache=object())
    with pytest.raises(UnsupportedError, match="sliding_window"):
        attend(nn.Identity(), *[torch.ones(1, 1, 2, 4)] * 3, None, is_causal=False, sliding_window=2)
