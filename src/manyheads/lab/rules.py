"""Reads the source of the kernels and says where it breaks the rules that keep a kernel right at any size.

The rules, by the names that findings carry:

* ``int64``: a stride, a length or a head width multiplies only what is 64 bits wide or bounded by the tile; products of
  32-bit integers wrap around in tensors of 2^31 elements.
* ``bounds``: a load of a block is masked or its index clamped; a store of a block is masked.
* ``pointers``: plain pointers or tensor descriptors; block pointers are gone from newer Triton.
* ``lengths``: a kernel never specialises on a length: each is in ``do_not_specialize`` and none is a constant.
* ``table``: nothing is autotuned and no launch names a number of warps or stages: configurations come from the table.
* ``atomics``: the order of atomic additions is not fixed, so results would differ from run to run.

What arrives as an argument of a helper is taken to be right there; the interpreter's tests hold the rest.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

STRIDE = re.compile(r"strides?|stride_\w+|s[a-z]?[bhn]|\w+_[bhqkn]")
"""Names of strides: ``sqn`` (``s``, tensor, axis), or an array and its axis, ``pair_b``."""
LENGTH = re.compile(r"n|n[qk]|tokens|total|width|strip|row0|lengths?|seq\w*")
"""Names of lengths."""
WIDTH = re.compile(r"D|DV|WIDTH")
"""Names of head widths, by which rows of contiguous tensors are multiplied."""
SMALL = {
    "index_b": "the map of row sets has one entry a head",
    "index_h": "the map of row sets has one entry a head",
    "table_h": "a table of relative positions has a row a head",
}
"""Strides of arrays that cannot reach 2^31 elements, with the reason."""
ATOMICS: Mapping[str, str] = {}
"""Functions that may use atomics, ``"<file>::<function>"``, with the reason."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken rule.

    Attributes:
        file, line: Where.
        rule: Its name.
        text: What is wrong and what to do.
    """

    file: str
    line: int
    rule: str
    text: str

    def __str__(self) -> str:
        """``file:line: rule: text``."""
        return f"{self.file}:{self.line}: {self.rule}: {self.text}"


def check(source: str, name: str = "kernels.py", lists: Mapping[str, list[str]] | None = None) -> list[Finding]:
    """Checks the source of a file of kernels.

    Args:
        source: Its text.
        name: What to call it.
        lists: Lists of names that other files of its folder define, for ``do_not_specialize=NAME``.

    Returns:
        What breaks a rule, by line.

    Example:
        >>> bad = '''
        ... @triton.jit
        ... def copy(x, n, sn, BLOCK: tl.constexpr):
        ...     i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        ...     tl.store(x + i, tl.load(x + i * sn))
        ... '''
        >>> [(f.line, f.rule) for f in check(bad)]
        [(3, 'lengths'), (5, 'bounds'), (5, 'bounds'), (5, 'int64')]
    """
    tree = ast.parse(source)
    known = {**(lists or {}), **_lists(tree)}
    found = list(_configured(tree, name))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and _decorator(node) is not None:
            found += _Function(node, name, known).findings()
    return sorted(set(found), key=lambda f: (f.line, f.rule, f.text))


def check_package(root: Path) -> list[Finding]:
    """Checks every file of kernels under a folder, and every other file for launches that name a configuration.

    Args:
        root: The folder of a package.

    Returns:
        What breaks a rule.
    """
    found: list[Finding] = []
    for path in sorted(root.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(root).as_posix()
        if is_kernels(path):
            beside = path.parent.glob("*.py") if path.parent.name == "kernels" else [path]
            lists = {k: v for p in beside for k, v in _lists(ast.parse(p.read_text(encoding="utf-8"))).items()}
            found += check(source, name, lists)
        elif "num_warps" in source or "num_stages" in source:
            found += _configured(ast.parse(source), name)
    return found


def is_kernels(path: Path) -> bool:
    """Whether a file holds kernels: it is called ``kernels.py`` or lies in a folder ``kernels``."""
    return path.name == "kernels.py" or path.parent.name == "kernels"


def _lists(tree: ast.Module) -> dict[str, list[str]]:
    """Lists and tuples of strings that a module defines."""
    found: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Tuple):
            words = [e.value for e in node.value.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
            if len(words) == len(node.value.elts):
                found |= {t.id: words for t in node.targets if isinstance(t, ast.Name)}
    return found


def _configured(tree: ast.AST, name: str) -> Iterator[Finding]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            if keyword.arg in ("num_warps", "num_stages") and isinstance(keyword.value, ast.Constant):
                text = f"{keyword.arg}={keyword.value.value!r} is written into a launch; take it from the table"
                yield Finding(name, node.lineno, "table", text)
        if _called(node) in ("triton.autotune", "triton.Config", "triton.heuristics"):
            yield Finding(name, node.lineno, "table", f"{_called(node)}: configurations come from the table")


def _decorator(node: ast.FunctionDef) -> ast.expr | None:
    """The decorator that makes a function a kernel or a helper of one."""
    for decorator in node.decorator_list:
        name = _called(decorator) if isinstance(decorator, ast.Call) else _dotted(decorator)
        if name == "triton.jit":
            return decorator
    return None


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _called(node: ast.Call) -> str:
    return _dotted(node.func)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is known of a value: 64 bits wide, bounded by the tile, a block of values, clamped on the way."""

    wide: bool = False
    local: bool = False
    block: bool = False
    clamped: bool = False


