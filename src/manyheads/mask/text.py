"""Masks as text: ``parse`` reads what ``mask.text`` and ``repr(mask)`` write, with Python's precedence."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch

from ..common.errors import unknown
from .base import Mask, live
from .store import digest_of, known

_KEPT = 1024
_KEPT_BYTES = 2**26
_parsed: OrderedDict[Any, Mask] = OrderedDict()
_held_bytes = 0
_TOKEN = re.compile(r"\s*(?:(\d+)|(\$fn:\w+|\$\d+)|([A-Za-z_]\w*)|('[^']*'|\"[^\"]*\")|([-&|~()\[\],=])|(<[^>]*>))")
_CONSTANTS = {"True": True, "False": False, "None": None}


def parse(text: str, data: Sequence[torch.Tensor] = ()) -> Mask:
    """Reads a mask from text.

    Grammar: names of masks with arguments in parentheses, combined with ``~``, ``&`` and ``|`` (binding in
    this order, as in Python), grouped by parentheses. Arguments are ints, ``True``, ``False``, ``None``,
    quoted words, lists, tuples, masks, and ``$0``, ``$1``... for ``data``. Names are those of the classes and
    functions of this package, as ``block_map`` or ``BlockMap``.

    Args:
        text: For example ``"causal & (window(512) | sink(4))"``.
        data: The tensors that ``$n`` stands for.

    Returns:
        The mask. ``parse(m.text, m.data) == m`` always holds, and is a look-up.

    Raises:
        TypeError: ``text`` is not a string.
        ValueError: Text that does not parse, with the column and, for an unknown name, the nearest one.

    Example:
        >>> from manyheads.mask import parse
        >>> parse("causal & window(4) | sink(1)")
        causal & window(4) | sink(1)
        >>> parse("Causal() & document($0)", [torch.tensor([3, 4])])
        causal & document([3, 4])
    """
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {type(text).__name__}")
    if not len(data):
        return _parse_cached(text, (), ())
    data = tuple(data)
    found = live.get((text, tuple([id(t) for t in data])))
    if found is not None and all(a is b and known(a) for a, b in zip(found.data, data, strict=True)):
        return found
    return _parse_cached(text, data, tuple([_digest(t) for t in data]))


def as_mask(x: Mask | str | torch.Tensor | None) -> Mask:
    """Reads whatever may stand for a mask.

    Args:
        x: A mask; text; a boolean tensor ``(..., Nq, Nk)``, True where attention is allowed; None for `Full`.

    Returns:
        The mask.

    Raises:
        TypeError: Anything else.

    Example:
        >>> from manyheads.mask import as_mask
        >>> as_mask("causal"), as_mask(None)
        (causal, full)
    """
    if isinstance(x, Mask):
        return x
    if x is None:
        return parse("full")
    if isinstance(x, str):
        return parse(x)
    if isinstance(x, torch.Tensor):
        from .adapters import from_bool

        return from_bool(x)
    raise TypeError(f"mask: expected a Mask, text, a boolean tensor or None, got {type(x).__name__}")


def restore(text: str, data: tuple[torch.Tensor, ...], functions: dict[str, Callable[..., Any]]) -> Mask:
    """Rebuilds a pickled mask."""
    from .predicate import adopt

    for token, fn in functions.items():
        adopt(token, fn)
    return parse(text, data)


def _digest(tensor: Any) -> bytes:
    held = known(tensor)
    if held is not None:
        return held.digest
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"data: expected tensors, got {type(tensor).__name__}")
    return digest_of(tensor.detach().cpu().numpy())


def _parse_cached(text: str, data: tuple[torch.Tensor, ...], digests: tuple[bytes, ...]) -> Mask:
    global _held_bytes
    key = (text, digests)
    found = _parsed.get(key)
    if found is None:
        found = _Parser(text, data).mask()
        _parsed[key] = found
        _held_bytes += _weight(found)
        while len(_parsed) > _KEPT or (_held_bytes > _KEPT_BYTES and len(_parsed) > 1):
            _held_bytes -= _weight(_parsed.popitem(last=False)[1])
    return found


def _weight(mask: Mask) -> int:
    return sum([t.numel() * t.element_size() for t in mask.data])


class _Token(NamedTuple):
    kind: str
    text: str
    column: int


class _Parser:
    """Recursive descent over one text."""

    def __init__(self, text: str, data: Sequence[torch.Tensor]) -> None:
        self.text = text
        self.data = data
        self.place = 0
        self.tokens = self._split()

    def mask(self) -> Mask:
        """The whole text."""
        value = self._either()
        if self._peek().kind != "end":
            self._fail(f"unexpected {self._peek().text!r}", self._peek())
        return value

    def _split(self) -> list[_Token]:
        tokens = []
        at = 0
        end = len(self.text.rstrip())
        while at < end:
            found = _TOKEN.match(self.text, at)
            if found is None:
                stripped = at + len(self.text[at:]) - len(self.text[at:].lstrip())
                self._fail(f"unexpected {self.text[stripped]!r}", _Token("", "", stripped))
            kind = ("int", "data", "name", "word", "sign", "short")[(found.lastindex or 1) - 1]
            tokens.append(_Token(kind, found[found.lastindex or 1], found.start(found.lastindex or 1)))
            if kind == "short":
                self._fail("an abbreviated repr does not parse; use mask.text with mask.data", tokens[-1])
            at = found.end()
        tokens.append(_Token("end", "end of text", end))
        return tokens

    def _peek(self, ahead: int = 0) -> _Token:
        return self.tokens[min(self.place + ahead, len(self.tokens) - 1)]

    def _take(self, text: str) -> bool:
        token = self._peek()
        if token.kind == "sign" and token.text == text:
            self.place += 1
            return True
        return False

    def _need(self, text: str) -> None:
        if not self._take(text):
            self._fail(f"expected {text!r}, got {self._peek().text!r}", self._peek())

    def _fail(self, message: str, token: _Token) -> NoReturn:
        where = f"at column {token.column + 1}\n{_pointer(self.text, token.column)}"
        raise ValueError(f"mask text: {message} {where}")

    def _either(self) -> Mask:
        value = self._both()
        while self._take("|"):
            value = value | self._both()
        return value

    def _both(self) -> Mask:
        value = self._unary()
        while self._take("&"):
            value = value & self._unary()
        return value

    def _unary(self) -> Mask:
        if self._take("~"):
            return ~self._unary()
        if self._take("("):
            value = self._either()
            self._need(")")
            return value
        token = self._peek()
        if token.kind != "name" or token.text in _CONSTANTS:
            self._fail(f"expected a mask, got {token.text!r}", token)
        self.place += 1
        return self._call(token)

    def _call(self, token: _Token) -> Mask:
        names = vocabulary()
        make = names.get(token.text) or names.get(_snake(token.text))
        if make is None:
            message = str(unknown("mask", _snake(token.text), names))
            self._fail(message, token)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        if self._take("("):
            while not self._take(")"):
                if self._peek().kind == "name" and self._peek(1).text == "=":
                    word = self._peek().text
                    self.place += 2
                    kwargs[word] = self._value()
                elif kwargs:
                    self._fail("a positional argument follows a keyword", self._peek())
                else:
                    args.append(self._value())
                if self._peek().text != ")":
                    self._need(",")
        try:
            value = make(*args, **kwargs)
        except (TypeError, ValueError) as error:
            self._fail(f"{token.text}: {error}", token)
        if not isinstance(value, Mask):
            self._fail(f"{token.text} does not make a mask", token)
        return value

    def _value(self) -> Any:
        token = self._peek()
        if token.kind == "sign" and token.text in "[(":
            if token.text == "(" and not self._opens_tuple():
                return self._either()
            self.place += 1
            close = "]" if token.text == "[" else ")"
            items = []
            while not self._take(close):
                items.append(self._value())
                if self._peek().text != close:
                    self._need(",")
            return items if close == "]" else tuple(items)
        if token.kind == "name" and token.text not in _CONSTANTS or token.text == "~":
            return self._either()
        self.place += 1
        if token.kind == "int":
            return int(token.text)
        if token.kind == "word":
            return token.text[1:-1]
        if token.kind == "name":
            return _CONSTANTS[token.text]
        if token.kind == "data":
            return self._data(token)
        if token.text == "-" and self._peek().kind == "int":
            self.place += 1
            return -int(self._peek(-1).text)
        self._fail(f"expected a value, got {token.text!r}", token)

    def _opens_tuple(self) -> bool:
        after = self._peek(1)
        literal = after.kind in ("int", "word", "data") or after.text in _CONSTANTS
        return literal or after.text in ("-", "[", ")")

    def _data(self, token: _Token) -> Any:
        if token.text.startswith("$fn:"):
            return token.text
        n = int(token.text[1:])
        if n >= len(self.data):
            self._fail(f"{token.text} but {len(self.data)} data tensors came", token)
        return self.data[n]


def _pointer(text: str, column: int) -> str:
    start = max(0, column - 40)
    line = text[start : column + 40].replace("\n", " ")
    return f"    {line}\n    {' ' * (column - start)}^"


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


_names: dict[str, Callable[..., Any]] = {}


def vocabulary() -> dict[str, Callable[..., Any]]:
    """Every name that `parse` knows, with what it calls.

    Returns:
        The primitives in snake case, and the named compositions.
    """
    if not _names:
        from . import algebra, data, documents, named, neighborhood, predicate, primitives, rectangles

        for module in (primitives, documents, rectangles, data, neighborhood, predicate):
            for name, kind in vars(module).items():
                if name.startswith("_") or not isinstance(kind, type) or not issubclass(kind, Mask):
                    continue
                if kind.__module__ == module.__name__:
                    _names[_snake(name)] = getattr(kind, "read", kind)
        _names["per_head"] = lambda *parts: algebra.PerHead(parts)
        _names["per_batch"] = lambda *parts: algebra.PerBatch(parts)
        _names.update({name: getattr(named, name) for name in named.__all__})
    return _names
