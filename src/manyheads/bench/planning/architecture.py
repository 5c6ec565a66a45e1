"""The attention of a model, read from its ``config.json``: heads, widths, and which layers see what.

The file is read as plain JSON; transformers is neither needed nor imported. Where a config leaves out what its class
would fill in, the rules of the published classes are followed for layer patterns, and for nothing else: a missing
number is an error that names every key that was looked for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.mask import Block, Causal, Full, Mask, Window, chunked, from_hf_window

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "n_embed")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
WIDTH = ("head_dim", "kv_channels", "d_kv")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
TEXT_PARTS = ("text_config", "llm_config", "language_config")

ENCODERS = (
    "albert", "bert", "beit", "camembert", "clip_vision_model", "data2vec-vision", "deberta", "deberta-v2", "deit",
    "dinov2", "dinov2_with_registers", "dinov3_vit", "distilbert", "electra", "esm", "eurobert", "hubert", "ijepa",
    "modernbert", "mpnet", "neobert", "nomic_bert", "roberta", "roformer", "siglip2_vision_model",
    "siglip_vision_model", "squeezebert", "vit", "vit_mae", "wav2vec2", "xlm-roberta",
)  # fmt: skip
"""Model types whose tokens see one another in both directions, unless the config says ``is_decoder``."""

_DECODERS = (
    "bloom", "codegen", "cohere", "deepseek", "ernie4", "exaone", "falcon", "gemma", "glm4", "gpt", "granite",
    "hunyuan", "jamba", "kimi", "lfm2", "llama", "minimax", "mistral", "mixtral", "mpt", "olmo", "opt", "phi",
    "qwen", "smollm", "starcoder",
)  # fmt: skip
"""How the model types of well-known decoders begin, for configs that say nothing else."""
_CAUSAL_NAMES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_ENCODER_NAMES = ("ForMaskedLM", "ForImageClassification", "ForMaskedImageModeling", "ForPreTraining")


@dataclass(frozen=True)
class Layers:
    """Layers of one model whose attention is alike.

    Attributes:
        kind: ``"full"``, ``"sliding"`` or ``"chunked"``.
        count: How many.
        mask: What a layer's queries may see in a sequence of any length.
        limit: What of this is the layer's own, beside the order of tokens: a window or chunks; ``None`` for neither.
        reach: Most keys that a token sees under that limit; ``None`` without one.
    """

    kind: str
    count: int
    mask: Mask
    limit: Mask | None = None
    reach: int | None = None


@dataclass(frozen=True)
class Architecture:
    """What a config says about attention.

    Attributes:
        name: The model type.
        heads: Query heads.
        kv_heads: Key heads.
        width: Width of queries and keys per head.
        value_width: Width of values per head.
        groups: The layers with softmax attention, by kind.
        causal: Whether tokens see no later ones.
        latent: For multi-head latent attention, numbers kept per token: the latent and the rotary key.
        rotary: Of these, the width of the rotary key.
        softcap: Cap of the scores, if there is one.
        sinks: Whether each head has a sink logit.
        dtype: Name of the dtype of the weights, if the config says it.
        positions: Tokens that the model was made for, if the config says it.
        tokens: Tokens of one image, for vision models.
        rope: Rotary embedding in words.
        other_layers: Layers without softmax attention (linear, convolution, state space), which are left out.
        notes: What a reader must know of how the config was read.
    """

    name: str
    heads: int
    kv_heads: int
    width: int
    value_width: int
    groups: tuple[Layers, ...]
    causal: bool
    latent: int | None = None
    rotary: int = 0
    softcap: float | None = None
    sinks: bool = False
    dtype: str | None = None
    positions: int | None = None
    tokens: int | None = None
    rope: str = "none"
    other_layers: int = 0
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Layers with softmax attention."""
        return sum(group.count for group in self.groups)

    def line(self) -> str:
        """One line for people.

        Example:
            >>> given = {"model_type": "llama", "num_attention_heads": 8, "hidden_size": 512, "num_hidden_layers": 4}
            >>> interpret(given).line()
            'llama: 4 layers, 8 query heads, 8 key heads of width 64, causal'
        """
        width = f"{self.width}" if self.width == self.value_width else f"{self.width} (values {self.value_width})"
        kinds = ", ".join(f"{g.count} {g.kind}" for g in self.groups) if len(self.groups) > 1 else f"{self.layers}"
        more = [f"soft cap {self.softcap:g}"] if self.softcap else []
        more += ["sinks"] if self.sinks else []
        more += [f"latent of {self.latent} numbers a token"] if self.latent else []
        more += [f"{self.other_layers} other layers left out"] if self.other_layers else []
        more += [self.rope] if self.rope != "none" else []
        shape = f"{self.name}: {kinds} layers, {self.heads} query heads, {self.kv_heads} key heads of width {width}"
        return ", ".join([shape, "causal" if self.causal else "both directions", *more])


