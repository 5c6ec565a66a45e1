"""Real queries, keys and values of a transformers model, recorded from its attention layers into a file.

The file is safetensors with ``layers.<i>.q``, ``layers.<i>.k`` and ``layers.<i>.v`` for the i-th attention call of a
forward pass, as the attention function receives them: after RoPE and norms, key heads not repeated. Metadata says
where they come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.common.errors import UnsupportedError, missing_extra
from manyheads.integration.encoder import first_position, load
from manyheads.integration.transformers import disable, documents, enable, is_enabled

FORMAT = "manyheads capture 1"


@dataclass(frozen=True, eq=False)
class CapturedLayer:
    """What one attention call received.

    Attributes:
        index: Its place among the attention calls of the forward pass.
        module: Qualified name of the layer in the model.
        q: ``(B, Hq, Nq, D)``.
        k: ``(B, Hkv, Nk, D)``.
        v: ``(B, Hkv, Nk, Dv)``.
        scaling: What the dot products are multiplied by.
        causal: Whether the layer says that queries see no later keys.
    """

    index: int
    module: str
    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float
    causal: bool


@dataclass(frozen=True, eq=False)
class Capture:
    """A file of captured layers.

    Attributes:
        model: Name of the model.
        layers: The layers, in the order of their calls.
        attention_mask: ``(B, N)``, True for real tokens, when the inputs had padding.
        document_lengths: ``(n,)``, when the inputs were several texts, laid end to end.
        metadata: Everything that the file says about itself.
    """

    model: str
    layers: tuple[CapturedLayer, ...]
    attention_mask: Tensor | None
    document_lengths: Tensor | None
    metadata: dict[str, str]


def capture(
    model: nn.Module | str,
    inputs: Mapping[str, Any] | str | Sequence[str],
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    tokenizer: Any = None,
    name: str | None = None,
) -> Path:
    """Runs a model once and records q, k, v of its attention layers.

    Several texts are laid end to end in one row, each with positions of its own and seeing only itself, so that the
    file holds one long real sequence without padding; their lengths are in it as ``document_lengths``.

    The file is written under a temporary name and renamed when it is whole. Nothing about the model changes.

    Args:
        model: A model of transformers, with any attention implementation but ``"eager"``; or what
            `manyheads.integration.encoder.load` takes.
        inputs: Arguments of its forward pass, a text, or several.
        path: The file to write; replaced if it exists.
        layers: Which attention calls of the forward pass, by number from 0; all by default.
        tokenizer: The model's tokenizer, needed for texts unless the model is given by name.
        name: What the file calls the model; by default what its config does.

    Returns:
        The path.

    Raises:
        ValueError: The path cannot be written, a layer does not exist, or texts come without a tokenizer.
        UnsupportedError: The model does not call an attention function that can be listened to.
        ImportError: transformers or safetensors is not installed.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"path: cannot write {path}")
    network: Any = model
    if isinstance(model, str):
        name = model if name is None else name
        network, tokenizer = load(model)
    given, lengths = _tokens(network, inputs, tokenizer)
    with ExitStack() as around:
        if lengths is not None:
            around.enter_context(_enabled(network))
            around.enter_context(documents(lengths))
        found = around.enter_context(_listening(network, layers))
        around.enter_context(torch.no_grad())
        network(**given)
    tensors = {f"layers.{layer.index}.{part}": getattr(layer, part) for layer in found.layers for part in "qkv"}
    if layers is not None and (absent := sorted(set(layers) - {layer.index for layer in found.layers})):
        raise ValueError(f"layers: the model has {found.calls} attention calls, there is no number {absent[0]}")
    if not tensors:
        raise UnsupportedError(f"{type(network).__name__} called no attention function of transformers")
    padding = given.get("attention_mask")
    if isinstance(padding, Tensor) and padding.ndim == 2 and not bool(padding.all()):
        tensors["attention_mask"] = padding.bool().cpu()
    if lengths is not None:
        tensors["document_lengths"] = torch.tensor(lengths)
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.torch.save_file(tensors, str(partial), metadata=_metadata(network, found.layers, name))
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"path: cannot write {path} ({error.strerror or error})") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return path


