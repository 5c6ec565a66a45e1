"""Configs are read as transformers reads them, from the file alone."""

from __future__ import annotations

import json

import pytest

from manyheads.bench.planning.architecture import interpret, read
from manyheads.mask import Causal, Full, Window, as_mask, chunked

SMALL = {"num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 6}
LLAMA = {**SMALL, "model_type": "llama"}


def kinds(config):
    """How many layers of each kind."""
    return {group.kind: group.count for group in interpret(config).groups}


@pytest.mark.parametrize(
    "name",
    [
        "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gpt_oss",
        "phi", "phi3", "phimoe", "cohere2", "olmo3", "starcoder2", "granite", "smollm3", "gpt2", "gpt_neo", "gpt_neox",
        "opt", "bloom", "falcon", "mpt", "bert", "roberta", "distilbert", "electra", "modernbert", "vit", "dinov2",
        "deepseek_v3", "qwen3_next", "minimax", "lfm2",
    ],
)  # fmt: skip
def test_what_transformers_writes_is_read_as_transformers_means_it(name):
    mapping = pytest.importorskip("transformers").CONFIG_MAPPING
    if name not in mapping:
        pytest.skip(f"this transformers has no {name}")
    config = mapping[name]()
    found = interpret(json.loads(config.to_json_string(use_diff=False)))
    assert found.heads == config.num_attention_heads
    assert found.layers + found.other_layers == config.num_hidden_layers
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert found.kv_heads == (1 if name == "falcon" else kv_heads)
    if not found.latent:
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert found.width == found.value_width == width
    types = getattr(config, "layer_types", None)
    if types:
        soft = {"full_attention": "full", "sliding_attention": "sliding"}
        expected = {soft[t]: types.count(t) for t in dict.fromkeys(types) if t in soft}
        assert {group.kind: group.count for group in found.groups} == expected


@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3", "qwen2", "exaone4", "llama4_text"]
)
def test_layer_patterns_that_a_file_leaves_out_are_those_of_the_class(name):
    mapping = pytest.importorskip("transformers").CONFIG_MAPPING
    if name not in mapping:
        pytest.skip(f"this transformers has no {name}")
    more = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 5} if name == "qwen2" else {}
    written = json.loads(mapping[name](**more).to_json_string(use_diff=False))
    bare = {key: value for key, value in written.items() if key != "layer_types"}
    assert "layer_types" in written and len(kinds(written)) > 1
    assert kinds(bare) == kinds(written)


def test_windows_are_those_that_transformers_makes():
    masking = pytest.importorskip("transformers.masking_utils")
    from manyheads.integration.masking import translate

    causal = interpret({**LLAMA, "sliding_window": 7}).groups[0].mask
    theirs = translate(masking.sliding_window_causal_mask_function(7))
    assert causal.dense(30).equal(theirs.dense(30))
    both = interpret({**SMALL, "model_type": "modernbert", "global_attn_every_n_layers": 3, "local_attention": 14})
    sliding = next(group for group in both.groups if group.kind == "sliding")
    theirs = translate(masking.sliding_window_bidirectional_mask_function(7))
    assert sliding.mask.dense(30).equal(theirs.dense(30)) and sliding.reach == 15
    assert sliding.count == 4


def test_a_window_that_is_switched_off_hides_nothing():
    assert interpret({**LLAMA, "sliding_window": 64, "use_sliding_window": False}).groups[0].mask == Causal()
    sliding = {**LLAMA, "layer_types": ["sliding_attention"] * 6}
    assert interpret({**sliding, "sliding_window": None}).groups[0].reach is None


def test_an_order_beside_the_window_leaves_the_window_to_be_kept():
    (group,) = interpret({**LLAMA, "sliding_window": 9}).groups
    assert (Causal() & group.limit).dense(20).equal(group.mask.dense(20))
    chunks = interpret({**LLAMA, "layer_types": ["chunked_attention"] * 6, "attention_chunk_size": 4}).groups[0]
    assert chunks.mask == chunked(4) and (Causal() & chunks.limit).dense(20).equal(chunks.mask.dense(20))


def test_latent_attention_has_full_heads_and_a_small_cache():
    found = interpret({
        **SMALL, "model_type": "deepseek_v3", "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24,
        "v_head_dim": 20, "head_dim": 8,
    })  # fmt: skip
    assert (found.kv_heads, found.width, found.value_width, found.latent, found.rotary) == (8, 32, 20, 40, 8)


def test_multi_query_models_have_one_key_head_unless_they_say_otherwise():
    falcon = {**SMALL, "model_type": "falcon", "multi_query": True}
    assert interpret(falcon).kv_heads == 1
    assert interpret({**falcon, "new_decoder_architecture": True, "num_kv_heads": 2}).kv_heads == 2
    assert interpret({**SMALL, "model_type": "mpt", "attn_config": {"kv_n_heads": 4}}).kv_heads == 4


