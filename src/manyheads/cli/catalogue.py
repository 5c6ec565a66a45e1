"""``manyheads list``: the catalogue on the terminal or as JSON."""

from __future__ import annotations

import json
from typing import Any

from manyheads import catalog
from manyheads.common.errors import unknown

STATES = ("works", "planned")


def run(*, as_json: bool, state: str | None) -> int:
    """Prints the catalogue.

    Args:
        as_json: Whether to print everything as one JSON array.
        state: Only systems in this state.

    Returns:
        The exit status.

    Raises:
        ValueError: Unknown state.
    """
    if state is not None and state not in STATES:
        raise unknown("state", state, STATES)
    found = [entry for entry in catalog.entries() if state in (None, entry.state)]
    if as_json:
        print(json.dumps([_plain(entry) for entry in found], indent=1))
        return 0
    width = max((len(entry.slug) for entry in found), default=0)
    for entry in found:
        held = f"{len(entry.checks) - len(entry.missing)}/{len(entry.checks)}"
        print(f"{entry.slug:{width}}  {entry.state:8} {held:>6}  {entry.object or entry.home:45}  {entry.title}")
    works = sum(entry.state == "works" for entry in found)
    print(f"{len(found)} systems: {works} work, {len(found) - works} planned; checks held by tests / all checks")
    return 0


def _plain(entry: catalog.Entry) -> dict[str, Any]:
    return {
        "number": entry.number,
        "slug": entry.slug,
        "title": entry.title,
        "state": entry.state,
        "home": entry.home,
        "object": entry.object,
        "checks": list(entry.checks),
        "evidence": {str(number): list(ids) for number, ids in entry.evidence.items()},
        "missing": list(entry.missing),
        "unbuilt": list(entry.unbuilt),
    }
