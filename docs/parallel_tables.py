"""The tables of docs/parallel.md: what plans and committed results say."""

from __future__ import annotations

from pathlib import Path

from manyheads.bench import store
from manyheads.bench.planning.cluster import cluster
from manyheads.bench.planning.machines import find
from manyheads.bench.planning.simulate import named
from manyheads.bench.workload import human
from manyheads.mask import Causal, Document
from manyheads.mask.sampling import document_lengths
from manyheads.parallel.deal import DEALS, deal
from manyheads.parallel.plan import Sizes, plan

CALL = Sizes(64, 8, 128)
PER_RANK = 8192
MIXES = ("pile", "prolong64k", "prolong512k")


def balance() -> str:
    """Balance and bytes of every deal on sampled mixes of documents."""
    lines = [
        "Packed documents, 8192 tokens on each of 8 and 64 ranks: the largest area of a rank over the mean, the worst",
        "of six sampled mixes, and the rows that `groupcast` fetches as a share of what a ring sends, on average.\n",
        "| deal | 8 ranks: max/mean | rows | 64 ranks: max/mean | rows |",
        "|---|---|---|---|---|",
    ]
    found: dict[str, list[str]] = {shard: [] for shard in DEALS if shard != "striped"}
    for world in (8, 64):
        n = world * PER_RANK
        masks = [Causal() & Document(document_lengths(n, MIXES[i % 3], seed=i)) for i in range(6)]
        for shard, cells in found.items():
            plans = [plan(mask, deal(shard, mask, n, world), "groupcast", CALL) for mask in masks]
            share = sum(int(p.fetched.sum()) for p in plans) / (len(plans) * n * (world - 1))
            cells += [f"{max(p.imbalance for p in plans):.2f}", f"{share:.0%}"]
    return "\n".join([*lines, *(f"| `{shard}` | {' | '.join(cells)} |" for shard, cells in found.items())])


def simulated() -> str:
    """The fastest deal of each scheme on one node and on eight."""
    parts = []
    for ranks in (8, 64):
        n = ranks * PER_RANK
        mask, machine = named("causal_document", n), find("H100")
        runs = [o for o in cluster(mask, n, ranks, CALL, machine=machine, layers=32) if o.reason is None]
        names = dict.fromkeys(o.scheme for o in runs)
        best = [min((o for o in runs if o.scheme == name), key=lambda o: o.ms) for name in names]
        lines = [
            f"Modelled: {n} tokens of packed documents on {ranks} H100 in nodes of 8 (450 GB/s inside, 50 between), 32",
            "layers of 64:8 heads of width 128, half the peak rate; one layer, the fastest deal of each scheme:\n",
            "| scheme | deal | forward | backward | idle | sent by the busiest rank | memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for o in sorted(best, key=lambda o: o.ms):
            cells = [f"{o.forward_ms:.1f} ms", f"{o.backward_ms:.1f} ms", f"{o.idle:.0%}"]
            cells += [human(int(o.sent.max() + o.sent_back.max())), human(o.memory)]
            lines.append(f"| `{o.scheme}` | `{o.shard}` | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def measured(folder: Path) -> str:
    """Rows of the suite in the committed results; a line that says so where there are none.

    Args:
        folder: Where results are.
    """
    parts = []
    for path in sorted(folder.glob("*.jsonl")):
        rows = [r for r in store.read(path).rows if r.suite == "parallel" and r.median_ms and r.sent_mib]
        if not rows:
            continue
        lines = [f"`{path.name}`, processes that share one CPU:\n"]
        lines += ["| case | scheme | deal | ms | max/mean | sent MiB | hidden |", "|---|---|---|---|---|---|---|"]
        for r in rows:
            hidden = "" if r.overlap is None else f"{r.overlap:.0%}"
            cells = [r.case, r.provider, r.deal or "", f"{r.median_ms:.1f}", f"{r.imbalance:.3f}", f"{r.sent_mib:.1f}"]
            lines.append(f"| {' | '.join([*cells, hidden])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No results of this suite are committed yet."
