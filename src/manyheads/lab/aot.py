"""Compiles a kernel ahead of time, without a GPU, and says what the result needs."""

from __future__ import annotations

import contextlib
import io
import os
import re
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from manyheads.common.errors import missing_extra
from manyheads.lab.registry import Constant, Kernel
from manyheads.lab.targets import Target

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element of each dtype that kernels are compiled for."""

INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"mma\.sync",
    "tcgen05.mma": r"tcgen05\.mma\.",
    "mfma": r"v_mfma",
    "cp.async": r"cp\.async\.c[ag]",
    "tma": r"cp\.async\.bulk\.tensor",
}
"""What is counted in the assembly of a kernel."""


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs.

    Attributes:
        registers: 32-bit registers of a thread.
        stack: Bytes of local memory of a thread; spills and arrays that no register holds.
        spilled: Bytes of a thread that are written to and read from local memory for want of registers.
        shared: Bytes of shared memory of a program.
        tensor: Columns of tensor memory (sm_100), else 0.
        instructions: How often each of ``INSTRUCTIONS`` stands in the assembly; those that do not are left out.
        warnings: What the compilers complained of.
        seconds: Time it took.
    """

    registers: int
    stack: int
    spilled: int
    shared: int
    tensor: int = 0
    instructions: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a line of JSON."""
        return {**asdict(self), "instructions": dict(self.instructions), "warnings": list(self.warnings)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Compiled:
        """Reads what ``to_json`` wrote.

        Example:
            >>> x = Compiled(203, 0, 0, 131072, instructions={"wgmma": 12})
            >>> Compiled.from_json(x.to_json()) == x
            True
        """
        return cls(**{**values, "warnings": tuple(values["warnings"])})


def compile_kernel(
    kernel: Kernel, constants: Mapping[str, Constant], dtype: str, target: Target, *, warps: int, stages: int
) -> Compiled:
    """Compiles a kernel for a target that need not be here.

    Args:
        kernel: Which.
        constants: Its compile-time arguments.
        dtype: One of ``DTYPES``.
        target: For which architecture.
        warps: Warps of a program.
        stages: Depth of the software pipeline.

    Returns:
        What the compiled kernel needs.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: ``TRITON_INTERPRET`` is set in this process, so that kernels are not compiled at all.
        ValueError: A constant is no argument of the kernel, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "TRITON_INTERPRET is set: in this process kernels are interpreted and cannot be compiled; "
            "use manyheads.lab.pool, which compiles in processes of its own, or unset it before Triton is imported"
        )
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise missing_extra("triton", "compiling kernels") from None
    function = kernel.load()
    signature = kernel.signature(list(function.arg_names), constants, dtype)
    names = list(signature)
    wide = {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.multiples_of_16(signature)}
    source = ASTSource(fn=function, signature=signature, constexprs=dict(constants), attrs=wide)
    # fusion is the default of Triton 3.6 to 3.9; naming it keeps later versions the same and 3.9 quiet
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    where = GPUTarget(target.backend, target.arch, target.lanes)
    start = time.perf_counter()
    with _verbose(triton) as said:
        made = triton.compile(source, target=where, options=options)
    seconds = round(time.perf_counter() - start, 2)
    complaints = tuple(dict.fromkeys(said.complaints()))
    if target.backend == "hip":
        return amd_resources(made.asm["amdgcn"], made.metadata.shared, complaints, seconds)
    tensor = int(getattr(made.metadata, "tmem_size", 0) or 0)
    return nvidia_resources(said.text(), made.asm["ptx"], made.metadata.shared, tensor, complaints, seconds)