def test_a_missing_number_of_key_heads_means_as_many_as_queries():
    assert interpret(LLAMA).kv_heads == interpret({**LLAMA, "num_key_value_heads": None}).kv_heads == 8


def test_encoders_see_both_ways_and_decoders_do_not():
    assert interpret({**SMALL, "model_type": "bert"}).groups[0].mask == Full()
    assert interpret({**SMALL, "model_type": "bert", "is_decoder": True}).causal
    assert not interpret({**SMALL, "architectures": ["NewForMaskedLM"], "model_type": "new"}).causal
    assert interpret({**SMALL, "architectures": ["NewForCausalLM"]}).causal
    guess = interpret({**SMALL, "model_type": "new"})
    assert guess.causal and guess.notes == ("nothing says whether new is causal; taken as causal",)
    assert interpret({**SMALL, "model_type": "vit", "image_size": 224, "patch_size": 16}).tokens == 197


def test_nested_text_models_are_read_and_named():
    text = {**SMALL, "model_type": "gemma3_text", "sliding_window": 8}
    vision = {**SMALL, "num_attention_heads": 2}
    found = interpret({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    assert found.heads == 8 and "read from 'text_config'" in found.notes[0]
    assert {group.kind: group.count for group in found.groups} == {"sliding": 5, "full": 1}


def test_layers_of_other_kinds_are_counted_and_left_out():
    found = interpret({**LLAMA, "layer_types": ["linear_attention", "full_attention"] * 3})
    assert (found.layers, found.other_layers) == (3, 3)
    assert "3 layers of kind 'linear_attention' are left out" in found.notes
    hybrid = interpret({**LLAMA, "model_type": "jamba", "attn_layer_period": 3, "attn_layer_offset": 1})
    assert (hybrid.layers, hybrid.other_layers) == (2, 4)


def test_dtype_rope_cap_and_sinks_are_found():
    found = interpret({**SMALL, "model_type": "gpt_oss", "sliding_window": 4, "torch_dtype": "bfloat16",
                       "rope_theta": 150000.0, "rope_scaling": {"rope_type": "yarn"},
                       "attn_logit_softcapping": 30.0})  # fmt: skip
    assert (found.dtype, found.rope, found.softcap, found.sinks) == ("bfloat16", "rope base 150000, yarn", 30.0, True)
    assert interpret({**LLAMA, "dtype": "torch.float16"}).dtype == "float16"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "cannot tell whether tokens see later ones: looked for model_type, architectures, is_decoder"),
        ({"model_type": "llama"}, "no number of query heads: looked for num_attention_heads, n_head, n_heads, num_he"),
        ({"model_type": "llama", "num_attention_heads": 4}, "no head width: looked for head_dim"),
        ({"model_type": "llama", "num_attention_heads": 4, "head_dim": 8}, "no number of layers: looked for num_hid"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads: expected a positive integer, got 0"),
        ({**LLAMA, "num_attention_heads": "8"}, "expected a positive integer, got '8'"),
        ({**LLAMA, "num_attention_heads": True}, "expected a positive integer, got True"),
        ({**LLAMA, "num_attention_heads": 7}, "512 does not divide by 7 heads"),
        ({**LLAMA, "num_key_value_heads": 3}, "8 query heads are not a multiple of 3 key heads"),
        ({**LLAMA, "layer_types": ["full_attention"]}, "1 layer_types for 6 layers"),
        ({**LLAMA, "layer_types": ["linear_attention"] * 6}, "none of the 6 layers of llama has softmax attention"),
        ({**LLAMA, "layer_types": ["chunked_attention"] * 6}, "looked for attention_chunk_size"),
        ({**LLAMA, "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({**LLAMA, "num_attention_heads": [1, 2]}, "stages of different sizes"),
        ({**LLAMA, "kv_lora_rank": 8}, "looked for qk_rope_head_dim"),
    ],
)
def test_what_cannot_be_read_is_named(config, message):
    with pytest.raises(ValueError, match="^config: ") as caught:
        interpret(config)
    assert message in str(caught.value)


def test_files_and_folders_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read(tmp_path) == read(str(tmp_path / "config.json")) == interpret(LLAMA)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[1]", "holds a list"),
        (b"\xff\xfe\x00", "not text"),
    ],
)
def test_files_of_another_kind_are_named(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_places_without_a_config_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read(tmp_path / "none.json")
    with pytest.raises(ValueError, match="holds no config.json"):
        read(tmp_path)


def test_masks_of_a_model_are_values_of_the_algebra():
    assert interpret({**LLAMA, "sliding_window": 16}).groups[0].mask == as_mask("causal & window(16)")
    assert interpret({**LLAMA, "sliding_window": 16}).groups[0].limit == Window(left=16)
