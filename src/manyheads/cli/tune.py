"""``manyheads tune``: which configurations of the kernels are legal, and which is fastest."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from manyheads.bench.device import no_gpu
from manyheads.bench.environment import environment
from manyheads.cli.kernels import aligned, counter
from manyheads.common.errors import unknown
from manyheads.engine import configs
from manyheads.engine.configs import Config, Key
from manyheads.lab import search
from manyheads.lab.memory import Memory, folder, source_digest
from manyheads.lab.registry import kernels
from manyheads.lab.search import Found, Place
from manyheads.lab.targets import target_named
from manyheads.lab.tune import SWITCHES, Bench, Journal, in_words, tune

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_DEPENDS = ("gpu", "gpu_capability", "gpu_driver", "cuda", "torch", "triton")


@dataclass(frozen=True)
class Request:
    """What was asked.

    Attributes:
        kernels, archs, widths, dtypes, kinds: Only these rows of the table; empty for all.
        dry_run: Whether only to list the legal configurations.
        resources: Whether to choose by compiled resources instead of measuring.
        best: How many configurations of each row are measured, the most promising by the model; 0 for all.
        tokens: Length of the measured problem.
        out: The table to write.
        resume: Whether to go on with an earlier run.
        triton: Folders that hold further versions of Triton under which a choice by resources must be legal.
    """

    kernels: tuple[str, ...] = ()
    archs: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    dry_run: bool = False
    resources: bool = False
    best: int = 0
    tokens: int = 8192
    out: Path | None = None
    resume: bool = False
    triton: tuple[Path, ...] = ()


def run(request: Request) -> int:
    """Lists, chooses or measures.

    Args:
        request: What was asked.

    Returns:
        The exit status.

    Raises:
        ValueError: Something was asked that does not exist, or there is no GPU to measure on.
        ImportError: Triton is missing.
    """
    places = places_of(request)
    if request.dry_run:
        return _list(places, request)
    if request.resources:
        return _by_resources(places, request)
    if (reason := no_gpu()) is not None:
        raise ValueError(f"tune: measuring needs a GPU, but {reason}; --dry-run and --resources need none")
    from manyheads.cli.measure import Gpu, architecture

    own = architecture("cuda")
    if strange := [a for a in request.archs if a != own]:
        raise ValueError(f"arch: this GPU is served by {own}, {strange[0]} cannot be measured here")
    gpu = Gpu(tokens=request.tokens)
    return measured([p for p in places if p.arch == own], request, gpu, environment("cuda") | gpu.header())


def places_of(request: Request) -> list[Place]:
    """The rows of the table that were asked for.

    Args:
        request: What was asked.

    Returns:
        Rows.

    Raises:
        ValueError: For a name that does not exist, with the nearest.

    Example:
        >>> [str(p) for p in places_of(Request(("forward",), ("sm_90",), (64,), ("bfloat16",), ("plain",)))]
        ['forward sm_90 64 bf16 plain']
    """
    asked = (
        ("kernel", request.kernels, configs.KERNELS), ("architecture", request.archs, configs.ARCHITECTURES),
        ("dtype", request.dtypes, tuple(_BYTES)),
        ("kind", request.kinds, tuple(dict.fromkeys(kind for kinds in configs.KINDS.values() for kind in kinds))),
    )  # fmt: skip
    for what, some, known in asked:
        for name in some:
            if name not in known:
                raise unknown(what, name, known)
    for width in request.widths:
        if width not in configs.WIDTHS:
            raise ValueError(f"width: expected one of {', '.join(map(str, configs.WIDTHS))}, got {width}")
    sizes = {_BYTES[d] for d in request.dtypes or _BYTES}
    wanted = (request.kernels, request.archs, request.widths, sizes, request.kinds)
    every = configs.every_key()
    return [Place(*key) for key in every if all(not w or x in w for x, w in zip(key, wanted, strict=True))]


def measured(places: Sequence[Place], request: Request, bench: Bench, depends: Mapping[str, Any]) -> int:
    """Measures rows and writes the table that results.

    Args:
        places: Which rows.
        request: What was asked.
        bench: What measures.
        depends: Environment and problem, on which the times depend.

    Returns:
        The exit status.
    """
    device = str(depends.get("gpu") or "cpu")
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    out = request.out or folder() / "tuning" / f"{name}.tsv"
    header = {k: depends.get(k) for k in (*_DEPENDS, "tokens", "heads", "mask")}
    header["kernels"] = {name: source_digest(kernel.path) for name, kernel in kernels().items()}
    journal = Journal(out.with_suffix(".jsonl"), header, resume=request.resume)
    memory = Memory()
    incumbents = configs.table()

    def legal(place: Place) -> list[Config]:
        found = search.legal_configs(place, memory)
        return [f.config for f in found[: request.best or None]]

    say = functools.partial(print, flush=True)
    say(f"device: {device}; rows: {len(places)}; finished trials go to {out.with_suffix('.jsonl')}")
    done: dict[Key, Config] = {}
    for place in places:
        done |= tune([place], bench, incumbents=incumbents, legal=legal, journal=journal, source=device, progress=say)
        _write(out, done)
    changed = sum(done[k] != replace(incumbents[k], source=device) for k in done)
    say(f"{len(done)} rows measured, {changed} changed: {out}\nuse it with {configs.VARIABLE}={out}")
    return 0


def _list(places: Sequence[Place], request: Request) -> int:
    memory = Memory()
    total = 0
    for place in places:
        some = search.candidates(place)
        found = search.legal_configs(place, memory, progress=counter(len(some)))
        total += len(found)
        print(f"{place}: {len(found)} legal of {len(some)} compiled")
        if found:
            print(aligned([("tile", "warps", "stages", "registers", "shared KiB", "programs", "cycles a pair"),
                           *map(_row, found[: request.best or None])]) + "\n")  # fmt: skip
    switches = sum(len(values) for _, values in SWITCHES)
    print(f"{total} legal configurations of {len(places)} rows; the winner of a forward row tries {switches} switches")
    return 0


def _row(found: Found) -> tuple[str, ...]:
    c, need = found.config, found.made.compiled
    assert need is not None
    resident = target_named(found.made.case.target).resident(need.registers, need.shared, c.warps)
    return tuple(
        map(str, (f"{c.bm}x{c.bn}", c.warps, c.stages, need.registers, need.shared // 1024, resident))
    ) + (f"{found.cycles:.3f}",)  # fmt: skip


def _by_resources(places: Sequence[Place], request: Request) -> int:
    if request.out is None:
        raise ValueError("resources: name the table to write with --out")
    memories = [Memory(), *(Memory(triton=path) for path in request.triton)]
    rows: dict[Key, Config] = {}
    remarks: dict[Key, str] = {}
    for place in places:
        found, note = search.best(place, memories)
        if found is None:
            print(f"{place}: {note}", flush=True)
            continue
        rows[place.key] = found.config
        if note:
            remarks[place.key] = f"{place}: {note}"
        print(f"{place}: {in_words(found.config)}{f' ({note})' if note else ''}", flush=True)
        _write(request.out, rows, remarks)
    return 0


def _write(out: Path, rows: Mapping[Key, Config], remarks: Mapping[Key, str] | None = None) -> None:
    """Rows of an existing table stay where they are, unless they are written anew."""
    before = configs.table(str(out)) if out.is_file() else {}
    order = {key: i for i, key in enumerate(configs.every_key())}
    merged = dict(sorted({**before, **rows}.items(), key=lambda entry: order[entry[0]]))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(configs.render(merged, remarks), encoding="utf-8")
    except OSError as error:
        raise ValueError(f"out: cannot write {out}: {error.strerror}") from None
    configs.table.cache_clear()
