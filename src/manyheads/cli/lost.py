"""``manyheads lost``: what a mechanism that chooses its keys loses on given inputs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyheads.bench import loss
from manyheads.bench.loss import Lost
from manyheads.bench.structure import KINDS, Shape, draw
from manyheads.bench.suite import Options
from manyheads.bench.suites.masks import head_layout
from manyheads.bench.workload import DTYPES, read_captured
from manyheads.cli.tables import draw as table
from manyheads.cli.tables import duration
from manyheads.common.errors import unknown
from manyheads.mask import as_mask
from manyheads.spec import Spec, find


@dataclass(frozen=True)
class Request:
    """What was asked; see ``manyheads.bench.loss.lost``.

    Attributes:
        mechanism: Slug.
        input: One of ``structure.KINDS``, or a captured file.
        settings: Keyword arguments of the mechanism as ``"name=value"``; fields of its ``config`` likewise.
        layers: Numbers of layers of a captured file; empty for all.
        length: Tokens; of a captured file at most those that it has, 0 for all.
        heads: Heads, key heads and width of drawn input, as ``"8:2x64"``.
        dtype: Of drawn input, or that captured input is rounded to.
        mask: What dense attention sees.
        top: Keys of a row that count as its top ones.
        rows: Query rows to judge; 0 for all.
        seed: Draws inputs and rows.
        as_json: Whether to print everything as JSON.
    """

    mechanism: str
    input: str = "document"
    settings: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    length: int = 4096
    heads: str = "8:2x64"
    dtype: str = "bfloat16"
    mask: str = "causal"
    top: int = loss.TOP
    rows: int = loss.ROWS
    seed: int = 42
    as_json: bool = False


_HEADS = ("input", "error", "weight", "worst head", "top keys", "pairs", "tiles", "choosing", "whole", "share")


def run(request: Request) -> int:
    """Prints what is lost, one line for each input or layer.

    Args:
        request: What was asked.

    Returns:
        The exit status.

    Raises:
        ValueError: Something that does not exist or does not fit.
        ImportError: The extra that reads captured files is not installed.
    """
    spec, mask = find(request.mechanism), as_mask(request.mask)
    if request.dtype not in DTYPES:
        raise unknown("dtype", request.dtype, DTYPES)
    options = settings(spec, request.settings)
    found = {}
    for name, tensors, more in _inputs(request):
        found[name] = loss.lost(
            spec, *tensors, options=more | options, mask=mask, top=request.top, rows=request.rows or None,
            seed=request.seed,
        )  # fmt: skip
    if request.as_json:
        print(json.dumps({name: each._asdict() for name, each in found.items()}, indent=1, allow_nan=False))
        return 0
    table(_HEADS, [_cells(name, each) for name, each in found.items()])
    rows = next(iter(found.values())).rows
    print("error: norm of the difference from dense attention in float64, over its norm; weight: share of dense")
    print(f"attention's weight on the chosen keys; top keys: share of the {request.top} heaviest; {rows} rows a head")
    return 0


def settings(spec: Spec, given: Sequence[str]) -> dict[str, Any]:
    """Reads keyword arguments of a mechanism from the command line.

    Args:
        spec: The mechanism.
        given: ``"name=value"``; a value that is no Python literal is a word.

    Returns:
        Keyword arguments; fields of a dataclass ``config`` are put into one.

    Raises:
        ValueError: Another form, or a name that the mechanism does not take; the nearest is suggested.

    Example:
        >>> settings(find("neighborhood"), ["shape=(4, 4)", "window=3", "backend=blocked"])
        {'shape': (4, 4), 'window': 3, 'backend': 'blocked'}
    """
    taken = inspect.signature(spec.fn).parameters
    config = getattr(taken.get("config"), "default", None)
    fields = [f.name for f in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    options: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign:
            raise ValueError(f"set: expected name=value, got {text!r}")
        if name not in taken and name not in fields:
            raise unknown(f"setting of {spec.slug}", name, [*(n for n in taken if n not in "qkv"), *fields])
        (inner if name in fields else options)[name] = _value(value)
    if inner:
        options["config"] = dataclasses.replace(config, **inner)  # type: ignore[type-var]
    return options


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _inputs(request: Request) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]]:
    """Name, tensors and options of each input."""
    if request.input in KINDS:
        grouped, sign, width = request.heads.partition("x")
        if not sign or not width.isdigit():
            raise ValueError(f"heads: expected heads : key heads x width as 8:2x64, got {request.heads!r}")
        layout = head_layout(grouped, Options(width=int(width)))
        shape = Shape(request.length, layout.heads, layout.kv_heads, layout.width, request.dtype, request.seed)
        yield request.input, draw(request.input, shape)[:3], {}
        return
    path = Path(request.input)
    if not path.exists() and path.suffix != ".safetensors":
        raise unknown("input", request.input, [*KINDS, "a file of `manyheads capture`"])
    layers = read_captured(path)
    names = {int(layer.name.removeprefix("layer")): layer for layer in layers}
    for number in request.layers or names:
        if number not in names:
            raise ValueError(f"layer: {path.name} holds layers {sorted(names)}, got {number}")
        layer = names[number]
        length = min(request.length or layer.q.shape[2], layer.q.shape[2])
        yield layer.name, layer.tensors(length, getattr(torch, request.dtype)), {"scale": layer.scale}


def _cells(name: str, found: Lost) -> Sequence[str]:
    tiles = "" if found.tiles is None else f"{found.density:.1%}"
    share = "" if found.selection is None else f"{found.selection:.1%}"
    cells = (f"{found.error:.3g}", f"{found.mass:.1%}", f"{found.lowest:.1%}", f"{found.recall:.1%}")
    return (name, *cells, f"{found.area:.1%}", tiles, duration(found.selection_ms), duration(found.total_ms), share)
