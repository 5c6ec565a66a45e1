"""The table of docs/sparse.md: what committed results say about speed and error of sparse mechanisms."""

from __future__ import annotations

from pathlib import Path

from manyheads.bench import store
from manyheads.bench.row import Row

HEAD = "| mechanism | setting | pairs | times dense | error | weight kept | top keys kept | choosing |"


def measured(folder: Path) -> str:
    """Rows of the suite in the newest committed results that have any; a line that says so where there are none.

    Args:
        folder: Where results are.
    """
    for path in sorted(folder.glob("*.jsonl"), reverse=True):
        results = store.read(path)
        rows = [r for r in results.rows if r.suite == "sparse" and r.setting is not None and r.error_norm is not None]
        if rows:
            env = results.header.get("environment", {})
            said = f"`{path.name}`, on {env.get('cpu_model', 'a CPU')} with {env.get('threads')} threads."
            cases = dict.fromkeys(row.case for row in rows)
            return "\n\n".join([said, *(_table([r for r in rows if r.case == case]) for case in cases)])
    return "No results of this suite are committed yet; `manyheads bench --suite sparse` makes them."


def _table(rows: list[Row]) -> str:
    one = rows[0]
    lines = [f"**{one.input}**, `{one.shape}`, {one.dtype}, causal:\n", HEAD, "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        speed = "wrong" if row.speed is None else f"{row.speed:.2f}"
        shares = [_share(row.mass), _share(row.recall), _share(row.selection)]
        cells = [row.provider, row.setting or "", _share(row.area), speed, f"{row.error_norm:.3f}", *shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
