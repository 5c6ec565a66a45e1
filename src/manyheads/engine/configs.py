"""How kernels are cut and compiled: checked-in tables of all engines, one record for each case of a kernel."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

_TILED, _SCAN = ("plain", "general", "heavy"), ("forward", "backward")
KINDS: Mapping[str, tuple[str, ...]] = {
    "forward": _TILED,
    "rows_backward": _TILED,
    "keys_backward": _TILED,
    "carry": _SCAN,
    "mix": (*_SCAN, "sums"),
    "listed": ("lists",),
    "listed_rows": ("lists",),
    "listed_keys": ("lists",),
    "entries_forward": ("plain",),
    "entries_backward": ("plain",),
}
"""Every kernel with a row in a table, and its kinds of calls.

Of ``tiled`` (``forward``, ``rows_backward``, ``keys_backward``): ``plain``: softmax over masked scores; ``general``:
with one of a bias, cap, dropout, skipping or another weight; ``heavy``: with several of them. Of ``scan`` (``carry``,
``mix``): outputs, gradients, and gradients together with the sums from which those of decays are made. Of ``gather``
(``listed``, ``listed_rows``, ``listed_keys``): one kind; of ``tiled`` by key tiles (``entries_forward``,
``entries_backward``): ``plain``.
"""
KERNELS = tuple(KINDS)
FILES = ("tiled/configs.tsv", "tiled/entries.tsv", "scan/configs.tsv", "gather/configs.tsv")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = (64, 128, 256)
VARIABLE = "MANYHEADS_CONFIGS"
"""Environment variable with the name of a table whose rows go before the checked-in ones."""

COLUMNS = (
    "kernel", "arch", "width", "bytes", "kind", "bm", "bn", "warps", "stages", "exp", "rescale", "persistent", "source",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Config:
    """One row of the table.

    Attributes:
        bm, bn: Queries and keys of a tile. Of ``carry`` the block of the state, keys' width by values' width; of
            ``mix`` how much of the width is multiplied at once, and the columns of the result. Of ``listed`` and
            ``listed_rows`` at most so many query heads, and ids; of ``listed_keys`` query rows (``bn`` is not used). Of
            ``entries_forward`` and ``entries_backward`` rows (heads of queries) and, at most, keys.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        exp: Which ``2 ** x``: 0 the special-function unit, 1 the polynomial, 4 the polynomial for one in four.
        rescale: Growth of the running maximum, as a power of 2, that is let pass without rescaling; 0 for none.
        persistent: Programs for each multiprocessor that take several rows of tiles in turn; 0: a program a row.
        source: Where the row comes from: ``"resources"`` (registers and shared memory of the compiled kernel) or the
            device on which it was measured.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    exp: int = 0
    rescale: int = 0
    persistent: int = 0
    source: str = "resources"


Key = tuple[str, str, int, int, str]


