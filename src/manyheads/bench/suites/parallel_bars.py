"""The bars of context parallelism for ``targets``, each at the shape it names and at a drawn one."""

from __future__ import annotations

from collections.abc import Callable

from manyheads.bench.row import Row
from manyheads.bench.suite import Options
from manyheads.bench.suites import bars, parallel
from manyheads.bench.suites.bars import Bar

BALANCE = 1.05
"""Largest area of a rank over the mean, the worst of the sampled mixes of documents."""
BYTES = 3.0
"""Times fewer bytes than the ring, over both passes, in the worst of the mixes."""
OVERLAP = 0.7
"""Share of the smaller of compute and communication that is hidden."""


def made(options: Options) -> list[Bar]:
    """Every bar of this suite.

    Args:
        options: For the seed of drawn shapes.

    Returns:
        The bars, those with the drawn shapes after the others.
    """
    rng = bars.draw(options, "parallel")
    found = [_balance(world, parallel.PER_RANK, 30, 0) for world in (8, 64)]
    found.append(_balance(int(rng.integers(3, 48)), int(rng.integers(3000, 9000)), 10, int(rng.integers(1000))))
    found += [_bytes(kind, 8, parallel.PER_RANK, 0) for kind in parallel.VOLUMES]
    drawn = int(rng.integers(5, 24)), int(rng.integers(6000, 9000)), int(rng.integers(1000))
    found += [_bytes(kind, *drawn) for kind in ("documents", f"window-{int(rng.integers(500, 4000))}")]
    tokens = int(rng.integers(1500, 2500))
    return [*found, *(_overlap(order, n, options) for order, n in (("causal", 2048), ("full", tokens)))]


def _balance(world: int, per_rank: int, mixes: int, seed: int) -> Bar:
    name = f"parallel-balance-{world}x{per_rank}"
    words = f"balanced deal, largest area over the mean, worst of {mixes} mixes, {world} ranks of {per_rank} tokens"
    base = bars.promise(name, words, length=world * per_rank, ranks=world, deal="balanced")

    def judge(measured: list[list[Row]]) -> list[Row]:
        found = {row.deal: row.imbalance for rows in measured for row in rows if row.imbalance is not None}
        others = ", ".join(f"{s}: {found[s]:.2f}" for s in ("nearby", "zigzag", "contiguous") if s in found)
        return [bars.at_most(base.replace(note=others or None), found.get("balanced"), BALANCE, "")]

    return Bar(f"bar-{name}", (parallel.balance(world, per_rank, mixes, seed),), judge, "quick")


def _bytes(kind: str, world: int, per_rank: int, seed: int) -> Bar:
    name = f"parallel-bytes-{kind}-{world}x{per_rank}"
    what = "packed documents of up to a quarter of the tokens" if kind == "documents" else f"causal {kind} keys"
    words = f"group-cast sends fewer bytes than a ring, {what}, {world} ranks of {per_rank} tokens"
    base = bars.promise(name, words, length=world * per_rank, ranks=world, deal="nearby")
    return Bar(f"bar-{name}", (parallel.volume(kind, world, per_rank, seed),), _fewer(base), "quick")


def _fewer(base: Row) -> Callable[[list[list[Row]]], list[Row]]:
    def judge(measured: list[list[Row]]) -> list[Row]:
        sent = {row.provider: row.sent_mib for rows in measured for row in rows if row.sent_mib is not None}
        ring, few = sent.get("manyheads-ring"), sent.get("manyheads-groupcast")
        ratio = ring / few if ring is not None and few else None
        return [bars.at_least(base, ratio, BYTES, "x fewer")]

    return judge


def _overlap(order: str, per_rank: int, options: Options) -> Bar:
    name = f"parallel-overlap-{order}-2x{per_rank}"
    words = f"a ring hides the smaller of compute and injected delay, {order}, 2 processes of {per_rank} tokens"
    base = bars.promise(name, words, length=2 * per_rank, ranks=2)

    def judge(measured: list[list[Row]]) -> list[Row]:
        rows = [row for group in measured for row in group]
        row = next((row for row in rows if row.overlap is not None), None)
        reason = None if row is not None else next((r.reason for r in rows if r.reason), "no row")
        noted = base.replace(note=row.note if row is not None else reason)
        return [bars.at_least(bars.cautioned(noted, row), None if row is None else row.overlap, OVERLAP, "")]

    return Bar(f"bar-{name}", (parallel.forward(order, per_rank, 2, options),), judge)
