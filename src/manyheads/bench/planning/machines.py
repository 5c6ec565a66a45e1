"""Machines to plan for: published peak rates of those that are not here, and the limits of the one that is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from manyheads.bench import environment, limits
from manyheads.bench.device import no_gpu, resolve
from manyheads.bench.limits import Limits
from manyheads.bench.store import Results
from manyheads.common.errors import unknown

HERE = ("here", "cpu", "cuda")
"""Words for the machine that the command runs on: its GPU if it has one, its processor, its GPU."""

NOW = "measured now"
"""The ``source`` of a machine that was measured here and now."""
MIB = 1 << 20


@dataclass(frozen=True)
class Machine:
    """A machine as the cost model sees it.

    Attributes:
        name: What it is called.
        kind: ``"cpu"`` or ``"gpu"``.
        limits: Its rates, measured or published; see ``source``.
        memory_gib: Memory in 2**30 bytes, ``None`` where unknown.
        cache: Bytes of the cache that all units share.
        units: Multiprocessors, or cores.
        source: Where the numbers are from.
        measured: Whether the limits were measured, on this machine or for a results file; otherwise they are published
            peaks, and every prediction from them is modelled.
        aliases: Other spellings.
    """

    name: str
    kind: Literal["cpu", "gpu"]
    limits: Limits
    memory_gib: float | None
    cache: int
    units: int
    source: str
    measured: bool = False
    aliases: tuple[str, ...] = ()

    def rates(self) -> str:
        """Its rates on one line.

        Example:
            >>> find("A100").rates()
            'float16 312 TFLOP/s, bfloat16 312 TFLOP/s, float32 19.5 TFLOP/s, exp 2400 G/s, memory 2039 GB/s'
        """
        words = [f"{dtype} {_flops(rate)}" for dtype, rate in self.limits.matrix.items()]
        words += [f"exp {_three(self.limits.exp_rate)} G/s"] if self.limits.exp_rate else []
        words += [f"memory {self.limits.copy:.0f} GB/s"] if self.limits.copy else []
        return ", ".join(words)


def names() -> tuple[str, ...]:
    """Every device that can be named."""
    return (*HERE, *(device.name for device in MACHINES))


def find(name: str) -> Machine:
    """Returns a device of the table.

    Args:
        name: Its name, in any case, or an alias.

    Returns:
        The device, with published peaks.

    Raises:
        ValueError: No device has this name; the nearest is suggested.

    Example:
        >>> find("h100").limits.matrix["bfloat16"]
        989000.0
        >>> find("H10")
        Traceback (most recent call last):
        ValueError: unknown device 'H10': did you mean 'H100'? known: A100, A100-40GB, B200, H100, H100-PCIe, H200, \
L4, L40S, MI300X, MI325X, RTX4090, cpu, cuda, here
    """
    plain = _plain(name)
    for device in MACHINES:
        if plain in map(_plain, (device.name, *device.aliases)):
            return device
    raise unknown("device", name, names())


def called(name: str) -> Machine | None:
    """The device of the table that a driver or a results file means by a name, ``None`` if there is none.

    Args:
        name: Such as ``torch.cuda.get_device_name()`` returns.

    Example:
        >>> called("NVIDIA H100 PCIe").name, called("NVIDIA A100-SXM4-40GB").name, called("cpu")
        ('H100-PCIe', 'A100-40GB', None)
    """
    words = _words(name)
    fitting = [(len(_words(own)), d) for d in MACHINES for own in (d.name, *d.aliases) if _words(own) <= words]
    return max(fitting, key=lambda found: found[0])[1] if fitting else None


def here(dtypes: Iterable[str], *, kind: str = "here", known: Results | None = None) -> Machine:
    """This machine, its limits measured now, or the machine of a results file.

    Args:
        dtypes: Dtypes whose matrix rates are needed.
        kind: A word of ``HERE``.
        known: Results whose header holds limits; nothing is measured then.

    Returns:
        The machine.

    Raises:
        ValueError: The results hold no limits, or a GPU was asked for and there is none.

    Example:
        >>> header = {"limits": {"matrix": {"float32": 300.0}, "threads": 2}, "started": "2026-01-02"}
        >>> here([], known=Results(header)).source
        'measured 2026-01-02, results'
    """
    if known is not None:
        return _of_results(known)
    on = "cuda" if kind == "cuda" or (kind == "here" and no_gpu() is None) else "cpu"
    resolve(on)
    found = limits.measure(tuple(dict.fromkeys(dtypes)), device=on)
    return _described(found, environment.environment(on), NOW)


def _of_results(results: Results) -> Machine:
    """The machine on which a results file was made."""
    if "limits" not in results.header:
        raise ValueError(f"results: {results.path} holds no machine limits; name a device, or another file")
    when = str(results.header.get("started", "an unknown day"))[:10]
    source = f"measured {when}, {results.path.name if results.path else 'results'}"
    return _described(Limits.from_dict(results.header["limits"]), results.header.get("environment", {}), source)


def _described(found: Limits, env: Mapping[str, Any], source: str) -> Machine:
    """A machine from its limits and what the environment says of it."""
    if found.device == "cpu":
        threads = int(found.threads or env.get("threads") or 1)
        words = environment.threads_in_words(threads)
        name = f"{env.get('cpu_vendor', 'unknown')} {env.get('cpu_model', 'processor')}, {words}"
        return Machine(name, "cpu", found, env.get("memory_gib"), _CPU_CACHE, threads, source, True)
    twin = called(found.device)
    cache = int(env["gpu_l2_mib"] * MIB) if "gpu_l2_mib" in env else twin.cache if twin else 32 * MIB
    memory = env.get("gpu_memory_gib", twin.memory_gib if twin else None)
    units = int(env.get("gpu_processors", twin.units if twin else 100))
    return Machine(found.device, "gpu", found, memory, cache, units, source, True)


_CPU_CACHE = 2 * MIB
"""Of a core's own second-level cache; processors with more gain little in exact attention."""