@functools.cache
def table(path: str | None = None) -> Mapping[Key, Config]:
    """The tables: (kernel, architecture, head width, bytes of an element, kind) to configuration.

    Args:
        path: The file; the checked-in tables by default, with the rows of the one that ``MANYHEADS_CONFIGS`` names in
            front of it.

    Returns:
        The rows.

    Raises:
        ValueError: There is no such file, or it is not such a table; says which line.

    Example:
        >>> sorted({kernel for kernel, *_ in table()})
        ['carry', 'entries_backward', 'entries_forward', 'forward', 'keys_backward', 'listed', ...]
    """
    if path is not None:
        try:
            return parse(Path(path).read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"configurations: cannot read {path}: {error}") from None
    shipped: dict[Key, Config] = {}
    for name in FILES:
        shipped |= parse(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"), name)
    own = os.environ.get(VARIABLE)
    return {**shipped, **table(own)} if own else shipped


def every_key() -> list[Key]:
    """Every row that the tables must have, in their order.

    Example:
        >>> ("carry", "sm_90", 128, 2, "forward") in every_key()
        True
    """
    return [
        (kernel, arch, width, size, kind)
        for kernel in KERNELS
        for arch in ARCHITECTURES
        for width in WIDTHS
        for size in (2, 4)
        for kind in KINDS[kernel]
    ]


def parse(text: str, name: str = "configs.tsv") -> dict[Key, Config]:
    """Reads the text of a table.

    Args:
        text: Tab-separated, the names of the columns first; lines that begin with ``#`` are remarks.
        name: What to call it in errors.

    Returns:
        Its rows.

    Raises:
        ValueError: It is not such a table; says which line.

    Example:
        >>> parse("kernel\\tarch")
        Traceback (most recent call last):
        ValueError: configs.tsv: expected the columns kernel arch width ...
    """
    lines = [(n, line.split("\t")) for n, line in enumerate(text.splitlines(), 1) if line and line[0] != "#"]
    if not lines or tuple(lines[0][1]) != COLUMNS:
        raise ValueError(f"{name}: expected the columns {' '.join(COLUMNS)}")
    found: dict[Key, Config] = {}
    for n, cells in lines[1:]:
        try:
            cell = dict(zip(COLUMNS, cells, strict=True))
            key = (cell["kernel"], cell["arch"], int(cell["width"]), int(cell["bytes"]), cell["kind"])
            bm, bn, warps, stages, exp, rescale, persistent = (int(cell[c]) for c in COLUMNS[5:12])
            found[key] = Config(bm, bn, warps, stages, exp, rescale, persistent, cell["source"])
        except ValueError as error:
            raise ValueError(f"{name}, line {n}: {error}") from None
        if strange := wrong(key, found[key]):
            raise ValueError(f"{name}, line {n}: {strange}")
    return found


def render(rows: Mapping[Key, Config], remarks: Mapping[Key, str] | None = None) -> str:
    """The text of a table.

    Args:
        rows: Its rows, in the order in which they shall stand.
        remarks: What stands above a row.

    Returns:
        Text that ``parse`` reads back.
    """
    lines = ["\t".join(COLUMNS)]
    for key, config in rows.items():
        if remarks and key in remarks:
            lines.append(f"# {remarks[key]}")
        values = (config.bm, config.bn, config.warps, config.stages, config.exp, config.rescale, config.persistent)
        lines.append("\t".join(map(str, (*key, *values, config.source))))
    return "\n".join(lines) + "\n"


def wrong(key: Key, config: Config) -> str | None:
    """What is not legal in a row, whatever the compiler says; None if nothing is.

    Example:
        >>> wrong(("forward", "sm_90", 64, 2, "plain"), Config(96, 64, 4, 2))
        'bm: expected a power of two from 16 to 256, got 96'
    """
    kernel, arch, width, itemsize, kind = key
    choices: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("kernel", kernel, KERNELS), ("arch", arch, ARCHITECTURES), ("width", width, WIDTHS),
        ("bytes", itemsize, (2, 4)), ("kind", kind, KINDS.get(kernel, ())), ("warps", config.warps, (1, 2, 4, 8, 16)),
        ("stages", config.stages, (1, 2, 3, 4, 5)), ("exp", config.exp, (0, 1, 4)),
        ("persistent", config.persistent, (0, 1, 2, 3, 4)),
    )  # fmt: skip
    for name, value, legal in choices:
        if value not in legal:
            return f"{name}: expected one of {', '.join(map(str, legal))}, got {value}"
    for name, size in (("bm", config.bm), ("bn", config.bn)):
        if not 16 <= size <= 256 or size & (size - 1):
            return f"{name}: expected a power of two from 16 to 256, got {size}"
    if not 0 <= config.rescale <= 8:
        return f"rescale: expected 0 to 8, got {config.rescale}"
    if arch == "gfx942" and config.exp == 4:
        return "exp: 4 is written in the assembly of NVIDIA's GPUs"
    return None


_instead: dict[Key, Config] = {}
# not a context variable: the backward of a GPU runs in a thread of torch's own


@contextlib.contextmanager
def using(rows: Mapping[Key, Config]) -> Iterator[None]:
    """Lets some rows stand instead of those of the table, inside the block and in every thread.

    Args:
        rows: Some configurations.

    Yields:
        Nothing.

    Example:
        >>> key = ("forward", "sm_90", 64, 2, "plain")
        >>> with using({key: Config(32, 32, 4, 1)}):
        ...     choose(*key).bm
        32
    """
    before = dict(_instead)
    _instead.update(rows)
    try:
        yield
    finally:
        _instead.clear()
        _instead.update(before)


def choose(kernel: str, arch: str, width: int, itemsize: int, kind: str) -> Config:
    """The configuration of a call.

    Args:
        kernel: One of ``KERNELS``.
        arch: One of ``ARCHITECTURES``; see :func:`family`.
        width: Larger of the two head widths, at most 256.
        itemsize: Bytes of an element, 2 or 4.
        kind: One of the ``KINDS`` of the kernel.

    Returns:
        The row of the table for the next larger width.

    Example:
        >>> choose("forward", "sm_90", 80, 2, "plain").bm
        128
    """
    key = (kernel, arch, next(w for w in WIDTHS if width <= w), itemsize, kind)
    return _instead[key] if key in _instead else table()[key]


def family(backend: str, arch: int | str) -> str:
    """The architecture of the table that serves a device.

    Args:
        backend: ``"cuda"`` or ``"hip"``.
        arch: Compute capability as Triton gives it (``90``), or the name of an AMD architecture.

    Returns:
        The nearest older entry of ``ARCHITECTURES`` whose limits the device also has; consumer cards of the Blackwell
        generation (``120``) and ``86``, ``89`` have less shared memory and no newer instructions, so they take
        ``sm_80``.

    Example:
        >>> [family("cuda", a) for a in (80, 86, 90, 100, 120)], family("hip", "gfx950")
        (['sm_80', 'sm_80', 'sm_90', 'sm_100', 'sm_80'], 'gfx942')
    """
    if backend == "hip":
        return "gfx942"
    number = int(arch)
    return "sm_100" if 100 <= number < 120 else "sm_90" if 90 <= number < 100 else "sm_80"
