"""Every system that the library sets out to implement, and which of its checks a test holds.

The list is data (``systems.tsv``). Whether a system works is never written down: it is derived from the
evidence that its :class:`~manyheads.spec.Spec` or its evidence table names, test by test.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Literal

from manyheads import spec
from manyheads.common.errors import unknown

__all__ = ["Entry", "entries", "entry"]


@dataclass(frozen=True)
class Entry:
    """One system of the catalogue.

    Attributes:
        number: Its number in the list.
        slug: Its name in code.
        title: Its name in words.
        home: The module where it lives, or will.
        object: Dotted path of what a user imports, or None while there is nothing.
        checks: What has to hold, in short words; check ``n`` is ``checks[n - 1]``.
        evidence: From the number of a check to the ids of the tests that hold it, existing tests only.
        unbuilt: Parts that do not exist yet, in words, where more than checks are missing.
    """

    number: int
    slug: str
    title: str
    home: str
    object: str | None
    checks: tuple[str, ...]
    evidence: Mapping[int, tuple[str, ...]]
    unbuilt: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[int, ...]:
        """Numbers of the checks that no test holds."""
        return tuple(n for n in range(1, len(self.checks) + 1) if not self.evidence.get(n))

    @property
    def state(self) -> Literal["works", "planned"]:
        """``"works"`` when every check has a test and every part exists, else ``"planned"``."""
        return "planned" if self.missing or self.unbuilt else "works"


def entries() -> tuple[Entry, ...]:
    """Returns all systems in the order of their numbers.

    Example:
        >>> len(entries()), entries()[3].slug
        (159, 'neighborhood-attention-fna')
    """
    specs, tables = spec.registry(), spec.evidence_tables()
    out = []
    for number, slug, title, home, checks in _systems():
        named: Mapping[int, object] = {}
        target: str | None = None
        unbuilt: tuple[str, ...] = ()
        if slug in specs:
            named, fn = specs[slug].evidence, specs[slug].fn
            target = f"{fn.__module__}.{fn.__qualname__}"
        elif slug in tables:
            named, target, unbuilt = tables[slug].table, tables[slug].object, tables[slug].unbuilt
        held = {n: _existing(ids) for n, ids in named.items() if isinstance(ids, tuple) and n <= len(checks)}
        proof = MappingProxyType({n: ids for n, ids in sorted(held.items()) if ids})
        out.append(Entry(number, slug, title, home, target, checks, proof, unbuilt))
    return tuple(out)


def entry(slug: str) -> Entry:
    """Returns one system.

    Args:
        slug: Its name.

    Returns:
        Its entry.

    Raises:
        ValueError: No system has this name; the nearest is suggested.

    Example:
        >>> entry("packing").checks[0]
        'every sequence is packed once'
    """
    found = {e.slug: e for e in entries()}
    if slug not in found:
        raise unknown("system", slug, found)
    return found[slug]


@functools.cache
def _systems() -> tuple[tuple[int, str, str, str, tuple[str, ...]], ...]:
    text = resources.files(__name__).joinpath("systems.tsv").read_text(encoding="utf-8")
    rows = []
    for line in text.splitlines()[1:]:
        number, slug, title, home, checks = line.split("\t")
        rows.append((int(number), slug, title, home, tuple(c.strip() for c in checks.split(";"))))
    return tuple(rows)


def _existing(ids: tuple[str, ...]) -> tuple[str, ...]:
    """Those test ids that exist; all of them where there is no test tree to look into."""
    tests = _tests(_test_root())
    if tests is None:
        return ids
    return tuple(i for i in ids if any(_matches(i, path, names) for path, names in tests.items()))


def _matches(test: str, path: str, names: frozenset[str]) -> bool:
    file, _, name = test.partition("::")
    wanted = PurePosixPath(file).with_suffix("").parts
    return name in names and PurePosixPath(path).with_suffix("").parts[-len(wanted) :] == wanted


def _test_root() -> Path | None:
    root = Path(__file__).resolve().parents[3]
    return root / "tests" if (root / "pyproject.toml").is_file() and (root / "tests").is_dir() else None


@functools.cache
def _tests(root: Path | None) -> Mapping[str, frozenset[str]] | None:
    """Names of the test functions of every test file, read without importing any; None without a tree."""
    if root is None:
        return None
    found = {}
    for path in sorted(root.rglob("test_*.py")):
        names = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                names.add(node.name)
            elif isinstance(node, ast.ClassDef):
                names |= {f"{node.name}::{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        found[path.relative_to(root.parent).as_posix()] = frozenset(names)
    return found