def read(path: str | Path) -> Architecture:
    """Reads the config of a model.

    Args:
        path: A ``config.json``, or a folder with one.

    Returns:
        What it says about attention.

    Raises:
        ValueError: No such file, not JSON, or a config from which the attention cannot be told; the message names the
            keys that were looked for.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        where = f"the folder {path} holds no config.json" if path.is_dir() else f"there is no file {path}"
        raise ValueError(f"config: {where}; give a transformers config.json or a folder with one")
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config: cannot read {file}: {getattr(error, 'strerror', None) or 'not text'}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"config: {file} is not JSON: {error.msg} in line {error.lineno}") from None
    if not isinstance(given, dict):
        raise ValueError(f"config: {file} holds a {type(given).__name__}, not an object with keys")
    return interpret(given)


def interpret(config: Mapping[str, Any]) -> Architecture:
    """Tells the attention of a model from its config.

    Args:
        config: The config as a dictionary.

    Returns:
        What it says about attention.

    Raises:
        ValueError: Something is missing or cannot be: the message names the keys.

    Example:
        >>> found = interpret({"model_type": "mistral", "num_attention_heads": 32, "num_key_value_heads": 8,
        ...                    "hidden_size": 4096, "num_hidden_layers": 32, "sliding_window": 4096})
        >>> found.groups[0].mask, found.width
        (causal & window(4096), 128)
    """
    config, notes = _part(config)
    name = str(config.get("model_type") or "a model without model_type")
    if config.get("is_encoder_decoder"):
        raise ValueError(f"config: {name} is an encoder-decoder, with three kinds of attention; only one stack is read")
    if isinstance(config.get("depths"), list) or isinstance(_first(config, HEADS), list):
        raise ValueError(f"config: {name} has stages of different sizes; models with one size of layer are read")
    causal, guess = _is_causal(config, name)
    notes += guess
    heads = _whole(config, HEADS, "query heads")
    if config.get("kv_lora_rank"):
        shape = _latent(config, heads)
    else:
        width = _width(config, heads)
        shape = {"kv_heads": _kv_heads(config, heads), "width": width, "value_width": width}
    if heads % shape["kv_heads"]:
        raise ValueError(f"config: {heads} query heads are not a multiple of {shape['kv_heads']} key heads")
    kinds = _kinds(config, name, _whole(config, LAYERS, "layers"))
    groups = tuple(_group(config, name, kind, n, causal) for kind, n in Counter(kinds).items() if kind in _SOFTMAX)
    other = Counter(kind for kind in kinds if kind not in _SOFTMAX)
    if not groups:
        raise ValueError(f"config: none of the {len(kinds)} layers of {name} has softmax attention: {sorted(other)}")
    notes += [f"{n} layers of kind {kind!r} are left out" for kind, n in other.items()]
    softcap = config.get("attn_logit_softcapping")
    return Architecture(
        name=name,
        heads=heads,
        groups=groups,
        causal=causal,
        softcap=float(softcap) if softcap else None,
        sinks=name in ("gpt_oss",),
        dtype=_dtype(config),
        positions=_optional(config, POSITIONS),
        tokens=_image_tokens(config, name),
        rope=_rope(config),
        other_layers=sum(other.values()),
        notes=tuple(notes),
        **shape,
    )


# --- shapes -------------------------------------------------------------------------------------------------------


def _part(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The part that describes the layers: models of several kinds of input nest their text model."""
    if _first(config, HEADS) is not None:
        return config, []
    for key in (*TEXT_PARTS, "vision_config"):
        if isinstance(config.get(key), Mapping):
            inner = {**{k: config[k] for k in ("architectures", "dtype", "torch_dtype") if k in config}, **config[key]}
            return inner, [f"read from {key!r}; other parts of the model are left out"]
    return config, []


