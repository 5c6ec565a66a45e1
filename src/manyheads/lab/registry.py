"""Every kernel of every engine, and the cases in which the gate compiles it."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from manyheads.common.errors import unknown

ENGINES = {name: f"manyheads.lab.{name}" for name in ("tiled", "entries", "scan", "gather")}
"""Engines with kernels, and the module that describes them, with ``KERNELS`` and ``cases()``, for the tuner also with
``variants()``, ``shapes()``, ``case()``, ``cycles()`` and ``bound()``. A new engine is a name here and such a
module."""

EXACT = "float32 products run on the plain units, whose operands lie in registers"
"""Why a kernel may spill in float32."""

Constant = int | float | str


@dataclass(frozen=True)
class Kernel:
    """What has to be known of a kernel to compile it without calling it.

    Attributes:
        name: ``"<engine>.<function>"``.
        path: ``"<module>:<function>"``; imported only where it is compiled.
        pointers: Element type of each pointer argument, in Triton's words (``"fp32"``, ``"i32"``); ``"data"`` is the
            dtype of the case, ``"factor"`` the one in which sums are factors of products: bf16 or else fp32.
        floats: Scalar arguments that are float32; every other one is a 32-bit integer.
        aligned: Pattern of the names of integer arguments that are multiples of 16 in every fast call, such as the
            strides of contiguous tensors; without it no load is wide.
        unaligned: Pointers that may begin anywhere; all others begin at a multiple of 16 bytes.
    """

    name: str
    path: str
    pointers: Mapping[str, str]
    floats: frozenset[str] = frozenset()
    aligned: str = r"(?!)"
    unaligned: frozenset[str] = frozenset()

    def load(self) -> Any:
        """Imports the function; needs Triton."""
        module, _, function = self.path.partition(":")
        return getattr(importlib.import_module(module), function)

    def signature(self, names: list[str], constants: Mapping[str, Constant], dtype: str) -> dict[str, str]:
        """The type of each argument, in order.

        Args:
            names: Arguments of the function.
            constants: What is fixed at compile time.
            dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.

        Returns:
            Types in Triton's words, ``"constexpr"`` for constants.

        Raises:
            ValueError: A constant or pointer is no argument of the function.

        Example:
            >>> kernel = Kernel("demo.copy", "demo:copy", {"x": "data", "y": "fp32"}, frozenset({"scale"}))
            >>> kernel.signature(["x", "y", "n", "scale", "BLOCK"], {"BLOCK": 64}, "bf16")
            {'x': '*bf16', 'y': '*fp32', 'n': 'i32', 'scale': 'fp32', 'BLOCK': 'constexpr'}
        """
        for kind, wanted in (("constant", constants), ("pointer", self.pointers), ("float", self.floats)):
            if strange := sorted(set(wanted) - set(names)):
                raise ValueError(f"{self.name}: {kind} {strange[0]!r} is no argument of the kernel: {', '.join(names)}")

        def type_of(name: str) -> str:
            if name in constants:
                return "constexpr"
            if name in self.pointers:
                element = self.pointers[name]
                if element == "factor":
                    element = "bf16" if dtype == "bf16" else "fp32"
                return "*" + (dtype if element == "data" else element)
            return "fp32" if name in self.floats else "i32"

        return {name: type_of(name) for name in names}

    def multiples_of_16(self, signature: Mapping[str, str]) -> list[str]:
        """Names of the arguments that Triton may take for multiples of 16."""
        return [
            name
            for name, kind in signature.items()
            if (kind[0] == "*" and name not in self.unaligned) or (kind == "i32" and re.fullmatch(self.aligned, name))
        ]


@dataclass(frozen=True)
class Case:
    """One compilation of a kernel.

    Attributes:
        kernel: Name of the kernel.
        target: Name of the target.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        width: Head width.
        variant: What is switched on; an engine's own words.
        constants: Compile-time arguments.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
        matrix: Whether its products must become the matrix instruction of the target.
        may_spill: Why it may spill; empty if it may not.
        quick: Whether ``make test`` compiles it.
    """

    kernel: str
    target: str
    dtype: str
    width: int
    variant: str
    constants: Mapping[str, Constant] = field(compare=False)
    warps: int = field(compare=False)
    stages: int = field(compare=False)
    matrix: bool = field(default=True, compare=False)
    may_spill: str = field(default="", compare=False)
    quick: bool = field(default=False, compare=False)

    @property
    def id(self) -> str:
        """A readable name: ``"tiled.forward sm_90 bf16 128 plain"``."""
        return f"{self.kernel} {self.target} {self.dtype} {self.width} {self.variant}"


@functools.cache
def kernels() -> dict[str, Kernel]:
    """Every kernel by name.

    Example:
        >>> "tiled.forward" in kernels()
        True
    """
    return {k.name: k for module in ENGINES.values() for k in importlib.import_module(module).KERNELS}


def kernel_named(name: str) -> Kernel:
    """Looks up a kernel.

    Args:
        name: ``"<engine>.<function>"``.

    Returns:
        The kernel.

    Raises:
        ValueError: For an unknown name, with the nearest.

    Example:
        >>> kernel_named("tiled.froward")
        Traceback (most recent call last):
        ValueError: unknown kernel 'tiled.froward': did you mean 'tiled.forward'? ...
    """
    if name not in kernels():
        raise unknown("kernel", name, kernels())
    return kernels()[name]


def engine_of(kernel: str) -> Any:
    """The module that describes a kernel of the configuration table.

    Args:
        kernel: Without the engine: ``"forward"``.

    Returns:
        One of the modules of ``ENGINES``.

    Example:
        >>> engine_of("carry").__name__
        'manyheads.lab.scan'
    """
    found = next(name for name in kernels() if name.partition(".")[2] == kernel)
    return importlib.import_module(ENGINES[found.partition(".")[0]])


def cases() -> Iterator[Case]:
    """Every case of every engine, quick ones first."""
    found = [case for module in ENGINES.values() for case in importlib.import_module(module).cases()]
    yield from sorted(found, key=lambda case: not case.quick)
