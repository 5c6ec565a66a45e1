"""Byte-level language modelling on the sources of Python's standard library, which every machine here has."""

from __future__ import annotations

import functools
import hashlib
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from .base import Batch, Task, everywhere

_HELD_OUT = 8
"""One file in so many is held out."""


class Text(NamedTuple):
    """The bytes to learn from and those to be judged on.

    Attributes:
        taught: bytes as an integer tensor.
        held_out: bytes of other files.
        source: Where they are from, with a digest of all of them.
    """

    taught: Tensor
    held_out: Tensor
    source: str


@functools.lru_cache(maxsize=1)
def standard_library() -> Text:
    """Reads the modules at the top of the standard library, in the order of their names.

    The choice depends on the names only, hence on the version of Python; one file in eight is held out, by place.

    Returns:
        The text.

    Raises:
        OSError: There are no sources, as in a Python that was packed into an archive.
    """
    found = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"), key=lambda path: path.name)
    if len(found) < _HELD_OUT:
        raise OSError("the sources of the standard library are not on this machine")
    parts = [path.read_bytes() for path in found]
    digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    taught = b"".join(p for i, p in enumerate(parts) if i % _HELD_OUT)
    held_out = b"".join(p for i, p in enumerate(parts) if not i % _HELD_OUT)
    version = ".".join(map(str, sys.version_info[:3]))
    source = f"standard library of Python {version}, {len(found)} files, sha256 {digest}"
    return Text(_bytes(taught), _bytes(held_out), source)


def task(length: int = 128, *, text: Text | None = None) -> Task:
    """Makes the task: the next byte of a random window.

    Args:
        length: Bytes of an example.
        text: What to read; the standard library by default.

    Returns:
        The task; its chance is the entropy of single bytes of the held-out text.

    Raises:
        OSError: As :func:`standard_library`.
        ValueError: Text that is shorter than an example.

    Example:
        >>> task(16).draw(2, torch.Generator().manual_seed(0), False).inputs.shape
        torch.Size([2, 16])
    """
    text = standard_library() if text is None else text
    if min(len(text.taught), len(text.held_out)) < length + 2:
        raise ValueError(f"length: the text has no window of {length + 1} bytes")
    share = torch.bincount(text.held_out, minlength=256).double() / len(text.held_out)
    entropy = -float((share * share.clamp_min(1e-12).log2()).sum())

    def draw(count: int, generator: Generator, held_out: bool) -> Batch:
        source = text.held_out if held_out else text.taught
        starts = torch.randint(len(source) - length - 1, (count, 1), generator=generator)
        window = source[starts + torch.arange(length + 1)]
        everything = everywhere(window[:, 1:])
        return Batch(window[:, :-1], window[:, 1:], everything, everything)

    what = f"the next byte of source code, {length} bytes"
    return Task("bytes", what, 256, 256, length, "bits a byte", round(entropy, 4), draw, source=text.source)


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).astype(np.int64))
