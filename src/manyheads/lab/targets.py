"""The GPUs that kernels are compiled for, and the limits that a compiled kernel must keep."""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.common.errors import unknown

KIB = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """One architecture, with the vendor's published limits.

    Attributes:
        name: As in the tables: ``"sm_90"``.
        backend: ``"cuda"`` or ``"hip"``.
        arch: As Triton wants it: 90, or ``"gfx942"``.
        lanes: Threads of a warp.
        shared: Bytes of shared memory that one program may take.
        shared_total: Bytes of shared memory of a multiprocessor.
        registers: 32-bit registers of a multiprocessor.
        most_registers: Registers that a thread can address; beyond them it spills.
        matrix: The matrix instruction that 16-bit products must use.
    """

    name: str
    backend: str
    arch: int | str
    lanes: int
    shared: int
    shared_total: int
    registers: int
    most_registers: int
    matrix: str

    def resident(self, registers: int, shared: int, warps: int) -> int:
        """Programs that a multiprocessor holds at once.

        Args:
            registers: Of a thread.
            shared: Bytes of a program.
            warps: Of a program.

        Returns:
            The number that registers, shared memory and the 64 warp slots (32 on AMD) allow; 0 if not even one fits.

        Example:
            >>> TARGETS["sm_90"].resident(217, 66048, 4), TARGETS["sm_90"].resident(203, 131072, 8)
            (2, 1)
        """
        # registers are handed out to warps in steps of 8 for each thread; a program takes 1 KiB of shared memory more
        taken = -(-max(registers, 1) // 8) * 8 * self.lanes * warps
        reserved = KIB if self.backend == "cuda" else 0
        slots = 64 if self.backend == "cuda" else 32
        return min(self.registers // taken, self.shared_total // (shared + reserved or 1), slots // warps)


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 * KIB, 164 * KIB, 65536, 255, "mma.sync"),
        Target("sm_90", "cuda", 90, 32, 227 * KIB, 228 * KIB, 65536, 255, "wgmma"),
        Target("sm_100", "cuda", 100, 32, 227 * KIB, 228 * KIB, 65536, 255, "tcgen05.mma"),
        Target("gfx942", "hip", "gfx942", 64, 64 * KIB, 64 * KIB, 131072, 512, "mfma"),
    )
}
"""Every target by name. Tensor memory of ``sm_100`` has 512 columns; see ``TENSOR_COLUMNS``."""

TENSOR_COLUMNS = 512


def target_named(name: str) -> Target:
    """Looks up a target.

    Args:
        name: One of ``TARGETS``.

    Returns:
        The target.

    Raises:
        ValueError: For an unknown name, with the nearest.

    Example:
        >>> target_named("sm_90").matrix
        'wgmma'
    """
    if name not in TARGETS:
        raise unknown("architecture", name, TARGETS)
    return TARGETS[name]
