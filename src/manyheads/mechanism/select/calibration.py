"""What a selector was calibrated to, in a small file that says which mechanism, model and shapes it belongs to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_FORMAT = "manyheads calibration"
_VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """Numbers found for one mechanism in one model.

    Args:
        mechanism: Slug of the mechanism, such as ``"sale"``.
        model: Identity of the model: a name with its revision, or a digest of its weights.
        shapes: Sizes that must agree, such as ``{"layers": 32, "heads": 32, "kv_heads": 8, "width": 128}``.
        values: What was found, by name: numbers, texts, or lists of them (a list of layers of lists of heads).
        note: How: prompts, lengths, error, date; free text.

    Raises:
        ValueError: An empty name, a size that is no positive integer, a value that is not finite.
        TypeError: A value that a JSON file cannot hold.

    Example:
        >>> import tempfile, os
        >>> found = Calibration("sale", "tiny-7@a1b2", {"layers": 1, "heads": 2}, {"threshold": [[0.004, 0.002]]})
        >>> path = os.path.join(tempfile.mkdtemp(), "sale.json")
        >>> found.save(path)
        >>> load(path, mechanism="sale", model="tiny-7@a1b2", shapes={"heads": 2}).values["threshold"]
        [[0.004, 0.002]]
        >>> load(path, mechanism="sale", model="tiny-8@ffff")
        Traceback (most recent call last):
        ...
        ValueError: model: the calibration is for 'tiny-7@a1b2', not for 'tiny-8@ffff'; calibrate again for this model
    """

    mechanism: str
    model: str
    shapes: Mapping[str, int]
    values: Mapping[str, Any]
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("mechanism", "model"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"{name}: expected a name, got {getattr(self, name)!r}")
        for name, size in self.shapes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"shapes[{name!r}]: expected a positive integer, got {size!r}")
        for name, value in self.values.items():
            _check(value, f"values[{name!r}]")
        for name in ("shapes", "values"):
            object.__setattr__(self, name, dict(getattr(self, name)))

    def require(
        self, *, mechanism: str | None = None, model: str | None = None, shapes: Mapping[str, int] | None = None
    ) -> Calibration:
        """Refuses to serve anything but what it was made for.

        Args:
            mechanism: The mechanism that asks; not compared when None.
            model: The model, likewise.
            shapes: Its sizes; those that the calibration names too must agree, the others it must name.

        Returns:
            Itself.

        Raises:
            ValueError: It belongs to something else; the message names both.
        """
        for name, asked in (("mechanism", mechanism), ("model", model)):
            own = getattr(self, name)
            if asked is not None and asked != own:
                raise ValueError(
                    f"{name}: the calibration is for {own!r}, not for {asked!r}; calibrate again for this {name}"
                )
        for name, size in (shapes or {}).items():
            if self.shapes.get(name) != size:
                own = self.shapes.get(name, "not named")
                raise ValueError(f"shapes: {name} of the calibration is {own}, of this model {size}")
        return self

    def save(self, path: str | Path) -> None:
        """Writes the file: JSON with sorted names, so that equal calibrations are equal files.

        Args:
            path: Where.
        """
        text = json.dumps({"format": _FORMAT, "version": _VERSION} | asdict(self), indent=1, sort_keys=True)
        Path(path).write_text(text + "\n", encoding="utf-8")


def save(path: str | Path, calibration: Calibration) -> None:
    """Writes a calibration to a file; see :meth:`Calibration.save`.

    Args:
        path: Where.
        calibration: What.
    """
    calibration.save(path)


def load(
    path: str | Path,
    *,
    mechanism: str,
    model: str,
    shapes: Mapping[str, int] | None = None,
) -> Calibration:
    """Reads a calibration and refuses one for anything else.

    Args:
        path: The file.
        mechanism: Slug of the mechanism that asks.
        model: Identity of the model that asks.
        shapes: Sizes of the model.

    Returns:
        The :class:`Calibration`.

    Raises:
        ValueError: Not such a file, of a newer version, damaged, or for another mechanism, model or shape.
        FileNotFoundError: No file.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"path: {path} is no calibration file: {error}") from None
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(f"path: {path} is no calibration file: it does not say {_FORMAT!r}")
    if found.get("version") != _VERSION:
        raise ValueError(f"path: {path} has version {found.get('version')}; this library reads version {_VERSION}")
    names = ("mechanism", "model", "shapes", "values", "note")
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"path: {path} is damaged: {', '.join(missing)} is missing")
    if not all(isinstance(found[name], dict) for name in ("shapes", "values")):
        raise ValueError(f"path: {path} is damaged: shapes and values must be tables of names")
    return Calibration(**{name: found[name] for name in names}).require(
        mechanism=mechanism, model=model, shapes=shapes
    )


def _check(value: Any, name: str) -> None:
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check(item, f"{name}[{i}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check(item, f"{name}[{key!r}]")
    elif not isinstance(value, str | int | float):
        raise TypeError(f"{name}: expected numbers, texts, lists or tables of them, got {type(value).__name__}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
