"""Attention from here in models of Hugging Face transformers.

``enable(model)`` replaces the attention of a loaded model, ``disable(model)`` restores it. Both the attention function
and its mask function are registered with transformers under ``manyheads_<mechanism>``, so that the name also serves
as ``attn_implementation=``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.attention import attention
from manyheads.common.errors import UnsupportedError, missing_extra, unknown
from manyheads.engine.tiled import Bias, Pair
from manyheads.integration.masking import (
    MaskCarrier,
    Visibility,
    carry_mask,
    current_documents,
    document,
    documents,
)
from manyheads.mask import Causal, Document, Full, Mask, Window
from manyheads.mask.text import as_mask

__all__ = ["MECHANISMS", "attention_function", "disable", "documents", "enable", "is_enabled", "register"]

PREFIX = "manyheads_"
"""Begins every name under which transformers knows a mechanism."""

Model = TypeVar("Model", bound=nn.Module)
_previous: WeakKeyDictionary[nn.Module, list[tuple[Any, str]]] = WeakKeyDictionary()


def attention_function(
    module: nn.Module,
    query: Float[Tensor, "B Hq Nq D"],
    key: Float[Tensor, "B Hkv Nk D"],
    value: Float[Tensor, "B Hkv Nk Dv"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **given: Any,
) -> tuple[Float[Tensor, "B Nq Hq Dv"], None]:
    """Exact attention behind the interface of transformers.

    Args:
        module: The layer that calls; its ``is_causal`` decides when there is neither a mask nor ``is_causal``.
        query: ``(B, Hq, Nq, D)``.
        key: ``(B, Hkv, Nk, D)``, not repeated.
        value: ``(B, Hkv, Nk, Dv)``.
        attention_mask: What the mask function made; or a 4-D mask of the user, bool (True is visible) or additive.
        dropout: Share of weights dropped.
        scaling: Multiplies the dot products; ``D ** -0.5`` by default.
        is_causal: Whether queries see no later keys, if there is no mask.
        **given: What models pass besides. ``softcap``, ``s_aux`` (one sink logit per head), ``position_bias``,
            ``sliding_window`` and ``cu_seq_lens_q`` / ``cu_seq_lens_k`` are honoured; a paged ``cache`` and
            ``output_attentions`` are refused; what has no bearing on the result is ignored.

    Returns:
        ``(B, Nq, Hq, Dv)`` and None: the weights are never made.

    Raises:
        UnsupportedError: For what cannot be honoured.
    """
    if given.get("output_attentions"):
        raise UnsupportedError("output_attentions: weights are never made; use attn_implementation='eager'")
    if given.get("cache") is not None:
        raise UnsupportedError("cache: paged caches (continuous batching); use attn_implementation='sdpa'")
    seen = _visibility(module, query, key, attention_mask, is_causal, given)
    out = attention(
        query,
        key,
        value,
        mask=seen.mask,
        scale=scaling,
        bias=_bias(attention_mask, given.get("position_bias")),
        softcap=given.get("softcap"),
        sink=given.get("s_aux"),
        dropout_p=dropout,
        positions=seen.positions,
        key_padding=seen.key_padding,
    )
    return out.transpose(1, 2).contiguous(), None


MECHANISMS: dict[str, Callable[..., tuple[Tensor, None]]] = {"exact": attention_function}
"""Attention functions by the name of their mechanism."""


def register(mechanism: str = "exact") -> str:
    """Registers a mechanism with transformers; doing it again changes nothing.

    Args:
        mechanism: Name of the mechanism.

    Returns:
        The name under which transformers knows it, for ``attn_implementation=``.

    Raises:
        ValueError: No mechanism has this name.
        ImportError: transformers is not installed.

    Example:
        >>> register("exact")
        'manyheads_exact'
    """
    if mechanism not in MECHANISMS:
        raise unknown("mechanism", mechanism, MECHANISMS)
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise missing_extra("hf", "attention in transformers models") from error
    name = PREFIX + mechanism
    AttentionInterface.register(name, MECHANISMS[mechanism])
    AttentionMaskInterface.register(name, carry_mask)
    return name


def enable(model: Model, mechanism: str = "exact") -> Model:
    """Runs the attention of a transformers model through this library.

    Args:
        model: A loaded model of transformers, with all its sub-models.
        mechanism: Name of the mechanism.

    Returns:
        The same model.

    Raises:
        TypeError: Not a model of transformers.
        ValueError: No mechanism has this name.
        UnsupportedError: The model does not let its attention be replaced, or is set to return attention weights.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = enable(BertModel(tiny))
        >>> model.config._attn_implementation
        'manyheads_exact'
        >>> disable(model).config._attn_implementation
        'sdpa'
    """
    name = register(mechanism)
    replace: Any = getattr(model, "set_attn_implementation", None)
    if replace is None:
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")
    configs = _configs(model)
    if any(getattr(config, "output_attentions", False) for config in configs):
        raise UnsupportedError("model: its config asks for attention weights (output_attentions), which are never made")
    before = [(config, config._attn_implementation) for config in configs]
    replace(name)
    if not is_enabled(model):
        raise UnsupportedError(f"{type(model).__name__} does not let its attention be replaced")
    _previous.setdefault(model, before)
    return model


def disable(model: Model) -> Model:
    """Restores the attention that a model had before ``enable``; does nothing to one that was never enabled.

    Args:
        model: The model.

    Returns:
        The same model.
    """
    for config, name in _previous.pop(model, []):
        config._attn_implementation = {"": name}
    return model


def is_enabled(model: nn.Module) -> bool:
    """Whether a model's attention, or that of any of its sub-models, runs through this library.

    Args:
        model: Any module.
    """
    return any(str(config._attn_implementation).startswith(PREFIX) for config in _configs(model))


def _configs(model: nn.Module) -> list[Any]:
    """The distinct configs of a model, its sub-models and their sub-configs, outermost first."""
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop(0)
        if hasattr(config, "_attn_implementation") and id(config) not in found:
            found[id(config)] = config
            waiting.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return list(found.values())


def _visibility(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
    given: dict[str, Any],
) -> Visibility:
    """What may attend to what, from the mask if there is one, else from what the layer says of itself."""
    packed = _packed(given)
    if isinstance(attention_mask, MaskCarrier):
        if attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
            raise UnsupportedError(
                f"the mask was made for {tuple(attention_mask.shape[2:])} queries and keys, the layer has "
                f"{(query.shape[2], key.shape[2])}"
            )
        seen = attention_mask.visibility
        told = any(isinstance(leaf, Document) for leaf in seen.mask.leaves())
        return seen if told or packed is None else dataclasses.replace(seen, mask=_both(seen.mask, packed))
    packed = current_documents() if packed is None else packed
    if attention_mask is not None:
        mask = as_mask(attention_mask) if attention_mask.dtype == torch.bool else Full()
        return Visibility(mask if packed is None else _both(mask, packed))
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    causal = bool(causal) and query.shape[2] > 1
    mask = Causal() if causal else Full()
    if (width := given.get("sliding_window")) is not None:
        if not causal and query.shape[2] > 1:
            raise UnsupportedError("sliding_window: without a mask it is defined for causal layers only")
        mask = _both(mask, Window(left=int(width)))
    positions = None
    if causal and key.shape[2] > query.shape[2]:  # keys of a static cache that are not written yet
        positions = torch.arange(query.shape[2]), torch.arange(key.shape[2])
    return Visibility(mask if packed is None else _both(mask, packed), positions)


def _packed(given: dict[str, Any]) -> Document | None:
    """The documents that variable-length arguments describe."""
    starts = given.get("cu_seq_lens_q")
    if starts is None:
        return None
    ends = given.get("cu_seq_lens_k")
    return document(starts.diff().cpu(), None if ends is None else ends.diff().cpu())


def _both(first: Mask, second: Mask) -> Mask:
    return second if isinstance(first, Full) else first & second


def _bias(attention_mask: Tensor | None, position_bias: Tensor | None) -> Bias | Pair | None:
    """What is added to the scores: an additive mask of the user's, a bias of the model's, or both."""
    additive = attention_mask is not None and attention_mask.is_floating_point()
    found = [Pair(each) for each in (attention_mask if additive else None, position_bias) if each is not None]
    return None if not found else found[0] if len(found) == 1 else found[0] + found[1]
