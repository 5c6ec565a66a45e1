"""The few errors that every layer raises in the same words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UnsupportedError(ValueError):
    """A mechanism or backend was asked for something that it does not declare.

    The message names who refused, what was asked, and what would serve it instead.
    """


def unknown(kind: str, name: str, options: Iterable[str]) -> ValueError:
    """Builds the error for a name that nobody registered, with the nearest ones.

    Args:
        kind: What was looked up, such as ``"suite"``.
        name: The name that came.
        options: The names that exist.

    Returns:
        The error, for the caller to raise.

    Example:
        >>> str(unknown("suite", "maks", ["masks", "layouts"]))
        "unknown suite 'maks': did you mean 'masks'? known: layouts, masks"
    """
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")


def missing_extra(extra: str, what: str) -> ImportError:
    """Builds the error for a feature whose optional dependency is not installed.

    Args:
        extra: The name of the extra in ``pyproject.toml``.
        what: What needs it.

    Returns:
        The error, for the caller to raise.

    Example:
        >>> str(missing_extra("bench", "the command line"))
        "the command line needs an optional dependency: pip install 'manyheads[bench]'"
    """
    return ImportError(f"{what} needs an optional dependency: pip install 'manyheads[{extra}]'")
