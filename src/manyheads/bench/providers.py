"""Who can compute attention: small adapters with one signature, each saying what it refuses and why."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from manyheads.bench import environment
from manyheads.bench.workload import Problem, human
from manyheads.common.errors import unknown
from manyheads.mask import Mask

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class Provider(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str:
        """How it is chosen on the command line and called in the rows."""

    @property
    def package(self) -> str:
        """The package whose version goes into the environment."""

    def refuse(self, problem: Problem) -> str | None:
        """Why this problem is not for this provider, ``None`` if it is; looks at the shape only."""

    def prepare(self, problem: Problem) -> Forward:
        """Does what is done once per problem (masks, compilation set-up) and returns the call to time."""


@dataclass(frozen=True)
class Ours:
    """``manyheads.attention`` on one backend; ``auto`` is what a user gets without asking."""

    name: str = "manyheads"
    backend: str = "auto"
    package: str = "manyheads"

    def refuse(self, problem: Problem) -> str | None:
        """The backend's own reasons are found at the call; here the quadratic reference is kept small."""
        pairs = problem.batch * problem.heads * problem.queries * problem.nk
        if self.backend == "reference" and pairs > REFERENCE_PAIRS:
            return f"quadratic: {pairs:.1e} pairs are above the {REFERENCE_PAIRS:.1e} that are worth waiting for"
        return None

    def prepare(self, problem: Problem) -> Forward:
        """Binds the mask and the backend."""
        from manyheads import attention

        mask, scale, backend = problem.mask, problem.scale, self.backend
        return lambda q, k, v: attention(q, k, v, mask=mask, scale=scale, backend=backend)


@dataclass(frozen=True)
class Sdpa:
    """``scaled_dot_product_attention``: ``is_causal`` when that is exact, else a boolean mask."""

    name: str = "sdpa"
    package: str = "torch"

    def refuse(self, problem: Problem) -> str | None:
        """Refuses a boolean mask that is too large to be made."""
        pairs = problem.queries * problem.nk
        if not _is_full(problem) and not _is_causal(problem) and pairs > MASK_PAIRS:
            return f"needs an N x N mask of {human(pairs)} (and {human(4 * pairs)} as floats inside)"
        return None

    def prepare(self, problem: Problem) -> Forward:
        """Makes the boolean mask, if one is needed."""
        options: dict[str, Any] = {"enable_gqa": problem.hkv != problem.heads, "scale": problem.scale}
        if _is_causal(problem):
            options["is_causal"] = True
        elif not _is_full(problem):
            options["attn_mask"] = problem.mask.dense(problem.queries, problem.nk)
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


@dataclass(frozen=True)
class Flex:
    """``torch.nn.attention.flex_attention`` compiled with its block mask; compilation is timed apart."""

    name: str = "flex"
    package: str = "torch"

    def refuse(self, problem: Problem) -> str | None:
        """Refuses gradients on a CPU, and machines where nothing can be compiled."""
        if problem.backward:
            return "FlexAttention has no backward on a CPU"
        if problem.dtype == "float64":
            return "FlexAttention computes in at most float32"
        if environment.compiler() is None:
            return "needs a C++ compiler (g++ or clang++) to be compiled"
        if problem.queries * problem.nk > FLEX_PAIRS:
            return f"its block mask is made from {human(problem.queries * problem.nk)} of booleans"
        return None

    def prepare(self, problem: Problem) -> Forward:
        """Makes the block mask and a function of its own, so that no limit on recompilation is met."""
        from torch._inductor import config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        config.compile_threads = 1  # a pool of compilers would leave threads behind in the process that is timed
        mask_mod = problem.mask.to_flex(problem.queries, problem.nk)
        batch, heads = (n if n > 1 else None for n in problem.mask.shape)
        with torch.no_grad():
            block = create_block_mask(mask_mod, batch, heads, problem.queries, problem.nk, device="cpu")
        gqa, scale = problem.hkv != problem.heads, problem.scale

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flex_attention(q, k, v, block_mask=block, scale=scale, enable_gqa=gqa)

        own = types.FunctionType(
            call.__code__.replace(co_name=f"flex_{next(_numbers)}"),
            call.__globals__,
            None,
            None,
            call.__closure__,
        )
        compiled: Forward = torch.compile(own, dynamic=False)
        return compiled


REFERENCE_PAIRS = 2**25
"""Above this many pairs over batch and heads the quadratic reference is not worth waiting for."""
MASK_PAIRS = 2**28
"""Above this many pairs no N x N boolean mask is made."""
FLEX_PAIRS = 2**28
"""Above this many pairs no block mask is evaluated pair by pair."""


@functools.lru_cache(maxsize=16)
def _block_mask(mask: Mask, nq: int, nk: int) -> Any:
    """FlexAttention's own layout: seconds at 8192 tokens, and the same for every dtype."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads = (n if n > 1 else None for n in mask.shape)
    with torch.no_grad():
        return create_block_mask(mask.to_flex(nq, nk), batch, heads, nq, nk, device="cpu")


_numbers = itertools.count()
_PROVIDERS: dict[str, Provider] = {
    p.name: p
    for p in (
        Ours(),
        Ours("manyheads-blocked", "blocked"),
        Sdpa(),
        Flex(),
        Ours("reference", "reference"),
    )
}
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
        ValueError: unknown provider 'spda': did you mean 'sdpa'? known: flex, manyheads, manyheads-blocked, \
reference, sdpa
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


def installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def _is_full(problem: Problem) -> bool:
    return problem.mask.text == "full"


def _is_causal(problem: Problem) -> bool:
    """Torch aligns ``is_causal`` to the upper left, so it is exact for as many queries as keys only."""
    return problem.mask.text == "causal" and problem.queries == problem.nk