def load_capture(path: str | Path) -> Capture:
    """Reads a file of captured layers.

    Args:
        path: A file that ``capture`` has written.

    Returns:
        The layers and what the file says about them.

    Raises:
        ValueError: The file does not exist, is truncated or damaged, or was not written by ``capture``.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors()
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:
        raise ValueError(f"path: {path} is truncated, damaged or no safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path: {path} was not written by manyheads capture (format {metadata.get('format')!r})")
    try:
        layers = tuple(
            CapturedLayer(
                index=each["index"],
                module=each["module"],
                **{part: tensors[f"layers.{each['index']}.{part}"] for part in "qkv"},
                scaling=each["scaling"],
                causal=each["causal"],
            )
            for each in json.loads(metadata["layers"])
        )
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"path: {path} lacks what its metadata announces ({error})") from error
    padding, lengths = tensors.get("attention_mask"), tensors.get("document_lengths")
    return Capture(metadata.get("model", "unknown"), layers, padding, lengths, metadata)


@dataclass
class _Found:
    layers: list[CapturedLayer]
    calls: int = 0


@contextmanager
def _listening(model: Any, wanted: Sequence[int] | None) -> Iterator[_Found]:
    """Stands between a model and its attention functions, noting what passes."""
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
    except ImportError as error:
        raise missing_extra("hf", "capturing from a model") from error
    names = {id(module): title for title, module in model.named_modules()}
    found = _Found([])

    def listener(original: Any) -> Any:
        def listen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **given: Any) -> Any:
            if id(module) in names:
                index, found.calls = found.calls, found.calls + 1
                if wanted is None or index in wanted:
                    scaling = given.get("scaling")
                    causal = given.get("is_causal")
                    q, k, v = (each.detach().to("cpu", copy=True).contiguous() for each in (query, key, value))
                    scaling = float(q.shape[-1] ** -0.5 if scaling is None else scaling)
                    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
                    found.layers.append(CapturedLayer(index, names[id(module)], q, k, v, scaling, causal))
            return original(module, query, key, value, *rest, **given)

        return listen

    used = {str(m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")} - {"None"}
    if used & {"eager"}:
        raise UnsupportedError("eager attention cannot be listened to; load the model with attn_implementation='sdpa'")
    before = {name: functions[name] for name in used if name in functions}
    for name, function in before.items():
        functions[name] = listener(function)
    try:
        yield found
    finally:
        for name, function in before.items():
            del functions[name]
            if functions.get(name) is not function:
                functions[name] = function


@contextmanager
def _enabled(model: nn.Module) -> Iterator[None]:
    """Runs a model's attention through this library for a while."""
    if is_enabled(model):
        yield
        return
    enable(model)
    try:
        yield
    finally:
        disable(model)


def _tokens(
    model: nn.Module, inputs: Mapping[str, Any] | str | Sequence[str], tokenizer: Any
) -> tuple[dict[str, Any], list[int] | None]:
    """Arguments of the forward pass, and the lengths of the texts when there are several."""
    if isinstance(inputs, Mapping):
        return dict(inputs), None
    if tokenizer is None:
        raise ValueError("tokenizer: needed when inputs are texts")
    texts = [inputs] if isinstance(inputs, str) else list(inputs)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("inputs: expected arguments of the forward pass, a text, or a list of texts")
    tokens = tokenizer(texts, truncation=True)["input_ids"]
    lengths = [len(each) for each in tokens]
    device = next(model.parameters()).device
    ids = torch.tensor([[token for each in tokens for token in each]], device=device)
    if len(texts) == 1:
        return {"input_ids": ids}, None
    start = first_position(model)
    places = torch.tensor([[place + start for length in lengths for place in range(length)]], device=device)
    return {"input_ids": ids, "position_ids": places}, lengths


def _metadata(model: Any, layers: Sequence[CapturedLayer], name: str | None) -> dict[str, str]:
    import transformers

    described = [
        {
            "index": layer.index,
            "module": layer.module,
            "scaling": layer.scaling,
            "causal": layer.causal,
            "q": list(layer.q.shape),
            "k": list(layer.k.shape),
            "v": list(layer.v.shape),
        }
        for layer in layers
    ]
    return {
        "format": FORMAT,
        "model": name or _title(model),
        "class": type(model).__name__,
        "parameters": str(sum(p.numel() for p in model.parameters())),
        "attention": str(model.config._attn_implementation),
        "dtype": str(layers[0].q.dtype).removeprefix("torch."),
        "layers": json.dumps(described),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _title(model: Any) -> str:
    """The name of a model without the folders of the machine that it was loaded on."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name:
        return type(model).__name__
    folder = os.path.isabs(name) or Path(name).is_dir()
    return "/".join(Path(name).parts[-2:]) if folder else name


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise missing_extra("hf", "captured layers") from error
    return safetensors