_SFU = "16 special functions per clock and multiprocessor (CUDA C++ Programming Guide, arithmetic throughput)"
_QUARTER = "assumed at a quarter of the vector lanes"
_DENSE = "without sparsity"


def _gpu(
    name: str,
    *aliases: str,
    half: float,
    single: float,
    copy: float,
    exp: float,
    memory: float,
    cache: int,
    units: int,
    source: str,
) -> Machine:
    """Rates in 1e12 per second, ``copy`` in 1e9 bytes per second, memory in 2**30 and cache in 2**20 bytes."""
    matrix = {"float16": half * 1e3, "bfloat16": half * 1e3, "float32": single * 1e3}
    rates = Limits(matrix=matrix, copy=copy, exp_rate=exp * 1e3, device=name)
    return Machine(name, "gpu", rates, memory, cache * MIB, units, source, aliases=aliases)


MACHINES = (
    _gpu(
        "H100", "H100 SXM", "H100 80GB HBM3", half=989, single=67, copy=3350, exp=3.9, memory=80, cache=50,
        units=132, source=f"NVIDIA H100 datasheet (SXM, {_DENSE}); exponentials: FlashAttention-3, arXiv 2407.08608",
    ),
    _gpu(
        "H100-PCIe", half=756, single=51, copy=2000, exp=3.2, memory=80, cache=50, units=114,
        source=f"NVIDIA H100 datasheet (PCIe, {_DENSE}); exponentials: {_SFU}, 1.76 GHz",
    ),
    _gpu(
        "H200", "H200 SXM", half=989, single=67, copy=4800, exp=3.9, memory=141, cache=50, units=132,
        source=f"NVIDIA H200 datasheet (SXM, {_DENSE}); exponentials as H100, the same chip",
    ),
    _gpu(
        "A100", "A100 80GB", "A100-80GB", "A100 SXM4 80GB", half=312, single=19.5, copy=2039, exp=2.4, memory=80,
        cache=40, units=108, source=f"NVIDIA A100 datasheet (SXM, {_DENSE}); exponentials: {_SFU}, 1.41 GHz",
    ),
    _gpu(
        "A100-40GB", "A100 40GB", "A100 SXM4 40GB", half=312, single=19.5, copy=1555, exp=2.4, memory=40,
        cache=40, units=108, source=f"NVIDIA A100 datasheet (SXM, {_DENSE}); exponentials: {_SFU}, 1.41 GHz",
    ),
    _gpu(
        "B200", "HGX B200", half=2250, single=75, copy=7700, exp=4.4, memory=180, cache=126, units=148,
        source=f"NVIDIA HGX B200 datasheet, per GPU ({_DENSE}); exponentials: {_SFU}, 1.85 GHz",
    ),
    _gpu(
        "L40S", half=362, single=91.6, copy=864, exp=5.7, memory=48, cache=96, units=142,
        source=f"NVIDIA L40S datasheet ({_DENSE}); exponentials: {_SFU}, 2.52 GHz",
    ),
    _gpu(
        "L4", half=121, single=30.3, copy=300, exp=1.9, memory=24, cache=48, units=58,
        source=f"NVIDIA L4 datasheet ({_DENSE}); exponentials: {_SFU}, 2.04 GHz",
    ),
    _gpu(
        "RTX4090", "RTX 4090", "GeForce RTX 4090", half=165, single=82.6, copy=1008, exp=5.2, memory=24,
        cache=72, units=128,
        source=f"NVIDIA Ada GPU architecture paper (float32 sums, {_DENSE}); exponentials: {_SFU}, 2.52 GHz",
    ),
    _gpu(
        "MI300X", "Instinct MI300X", half=1307, single=163.4, copy=5300, exp=10.2, memory=192, cache=256,
        units=304,
        source=f"AMD Instinct MI300X datasheet ({_DENSE}); exponentials: {_QUARTER}, 2.1 GHz",
    ),
    _gpu(
        "MI325X", "Instinct MI325X", half=1307, single=163.4, copy=6000, exp=10.2, memory=256, cache=256,
        units=304,
        source=f"AMD Instinct MI325X datasheet ({_DENSE}); exponentials: {_QUARTER}, 2.1 GHz",
    ),
)  # fmt: skip
"""Published peaks; the true rates of any kernel are lower, and a device's clocks depend on power and heat."""


def _flops(rate: float) -> str:
    """A rate in 1e9 operations per second, for people."""
    return f"{_three(rate)} GFLOP/s" if rate < 1e4 else f"{_three(rate / 1e3)} TFLOP/s"


def _three(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", name.lower()))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
