"""Who can compute attention: small adapters with one signature, each saying what it refuses and why."""

from __future__ import annotations

from collections.abc import Iterable

from manyheads.bench import environment
from manyheads.bench.providers import ours, peers, torch
from manyheads.bench.providers.base import Form, Forward, Provider, form_of, installed
from manyheads.bench.providers.ours import Ours
from manyheads.bench.workload import Problem
from manyheads.common.errors import unknown

__all__ = [
    "STANDARD",
    "Form",
    "Forward",
    "Ours",
    "Provider",
    "add",
    "capabilities",
    "form_of",
    "get",
    "installed",
    "is_lossy",
    "is_ours",
    "names",
    "presence",
    "version",
    "volunteers",
]

_PROVIDERS = {provider.name: provider for provider in (*ours.PROVIDERS, *torch.PROVIDERS, *peers.PROVIDERS)}

STANDARD = ("manyheads", "sdpa", "flex", "reference")
"""Who takes part when nobody is named; ``manyheads-blocked`` skips what ``auto`` would delegate to torch."""


def names() -> tuple[str, ...]:
    """Every provider that can be named."""
    return tuple(_PROVIDERS)


def get(name: str) -> Provider:
    """Returns a provider.

    Args:
        name: Its name.

    Raises:
        ValueError: Nobody has this name; the nearest is suggested.

    Example:
        >>> get("sdpa").package
        'torch'
        >>> get("spda")
        Traceback (most recent call last):
        ValueError: unknown provider 'spda': did you mean 'sdpa'? known: ...
    """
    if name not in _PROVIDERS:
        raise unknown("provider", name, _PROVIDERS)
    return _PROVIDERS[name]


def add(provider: Provider) -> None:
    """Adds a provider for this process, such as a peer package.

    Args:
        provider: The adapter.

    Raises:
        ValueError: The name is taken.
    """
    if provider.name in _PROVIDERS:
        raise ValueError(f"provider: the name {provider.name!r} is taken")
    _PROVIDERS[provider.name] = provider


def is_lossy(provider: Provider) -> bool:
    """Whether a provider computes an approximation, so that its error belongs to its answer."""
    return bool(getattr(provider, "lossy", False))


def is_ours(name: str) -> bool:
    """Whether a provider is this library, which is no baseline for itself.

    Example:
        >>> [is_ours(name) for name in ("manyheads-blocked", "reference", "sdpa")]
        [True, True, False]
    """
    return name == "reference" or name.partition("-")[0] == "manyheads"


def version(provider: Provider) -> str | None:
    """The version of a provider's package, ``None`` if it is not installed."""
    return environment.version(provider.package)


def presence(chosen: Iterable[str]) -> dict[str, str]:
    """Which version of each provider is here.

    Args:
        chosen: Names of providers.

    Returns:
        By name ``"torch 2.13.0"``, or ``"not installed"``.
    """
    found = {}
    for name in chosen:
        adapter = get(name)
        at = version(adapter)
        found[name] = f"{adapter.package} {at}" if at else "not installed"
    return found


def volunteers(device: str) -> tuple[str, ...]:
    """Who joins the standard providers where time allows: installed packages, and torch's own variants on a GPU.

    A volunteer that refuses a problem is left out of it, instead of filling the results with refusals.

    Args:
        device: Where the benchmark runs.
    """
    found = [peer.name for peer in peers.PROVIDERS if version(peer)]
    own = ("sdpa-flash", "sdpa-cudnn", "varlen") if device != "cpu" else ()
    return (*own, *found)


def capabilities(problems: Iterable[tuple[str, Problem]], chosen: Iterable[str]) -> list[tuple[str, dict[str, str]]]:
    """What each provider would do with each problem, before anything is run.

    Args:
        problems: Name and problem.
        chosen: Names of providers.

    Returns:
        For each problem its name and, by provider, ``"yes"`` or the reason for refusing.
    """
    adapters = [get(name) for name in chosen]
    return [(name, {p.name: p.refuse(problem) or "yes" for p in adapters}) for name, problem in problems]
