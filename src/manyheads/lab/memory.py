"""Remembers what compiled kernels need, so that the same kernel is not compiled twice for the same question."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from manyheads.lab.aot import Compiled
from manyheads.lab.pool import Made, compile_cases, job_of, triton_version
from manyheads.lab.registry import Case, kernel_named


def folder() -> Path:
    """Where such things are kept: ``manyheads`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "manyheads"


class Memory:
    """A file of results, one line of JSON each, under a digest of everything that they depend on.

    A result depends on the version of the compiler, the source of the kernel's package, and the case.
    """

    def __init__(self, path: Path | None = None, triton: Path | None = None) -> None:
        """Opens the file.

        Args:
            path: The file; ``kernels.jsonl`` in :func:`folder` by default.
            triton: Folder that holds another Triton than the installed one.
        """
        self.path = folder() / "kernels.jsonl" if path is None else path
        self.triton = triton
        self.version = triton_version(triton)
        self.known: dict[str, tuple[Compiled | None, str]] = {}
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                    found = entry.get("compiled")
                    known = None if found is None else Compiled.from_json(found), str(entry.get("error", ""))
                    self.known[entry["key"]] = known
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # a line cut off by a crash is compiled again

    def compile(
        self,
        cases: Iterable[Case],
        *,
        workers: int | None = None,
        progress: Callable[[Made], object] | None = None,
    ) -> list[Made]:
        """As ``pool.compile_cases``, for what is not known yet.

        Args:
            cases: What to compile.
            workers: Processes.
            progress: Called with each new result as it comes.

        Returns:
            One result for each case, in order.
        """
        todo = list(cases)
        new = [case for case in todo if self._key(case) not in self.known]

        def keep(made: Made) -> None:
            self._keep(made)
            if progress is not None:
                progress(made)

        compile_cases(new, workers=workers, triton=self.triton, progress=keep)
        return [Made(case, *self.known[self._key(case)], self.version) for case in todo]

    def _keep(self, made: Made) -> None:
        key = self._key(made.case)
        self.known[key] = (made.compiled, made.error)
        entry = {"key": key, "error": made.error, "compiled": made.compiled.to_json() if made.compiled else None}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _key(self, case: Case) -> str:
        text = json.dumps([self.version, source_digest(kernel_named(case.kernel).path), job_of(case)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def source_digest(path: str) -> str:
    """A digest of the source on which a kernel depends: all files of the package that holds it.

    Args:
        path: ``"<module>:<function>"``.

    Returns:
        Hexadecimal digits.
    """
    found = importlib.util.find_spec(path.partition(":")[0])
    if found is None or found.origin is None:
        raise ValueError(f"kernel: there is no module {path.partition(':')[0]}")
    origin = Path(found.origin)
    files = sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
