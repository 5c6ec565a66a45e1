"""``manyheads doctor``: what works on this machine, and what would make more work."""

from __future__ import annotations

import torch

from manyheads.bench import memory
from manyheads.bench.environment import PACKAGES, environment, version

EXTRAS = {
    "bench": ("typer", "rich", "plotly", "matplotlib"),
    "hf": ("transformers", "safetensors"),
    "triton": ("triton",),
    "timm": ("timm",),
    "retrieval": ("faiss-cpu",),
    "quantum": ("pennylane",),
    "dev": ("pytest", "hypothesis", "ruff", "mypy"),
}


def run() -> int:
    """Prints the report.

    Returns:
        The exit status: always 0, for what is missing is not an error.
    """
    for section, lines in report().items():
        print(f"{section}:")
        for line in lines:
            print(f"  {line}")
    return 0


def report() -> dict[str, list[str]]:
    """Collects the report by section.

    Returns:
        Lines by heading.
    """
    env = environment()
    shown = {
        "python": env["python"],
        "manyheads": env["manyheads"],
        **{p: env[p] for p in PACKAGES if p in env},
    }
    return {
        "versions": [f"{name} {found}" for name, found in shown.items()],
        "processor": [
            f"{env['cpu_vendor']} {env['cpu_model']}, {env['cores']} cores, {env['memory_gib']} GiB",
            f"features: {env['cpu_features'] or 'none that matter here'}",
            f"torch uses {env['torch_cpu_capability']} and {env['threads']} threads",
        ],
        "products (chosen by measurement)": _products(),
        "devices": _devices(),
        "compiler": [_compiler(env["compiler"])],
        "peak memory": [memory.available() or "can be measured"],
        "extras": [_extra(name, packages) for name, packages in EXTRAS.items()],
    }


def _products() -> list[str]:
    from manyheads.engine.tiled import products

    return [f"{what}: {choice}" for what, choice in products.describe().items()]


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return ["CPU only: torch sees no GPU"]
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _compiler(found: str | None) -> str:
    return found or "none: the plain ATen passes run, and FlexAttention cannot be compiled; install g++"


def _extra(name: str, packages: tuple[str, ...]) -> str:
    missing = [package for package in packages if version(package) is None]
    if not missing:
        return f"{name}: installed"
    return f"{name}: missing {', '.join(missing)} (pip install 'manyheads[{name}]')"
