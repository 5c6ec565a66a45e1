"""The command line: ``manyheads bench|compare|report|advise|simulate|list|doctor|show|explain|capture``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from manyheads.common.errors import missing_extra

BAD_INPUT = 2
"""Exit status when what was asked cannot be done."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: What follows the program's name; the process's own by default.

    Returns:
        The exit status: 0, or 1 when a bar of the benchmark is missed or something in it broke, 2 for bad
        input (one message on standard error, no traceback), 130 when interrupted.

    Example:
        >>> main(["list", "--state", "workx"])
        2
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from manyheads.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich"):
            raise
        return complain(str(missing_extra("bench", "the command line")))
    return run(given)


def complain(message: str) -> int:
    """Writes an error to standard error.

    Args:
        message: What is wrong.

    Returns:
        The exit status for bad input.
    """
    print(f"error: {message}", file=sys.stderr)
    return BAD_INPUT