def _first(config: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _whole(config: Mapping[str, Any], keys: tuple[str, ...], what: str) -> int:
    """A positive integer under the first key that is there."""
    key = next((key for key in keys if config.get(key) is not None), None)
    if key is None:
        raise ValueError(
            f"config: no number of {what}: looked for {', '.join(keys)}; a file may leave out what equals the defaults "
            "of its class: transformers' AutoConfig writes them all with save_pretrained"
        )
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config: {key}: expected a positive integer, got {value!r}")
    return value


def _optional(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    return None if _first(config, keys) is None else _whole(config, keys, keys[0])


def _kv_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return 1
    inner = config.get("attn_config")
    if isinstance(inner, Mapping) and inner.get("kv_n_heads"):
        return _whole(inner, ("kv_n_heads",), "key heads")
    return _optional(config, KV_HEADS) or heads


def _width(config: Mapping[str, Any], heads: int) -> int:
    if (width := _optional(config, WIDTH)) is not None:
        return width
    hidden = _optional(config, HIDDEN)
    if hidden is None:
        raise ValueError(f"config: no head width: looked for {', '.join(WIDTH)}, and for {', '.join(HIDDEN)}")
    if hidden % heads:
        raise ValueError(f"config: no {WIDTH[0]}, and a hidden size of {hidden} does not divide by {heads} heads")
    return hidden // heads


def _latent(config: Mapping[str, Any], heads: int) -> dict[str, int]:
    """Multi-head latent attention: full heads in prefill and training, a shared latent in the cache."""
    rotary = _whole(config, ("qk_rope_head_dim",), "rotary channels of a key")
    width = rotary + _whole(config, ("qk_nope_head_dim",), "other channels of a key")
    values = _whole(config, ("v_head_dim",), "channels of a value")
    latent = rotary + _whole(config, ("kv_lora_rank",), "channels of the latent")
    return {"kv_heads": heads, "width": width, "value_width": values, "latent": latent, "rotary": rotary}


def _is_causal(config: Mapping[str, Any], name: str) -> tuple[bool, list[str]]:
    """Whether tokens see no later ones, and what to say when nothing in the config tells it."""
    names = tuple(str(n) for n in config.get("architectures") or ())
    if config.get("is_decoder") is True:
        return True, []
    if config.get("use_bidirectional_attention") is True or config.get("is_causal") is False:
        return False, []
    if name in ENCODERS or any(n.endswith(_ENCODER_NAMES) for n in names):
        return False, []
    if any(n.endswith(_CAUSAL_NAMES) for n in names) or _first(config, ("rope_theta", "rope_parameters")) is not None:
        return True, []
    if "vision" in name or "image_size" in config:
        return False, []
    if "model_type" not in config and not names:
        raise ValueError(
            "config: cannot tell whether tokens see later ones: looked for model_type, architectures, is_decoder; "
            "add one of them"
        )
    return True, [] if name.startswith(_DECODERS) else [f"nothing says whether {name} is causal; taken as causal"]


def _image_tokens(config: Mapping[str, Any], name: str) -> int | None:
    size, patch = config.get("image_size"), config.get("patch_size")
    if not (isinstance(size, int) and isinstance(patch, int) and patch):
        return None
    return (size // patch) ** 2 + ("siglip" not in name) + int(config.get("num_register_tokens") or 0)


def _dtype(config: Mapping[str, Any]) -> str | None:
    found = config.get("dtype") or config.get("torch_dtype")
    return str(found).removeprefix("torch.") if isinstance(found, str) else None


def _rope(config: Mapping[str, Any]) -> str:
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = next((v for v in given.values() if isinstance(v, Mapping)), given) if isinstance(given, Mapping) else {}
    theta = config.get("rope_theta") or given.get("rope_theta")
    if theta is None:
        return "none"
    kind = given.get("rope_type") or given.get("type") or "default"
    return f"rope base {theta:g}" + (f", {kind}" if kind != "default" else "")


# --- which layers see what ----------------------------------------------------------------------------------------

_SOFTMAX = ("full", "sliding", "chunked")
_WORDS = {
    "full_attention": "full",
    "attention": "full",
    "global": "full",
    "sliding_attention": "sliding",
    "local": "sliding",
    "chunked_attention": "chunked",
}
_PERIODS = {"gemma2": 2, "gpt_oss": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4, "olmo3": 4}
"""Every so many layers one sees everything, in the classes that do not write it into their configs."""


def _kinds(config: Mapping[str, Any], name: str, layers: int) -> list[str]:
    """The kind of attention of each layer."""
    types = config.get("layer_types") or config.get("attention_layers")
    if isinstance(types, list):
        if len(types) != layers:
            raise ValueError(f"config: {len(types)} layer_types for {layers} layers")
        return _without_window(config, [_WORDS.get(str(t), str(t)) for t in types])
    if every := config.get("attn_layer_period"):
        offset = int(config.get("attn_layer_offset") or 0)
        return ["full" if i % every == offset else "state space" for i in range(layers)]
    if every := config.get("global_attn_every_n_layers"):
        return ["sliding" if i % every else "full" for i in range(layers)]
    if isinstance(rotary := config.get("no_rope_layers"), list) and config.get("attention_chunk_size"):
        every = int(config.get("no_rope_layer_interval") or 4)
        rotary = rotary or [int((i + 1) % every != 0) for i in range(layers)]
        return ["chunked" if uses else "full" for uses in rotary]
    return _without_window(config, [_by_pattern(config, name)(i) for i in range(layers)])


def _by_pattern(config: Mapping[str, Any], name: str) -> Callable[[int], str]:
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or _PERIODS.get(name)
    if isinstance(pattern, str):  # "LLLG": local layers and a global one
        return lambda i: "full" if pattern[i % len(pattern)] == "G" else "sliding"
    if pattern:
        return lambda i: "sliding" if (i + 1) % pattern else "full"
    first = int(config.get("max_window_layers") or 0)
    return lambda i: "sliding" if i >= first else "full"


def _without_window(config: Mapping[str, Any], kinds: list[str]) -> list[str]:
    """Layers that would slide are full where the config has no window, or switches it off."""
    if config.get("use_sliding_window") is not False and _reach(config) is not None:
        return kinds
    return ["full" if kind == "sliding" else kind for kind in kinds]


def _reach(config: Mapping[str, Any]) -> int | None:
    return _optional(config, ("sliding_window", "window_size", "local_attention"))


def _group(config: Mapping[str, Any], name: str, kind: str, count: int, causal: bool) -> Layers:
    order: Mask = Causal() if causal else Full()
    if kind == "full":
        return Layers(kind, count, order)
    if kind == "chunked":
        size = _whole(config, ("attention_chunk_size",), "tokens in a chunk")
        return Layers(kind, count, chunked(size), Block(Window(1), size), size)
    reach = _reach(config)
    if reach is None:
        raise ValueError(f"config: {count} layers of {name} have a window, but there is no sliding_window")
    if causal:
        return Layers(kind, count, from_hf_window(reach), Window(left=reach), reach)
    half = reach // 2 if config.get("sliding_window") is None else reach  # local_attention counts both sides
    return Layers(kind, count, Window(half + 1), Window(half + 1), 2 * half + 1)
