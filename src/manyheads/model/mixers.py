"""Mixers by name: what stands between tokens in a block.

A mixer is a module with ``forward(x (B, N, C), *, mask=None) -> (B, N, C)`` and, where decoding exists,
``step(x (B, C), cache=None) -> (y (B, C), cache)``. To add one, write a function of the configuration, the layer and
keyword options, and put it into ``MIXERS``. Layers are imported when they are built.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from manyheads.common.errors import unknown
from manyheads.common.rope import RoPE

if TYPE_CHECKING:
    from .config import Config


def names() -> list[str]:
    """The mixers there are.

    Example:
        >>> "softmax" in names()
        True
    """
    return sorted(MIXERS)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Reads a mixer's name with its options.

    Args:
        text: As ``"softmax"`` or ``"rat(chunk=16)"``.

    Returns:
        The name and the options.

    Raises:
        ValueError: An unknown name or option, with the nearest; or what is no name with options.

    Example:
        >>> parse("linear(feature='identity')")
        ('linear', {'feature': 'identity'})
        >>> parse("softmx")
        Traceback (most recent call last):
        ValueError: unknown mixer 'softmx': did you mean 'softmax'? known: ...
    """
    found = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"mixer: expected a name such as 'softmax' or 'rat(chunk=16)', got {text!r}")
    name, inside = found[1], found[2] or ""
    if name not in MIXERS:
        raise unknown("mixer", name, MIXERS)
    try:
        call = ast.parse(f"f({inside})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        options = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(f"mixer: expected options as in 'rat(chunk=16)', got {text!r}") from None
    takes = [p.name for p in inspect.signature(MIXERS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in takes:
            raise unknown(f"option of {name}", option, takes)
    return name, options


def build(text: str, config: Config, layer: int = 0) -> nn.Module:
    """Makes a mixer.

    Args:
        text: Its name with options.
        config: The network that it is for: width, heads, positions, depth.
        layer: Number of its layer, from 0.

    Returns:
        The module, with fresh weights.

    Raises:
        ValueError: As :func:`parse`, or options that do not fit.
    """
    name, options = parse(text)
    return MIXERS[name](config, layer, **options)


def _softmax(config: Config, layer: int, *, window: int = 0, qk_norm: bool = False) -> nn.Module:
    from .heads import Softmax
    from .position import Slopes

    slopes = config.position.of(config.heads) if isinstance(config.position, Slopes) else None
    return Softmax(config.width, config.heads, slopes=slopes, window=window or None, qk_norm=qk_norm, **_pairs(config))


def _linear(config: Config, layer: int, *, feature: str = "elu+1") -> nn.Module:
    from manyheads.common.features import Pointwise
    from manyheads.mechanism.linear import kernelized, lightning

    from .heads import StateMixer

    kv_heads = config.kv_heads or None
    if feature == "identity":  # weights of both signs divide nothing: the heads are normalised instead
        core, advance = lightning.lightning_attention, lightning.step
        return StateMixer(config.width, config.heads, core, advance, kv_heads=kv_heads, norm=True)
    features = Pointwise(cast(Any, feature))  # which refuses other names
    averaged = functools.partial(kernelized.linear_attention, features=features)
    read = functools.partial(kernelized.step, features=features)
    return StateMixer(config.width, config.heads, averaged, read, kv_heads=kv_heads)


def _lightning(config: Config, layer: int) -> nn.Module:
    from manyheads.mechanism.linear.lightning import decay_slopes

    from .heads import Lightning, StateMixer

    core = Lightning(decay_slopes(config.heads, layer=layer, layers=config.depth if config.depth > 1 else None))
    return StateMixer(config.width, config.heads, core, core.step, kv_heads=config.kv_heads or None, norm=True)


def _performer(config: Config, layer: int, *, features: int = 0) -> nn.Module:
    from manyheads.mechanism.linear.favor import Performer

    from .heads import StateMixer

    core = Performer(config.width // config.heads, features or None, causal=True)
    return StateMixer(config.width, config.heads, core, core.step, kv_heads=config.kv_heads or None)


def _taylor(config: Config, layer: int, *, order: int = 2) -> nn.Module:
    from manyheads.mechanism.linear.taylor import Expansion, step, taylor_attention

    from .heads import StateMixer

    expansion, scale = Expansion(tuple(range(order + 1)), "sum"), (config.width // config.heads) ** -0.5
    core = functools.partial(taylor_attention, config=expansion, scale=scale)
    advance = functools.partial(step, config=expansion, scale=scale)
    return StateMixer(config.width, config.heads, core, advance, kv_heads=config.kv_heads or None)


def _gated_delta(config: Config, layer: int) -> nn.Module:
    from manyheads.nn.gated_delta import GatedDeltaNet

    return GatedDeltaNet(config.width, config.heads)


def _mlstm(config: Config, layer: int, *, gate: str = "exp") -> nn.Module:
    from manyheads.nn.mlstm import MLSTM

    return MLSTM(config.width, config.heads, gate=gate)


def _rat(config: Config, layer: int, *, chunk: int = 16, groups: int = 2) -> nn.Module:
    from manyheads.nn.rat import RAT

    return RAT(config.width, config.heads, chunk=chunk, groups=groups, rope=_rope(config))


def _lla(config: Config, layer: int, *, ridge: float = 0.1, qk_norm: bool = True, window: int = 0) -> nn.Module:
    from manyheads.nn.local_linear import LocalLinearAttention

    more = _pairs(config)
    return LocalLinearAttention(config.width, config.heads, ridge=ridge, qk_norm=qk_norm, window=window or None, **more)


def _parallax(config: Config, layer: int, *, qk_norm: bool = True, window: int = 0) -> nn.Module:
    from manyheads.nn.parallax import Parallax

    return Parallax(config.width, config.heads, qk_norm=qk_norm, window=window or None, **_pairs(config))


def _least_squares(config: Config, layer: int, *, conv: int = 4, ridge: float = 0.1) -> nn.Module:
    from manyheads.nn.least_squares import LeastSquares

    return LeastSquares(config.width, config.heads, conv=conv, ridge=ridge)


def _natsl(config: Config, layer: int, *, chunk: int = 64) -> nn.Module:
    from manyheads.mechanism.linear import NATSConfig
    from manyheads.nn.natsl import NATSL

    return NATSL(config.width, config.heads, config=NATSConfig(chunk=chunk, split=2))


def _nsa(
    config: Config,
    layer: int,
    *,
    kernel: int = 32,
    stride: int = 16,
    block: int = 64,
    keep: int = 16,
    first: int = 1,
    local: int = 2,
    window: int = 512,
) -> nn.Module:
    from manyheads.mechanism.sparse.nsa import NSAConfig
    from manyheads.nn.nsa import NSA

    sizes = NSAConfig(kernel, stride, block, keep, first, local, window, rope=_rope(config))
    return NSA(config.width, config.heads, kv_heads=config.kv_heads or None, config=sizes)


def _msa(
    config: Config, layer: int, *, block: int = 128, keep: int = 16, first: int = 0, local: int = 1, index: int = 0
) -> nn.Module:
    from manyheads.mechanism.sparse.msa import MSAConfig
    from manyheads.nn.msa import MSA

    sizes = MSAConfig(block, keep, first, local)
    return MSA(config.width, config.heads, index_dim=index or None, config=sizes, **_pairs(config))


def _pairs(config: Config) -> dict[str, Any]:
    """What mixers that score pairs of tokens take from the network."""
    return {"kv_heads": config.kv_heads or None, "rope": _rope(config)}


def _rope(config: Config) -> RoPE | None:
    return config.position if isinstance(config.position, RoPE) else None


MIXERS: dict[str, Callable[..., nn.Module]] = {
    "softmax": _softmax,
    "linear": _linear,
    "lightning": _lightning,
    "performer": _performer,
    "taylor": _taylor,
    "gated-delta": _gated_delta,
    "mlstm": _mlstm,
    "rat": _rat,
    "lla": _lla,
    "parallax": _parallax,
    "least-squares": _least_squares,
    "natsl": _natsl,
    "nsa": _nsa,
    "msa": _msa,
}
"""Every mixer: ``(config, layer, *, options) -> module``."""
