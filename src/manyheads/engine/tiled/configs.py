"""How a kernel is cut and compiled: one checked-in table, one record for each case of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

KERNELS = ("forward", "rows_backward", "keys_backward")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
WIDTHS = (64, 128, 256)
KINDS = ("plain", "general")
"""``plain``: softmax over masked scores; ``general``: with a bias, cap, dropout, skipping or another weight."""


@dataclass(frozen=True, slots=True)
class Config:
    """One row of the table.

    Attributes:
        bm, bn: Queries and keys of a tile.
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
def table() -> dict[Key, Config]:
    """The checked-in table: (kernel, architecture, head width, bytes of an element, kind) to configuration."""
    text = resources.files(__package__).joinpath("configs.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]
    head, *rows = lines
    found: dict[Key, Config] = {}
    for row in rows:
        cell = dict(zip(head, row, strict=True))
        key = (cell["kernel"], cell["arch"], int(cell["width"]), int(cell["bytes"]), cell["kind"])
        numbers = {n: int(cell[n]) for n in ("bm", "bn", "warps", "stages", "exp", "rescale", "persistent")}
        found[key] = Config(**numbers, source=cell["source"])
    return found


def choose(kernel: str, arch: str, width: int, itemsize: int, kind: str) -> Config:
    """The configuration of a call.

    Args:
        kernel: One of ``KERNELS``.
        arch: One of ``ARCHITECTURES``; see :func:`family`.
        width: Larger of the two head widths, at most 256.
        itemsize: Bytes of an element, 2 or 4.
        kind: One of ``KINDS``.

    Returns:
        The row of the table for the next larger width.

    Example:
        >>> choose("forward", "sm_90", 80, 2, "plain").bm
        128
    """
    bucket = next(w for w in WIDTHS if width <= w)
    return table()[kernel, arch, bucket, itemsize, kind]


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