def nvidia_resources(
    log: str, ptx: str, shared: int, tensor: int, complaints: tuple[str, ...] = (), seconds: float = 0.0
) -> Compiled:
    """Reads what the assembler says of a kernel.

    Args:
        log: What ``ptxas -v`` printed.
        ptx: The assembly.
        shared: Bytes of shared memory.
        tensor: Columns of tensor memory.
        complaints: Warnings that came before.
        seconds: Time it took.

    Returns:
        What the kernel needs.

    Raises:
        RuntimeError: The assembler said nothing about registers.

    Example:
        >>> log = '''ptxas info : Function properties for f
        ...     688 bytes stack frame, 956 bytes spill stores, 812 bytes spill loads
        ... ptxas info : Used 255 registers, used 1 barriers'''
        >>> found = nvidia_resources(log, "wgmma.mma_async", 98304, 0)
        >>> found.registers, found.stack, found.spilled, found.instructions
        (255, 688, 1768, {'wgmma': 1})
    """
    used = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or stack is None:
        raise RuntimeError(f"the assembler did not say what the kernel needs; it said: {log.strip() or 'nothing'}")
    frame, stores, loads = (int(x) for x in stack.groups())
    # such as C7510: matrix instructions that wait for each other for want of registers
    losses = (re.sub(r"^.*?(?=\(C\d+\))", "", s).strip() for s in log.splitlines() if re.search(r"\(C\d+\)", s))
    found = (*complaints, *dict.fromkeys(re.sub(r"in (the )?function '.*'", "", loss) for loss in losses))
    return Compiled(int(used[1]), frame, stores + loads, shared, tensor, counted(ptx), found, seconds)


def amd_resources(assembly: str, shared: int, complaints: tuple[str, ...] = (), seconds: float = 0.0) -> Compiled:
    """Reads the metadata that stands in the assembly of an AMD kernel.

    Args:
        assembly: The text.
        shared: Bytes of local data share.
        complaints: Warnings that came before.
        seconds: Time it took.

    Returns:
        What the kernel needs; registers count vector and accumulation registers together.

    Raises:
        RuntimeError: The metadata is not there.

    Example:
        >>> text = ".private_segment_fixed_size: 8\\n.vgpr_count: 128\\n.vgpr_spill_count: 2\\nv_mfma_f32 v_mfma_f32"
        >>> found = amd_resources(text, 16384)
        >>> found.registers, found.stack, found.spilled, found.instructions
        (128, 8, 16, {'mfma': 2})
    """

    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if match is None:
            raise RuntimeError(f"the assembly of the kernel does not say its {name}")
        return int(match[1])

    # a spilled register is written once and read once
    spilled = 8 * number("vgpr_spill_count")
    stack = number("private_segment_fixed_size")
    return Compiled(number("vgpr_count"), stack, spilled, shared, 0, counted(assembly), complaints, seconds)


def counted(assembly: str) -> dict[str, int]:
    """Counts the instructions that matter in a kernel.

    Example:
        >>> counted("mma.sync.aligned cp.async.cg.shared mma.sync.aligned")
        {'mma.sync': 2, 'cp.async': 1}
    """
    found = {name: len(re.findall(pattern, assembly)) for name, pattern in INSTRUCTIONS.items()}
    return {name: n for name, n in found.items() if n}


class _Said:
    """What the compilers print and warn of meanwhile."""

    def __init__(self) -> None:
        self.out = io.StringIO()
        self.caught: list[warnings.WarningMessage] = []

    def text(self) -> str:
        return self.out.getvalue()

    def complaints(self) -> list[str]:
        return [f"{w.category.__name__}: {w.message}" for w in self.caught]


@contextlib.contextmanager
def _verbose(triton: Any) -> Any:
    """Compiles afresh and hears what the assembler says: a kernel from the cache comes without its log."""
    said = _Said()
    compilation, nvidia = triton.knobs.compilation, triton.knobs.nvidia
    before = compilation.always_compile, nvidia.dump_ptxas_log
    compilation.always_compile, nvidia.dump_ptxas_log = True, True
    try:
        with contextlib.redirect_stdout(said.out), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
        said.caught = list(caught)
    finally:
        compilation.always_compile, nvidia.dump_ptxas_log = before
