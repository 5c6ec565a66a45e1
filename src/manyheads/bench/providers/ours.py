"""``manyheads.attention``, as a user gets it and backend by backend."""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.bench.providers.base import Forward, Provider, first_reason
from manyheads.bench.workload import Problem

REFERENCE_PAIRS = 2**25
"""Above this many pairs over batch and heads the quadratic reference is not worth waiting for."""


@dataclass(frozen=True)
class Ours:
    """``manyheads.attention`` on one backend; ``auto`` is what a user gets without asking."""

    name: str = "manyheads"
    backend: str = "auto"
    package: str = "manyheads"

    def refuse(self, problem: Problem) -> str | None:
        """A backend's own reasons are found at the call; here stand those that would cost a wait to find out."""
        from manyheads.dispatch import BACKENDS

        pairs = problem.batch * problem.heads * problem.queries * problem.nk
        return first_reason(
            (self.backend not in ("auto", *BACKENDS), f"this version has no backend {self.backend!r}"),
            (
                self.backend == "triton" and not problem.on_gpu,
                "needs a GPU; on a CPU its kernels run in an interpreter",
            ),
            (
                self.backend == "reference" and pairs > REFERENCE_PAIRS,
                f"quadratic: {pairs:.1e} pairs are above the {REFERENCE_PAIRS:.1e} that are worth waiting for",
            ),
        )

    def prepare(self, problem: Problem) -> Forward:
        """Binds the mask and the backend."""
        from manyheads import attention

        mask, scale, backend = problem.mask, problem.scale, self.backend
        return lambda q, k, v: attention(q, k, v, mask=mask, scale=scale, backend=backend)


PROVIDERS: tuple[Provider, ...] = (
    Ours(),
    Ours("manyheads-blocked", "blocked"),
    Ours("manyheads-triton", "triton"),
    Ours("reference", "reference"),
)
