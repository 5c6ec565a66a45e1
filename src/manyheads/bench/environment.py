"""What a measurement was made on: versions, processor, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import manyheads
from manyheads.bench.device import describe

PACKAGES = ("torch", "numpy", "transformers", "triton", "safetensors", "timm", "typer", "rich", "plotly")
PEERS = (
    "x-transformers",
    "performer-pytorch",
    "flash-linear-attention",
    "xformers",
    "natten",
    "sageattention",
    "flash-attn",
)
"""Packages that the benchmark measures when they are installed."""
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_tile",
    "amx_bf16",
    "neon",
    "sve",
)


def environment(device: str = "cpu") -> dict[str, Any]:
    """Describes the machine and the software, in plain JSON values.

    Nothing in it tells where files are or what the machine is called.

    Args:
        device: Where the benchmark runs; a GPU is described too.

    Returns:
        Versions by package, processor (vendor, model, cores, features that matter here), memory, threads,
        compiler and operating system.

    Example:
        >>> environment()["torch"] == torch.__version__
        True
    """
    cpu = processor()
    return {
        "manyheads": version("manyheads"),
        **{name: found for name in (*PACKAGES, *PEERS) if (found := version(name))},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_vendor": cpu["vendor"],
        "cpu_model": cpu["model"],
        "cpu_features": cpu["features"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "compiler": compiler(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **describe(device),
    }


def version(package: str) -> str | None:
    """The version of an installed package, ``None`` without one; nothing is imported.

    Example:
        >>> version("no-such-package") is None
        True
    """
    if package in ("torch", "manyheads"):
        return str(torch.__version__ if package == "torch" else manyheads.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> dict[str, str]:
    """Vendor, model and the instruction sets that decide the speed of products, as the system says."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""

    def entry(*names: str) -> str | None:
        for name in names:
            if found := re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE):
                return found.group(1).strip()
        return None

    flags = set((entry("flags", "Features") or "").split())
    return {
        "vendor": entry("vendor_id", "CPU implementer") or "unknown vendor",
        "model": entry("model name") or platform.processor() or platform.machine() or "unknown processor",
        "features": " ".join(f for f in FEATURES if f in flags),
    }


def memory_gib() -> float | None:
    """Physical memory in GiB, rounded to a tenth; ``None`` where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def compiler() -> str | None:
    """First line of what the C++ compiler says of itself, ``None`` without one."""
    path = os.environ.get("CXX") or "g++"
    if shutil.which(path) is None:
        path = "clang++"
        if shutil.which(path) is None:
            return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.splitlines()[0].strip() if said.stdout else None


def one_line(env: dict[str, Any]) -> str:
    """The device, the processor and the versions that decide a result, on one line.

    Example:
        >>> one_line({"cpu_vendor": "V", "cpu_model": "M", "threads": 1, "torch": "2.13.0", "python": "3.11"})
        'V · M · 1 thread · torch 2.13.0 · python 3.11'
    """
    parts = [f"{env['cpu_vendor']} · {env['cpu_model']}", threads_in_words(env["threads"], env.get("cores"))]
    if env.get("gpu"):
        parts.insert(0, f"{env['gpu']}, CUDA {env.get('cuda')}, driver {env.get('gpu_driver') or 'unknown'}")
    versions = [f"{name} {env[name]}" for name in ("torch", "python") if env.get(name)]
    return " · ".join([*parts, *versions])


def threads_in_words(threads: int, cores: int | None = None) -> str:
    """Names a run by its threads.

    Example:
        >>> threads_in_words(1, 8), threads_in_words(8, 8), threads_in_words(4, 8)
        ('1 thread of 8 cores', '8 threads', '4 threads of 8 cores')
    """
    of = f" of {cores} cores" if cores is not None and threads < cores else ""
    return f"{threads} thread{'' if threads == 1 else 's'}{of}"