_CONSTANT = _Kind(local=True)


class _Function:
    """One jitted function, read from top to bottom."""

    def __init__(self, node: ast.FunctionDef, file: str, lists: Mapping[str, list[str]]) -> None:
        self.node, self.file, self.lists = node, file, lists
        self.known: dict[str, _Kind] = {}
        self.found: list[Finding] = []

    def findings(self) -> list[Finding]:
        self._lengths()
        for statement in self.node.body:
            self._statement(statement)
        return self.found

    def _say(self, node: ast.AST, rule: str, text: str) -> None:
        self.found.append(Finding(self.file, getattr(node, "lineno", self.node.lineno), rule, text))

    def _lengths(self) -> None:
        arguments = [*self.node.args.posonlyargs, *self.node.args.args, *self.node.args.kwonlyargs]
        constant = {a.arg for a in arguments if a.annotation is not None and "constexpr" in ast.unparse(a.annotation)}
        self.known |= dict.fromkeys(constant, _CONSTANT)
        for name in sorted(constant):
            if LENGTH.fullmatch(name):
                self._say(self.node, "lengths", f"{name} is a constant: every length would be compiled anew")
        runs_alone = any(isinstance(n, ast.Call) and _called(n) == "tl.program_id" for n in ast.walk(self.node))
        if not runs_alone:
            return
        spared = self._spared()
        for a in arguments:
            if a.arg not in constant and LENGTH.fullmatch(a.arg) and a.arg not in spared:
                self._say(self.node, "lengths", f"{a.arg} is not in do_not_specialize")

    def _spared(self) -> list[str]:
        decorator = _decorator(self.node)
        for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
            if keyword.arg == "do_not_specialize":
                if isinstance(keyword.value, ast.Name):
                    return self.lists.get(keyword.value.id, [])
                names = getattr(keyword.value, "elts", [])
                return [e.value for e in names if isinstance(e, ast.Constant) and isinstance(e.value, str)]
        return []

    def _statement(self, node: ast.stmt) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._expression(child)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            self.known[node.target.id] = self._kind(ast.BinOp(node.target, node.op, node.value))
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            self.known[node.target.id] = _Kind()
        for part in ("body", "orelse"):
            for statement in getattr(node, part, []):
                if isinstance(statement, ast.stmt):
                    self._statement(statement)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts) else None
            for place, name in enumerate(target.elts):
                if isinstance(name, ast.Name):
                    self.known[name.id] = self._kind(values[place]) if values else _Kind()
        elif isinstance(target, ast.Name):
            self.known[target.id] = self._kind(value)

    def _expression(self, root: ast.expr) -> None:
        for node in ast.walk(root):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                self._product(node)
            elif isinstance(node, ast.Call):
                self._call(node)
            elif isinstance(node, ast.Attribute) and _dotted(node) in ("tl.make_block_ptr", "tl.advance"):
                self._say(node, "pointers", f"{_dotted(node)} is gone from newer Triton; use plain pointers")

    def _product(self, node: ast.BinOp) -> None:
        for step, other in ((node.left, node.right), (node.right, node.left)):
            if not isinstance(step, ast.Name) or step.id in SMALL:
                continue
            if not any(pattern.fullmatch(step.id) for pattern in (STRIDE, LENGTH, WIDTH)):
                continue
            kind = self._kind(other)
            if not (kind.wide or kind.local or self._kind(step).wide):
                text = f"{ast.unparse(node)}: {ast.unparse(other)} may be 32 bits wide; write .to(tl.int64)"
                self._say(node, "int64", text)
                return

    def _call(self, node: ast.Call) -> None:
        name = _called(node)
        if name.startswith("tl.atomic_"):
            place = f"{self.file}::{self.node.name}"
            if place not in ATOMICS:
                self._say(node, "atomics", f"{name}: its order is not fixed; give each result one owner")
        elif name in ("tl.load", "tl.store") and node.args:
            # load(pointer, mask), store(pointer, value, mask)
            place_of_mask = 1 if name == "tl.load" else 2
            masked = len(node.args) > place_of_mask or any(k.arg == "mask" for k in node.keywords)
            kind = self._kind(node.args[0])
            if kind.block and not masked and not (name == "tl.load" and kind.clamped):
                need = "mask it or clamp its index with tl.minimum" if name == "tl.load" else "mask it"
                self._say(node, "bounds", f"{name} of a block reaches past the end; {need}")

    def _kind(self, node: ast.expr) -> _Kind:
        if isinstance(node, ast.Name):
            return self.known.get(node.id, _CONSTANT if node.id.isupper() else _Kind())
        if isinstance(node, ast.Constant):
            return _CONSTANT
        if isinstance(node, ast.UnaryOp):
            return self._kind(node.operand)
        if isinstance(node, ast.Subscript):
            inner = self._kind(node.value)
            return inner if _reshapes(node) else _Kind()
        if isinstance(node, ast.BinOp):
            return self._binary(node)
        if isinstance(node, ast.IfExp):
            a, b = self._kind(node.body), self._kind(node.orelse)
            return _Kind(a.wide and b.wide, a.local and b.local, a.block or b.block, a.clamped and b.clamped)
        return self._result(node) if isinstance(node, ast.Call) else _Kind()

    def _binary(self, node: ast.BinOp) -> _Kind:
        a, b = self._kind(node.left), self._kind(node.right)
        bounded = isinstance(node.op, ast.Mod)
        local = b.local if bounded else a.local and b.local
        return _Kind(a.wide or b.wide, local, a.block or b.block, a.clamped or b.clamped or (bounded and a.block))

    def _result(self, node: ast.Call) -> _Kind:
        name = _called(node)
        of = [self._kind(a) for a in node.args]
        if name == "tl.arange":
            return _Kind(local=True, block=True)
        if name in ("tl.minimum", "tl.maximum") and len(of) == 2:
            least = name == "tl.minimum"
            local = any(k.local for k in of) if least else all(k.local for k in of)
            block = any(k.block for k in of)
            return _Kind(all(k.wide for k in of), local, block, any(k.clamped for k in of) or (least and block))
        if name == "tl.where" and len(of) == 3:
            a, b = of[1:]
            return _Kind(a.wide and b.wide, a.local and b.local, any(k.block for k in of), a.clamped and b.clamped)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to" and node.args:
            inner = self._kind(node.func.value)
            return _Kind(_dotted(node.args[0]) == "tl.int64" or inner.wide, inner.local, inner.block, inner.clamped)
        if name == "tl.cast" and len(node.args) == 2:
            inner = of[0]
            return _Kind(_dotted(node.args[1]) == "tl.int64" or inner.wide, inner.local, inner.block, inner.clamped)
        return _Kind()


def _reshapes(node: ast.Subscript) -> bool:
    """Whether a subscript only adds dimensions: ``x[:, None]``."""
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    return all(isinstance(p, ast.Slice) or (isinstance(p, ast.Constant) and p.value is None) for p in parts)
