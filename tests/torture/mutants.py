"""Mutation testing of one package: every small change of a source, one at a time, against tests that should notice.

    python -m torture.mutants orcaserve.core.swap 17 -- pytest's arguments

runs pytest with the 17th mutant in the place of that module; without a name, with everything as it is. Nothing is
written: the module is compiled from a changed tree when it is imported.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

_FLIPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


class Change(NamedTuple):
    """A small change, which `make` does to the tree that it was found in."""

    line: int
    words: str
    make: Callable[[], None]


def changes(tree: ast.Module) -> Iterator[Change]:
    """All small changes of a tree: flipped comparisons, other numbers, and/or, dropped statements, other returns."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in _own(function):
                yield from _changes_of(node)


def _own(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a body that run: no annotations, no docstring, no messages of errors, no function inside."""
    stack: list[ast.AST] = list(reversed(function.body))
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Raise | ast.JoinedStr):
            continue
        for name, value in ast.iter_fields(node):
            if name != "annotation":
                children = value if isinstance(value, list) else [value]
                stack += [child for child in reversed(children) if isinstance(child, ast.AST)]


def _changes_of(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Compare():
            for index, operator in enumerate(node.ops):
                flipped = _FLIPPED[type(operator)]
                yield Change(
                    node.lineno, f"{type(operator).__name__} → {flipped.__name__}", _put(node.ops, index, flipped())
                )
        case ast.BoolOp():
            other = ast.Or if isinstance(node.op, ast.And) else ast.And
            yield Change(node.lineno, f"{type(node.op).__name__} → {other.__name__}", _set(node, "op", other()))
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            opposite = ast.Sub if isinstance(node.op, ast.Add) else ast.Add
            words = f"{type(node.op).__name__} → {opposite.__name__}"
            yield Change(node.lineno, words, _set(node, "op", opposite()))
        case ast.Constant(value=int(value)) if not isinstance(value, bool):
            yield Change(node.lineno, f"{value} → {value + 1}", _set(node, "value", value + 1))
            yield Change(node.lineno, f"{value} → {value - 1}", _set(node, "value", value - 1))
        case ast.Constant(value=bool(value)):
            yield Change(node.lineno, f"{value} → {not value}", _set(node, "value", not value))
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield Change(node.lineno, "return None", _set(node, "value", ast.Constant(None)))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Delete() | ast.Continue() | ast.Break():
            yield Change(node.lineno, f"without {ast.unparse(node)[:60]}", _drop(node))
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield Change(node.lineno, f"without {ast.unparse(node)[:60]}", _drop(node))


def _set(node: ast.AST, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(node, name, value)


def _put(values: list[ast.cmpop], index: int, value: ast.cmpop) -> Callable[[], None]:
    return lambda: values.__setitem__(index, value)


def _drop(node: ast.AST) -> Callable[[], None]:
    """The node becomes a `pass`, in the place where it is."""

    def drop() -> None:
        node.__class__ = ast.Pass  # type: ignore[assignment]

    return drop


def sources(package: ModuleType, without: Sequence[str] = ()) -> dict[str, Path]:
    """The modules of a package and of those in it, by name."""
    found = {}
    for folder in package.__path__:
        for path in sorted(Path(folder).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if path.stem != "__init__" and path.stem not in without:
                found[".".join((package.__name__, *parts))] = path
    return found


def count(path: Path) -> int:
    return sum(1 for _ in changes(ast.parse(path.read_text())))


def words(path: Path, index: int) -> str:
    """What a mutant is, for those who look for a test that notices it."""
    change = list(changes(ast.parse(path.read_text())))[index]
    return f"{path.name}:{change.line}: {change.words}"


def mutate(source: str, index: int) -> ast.Module:
    """The tree of a source with one change."""
    tree = ast.parse(source)
    list(changes(tree))[index].make()
    return ast.fix_missing_locations(tree)


class _Mutated(importlib.machinery.SourceFileLoader):
    """A loader of a module that is not quite what its source says."""

    def __init__(self, name: str, path: str, index: int) -> None:
        super().__init__(name, path)
        self._index = index

    def get_code(self, fullname: str) -> CodeType:
        return compile(mutate(Path(self.path).read_text(), self._index), self.path, "exec")


class _Finder:
    """Finds one module before anybody else does."""

    def __init__(self, name: str, index: int) -> None:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None
        self._name = name
        self._loader = _Mutated(name, found.origin, index)

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._loader.path, loader=self._loader)


def main(name: str, index: str, dashes: str, *arguments: str) -> int:
    import pytest

    if not name:
        return int(pytest.main(list(arguments)))
    finder = _Finder(name, int(index))
    for loaded in [one for one in sys.modules if one.startswith("orcaserve.")]:
        del sys.modules[loaded]  # who has it already would keep the original
    sys.meta_path.insert(0, finder)  # type: ignore[arg-type]
    return int(pytest.main(list(arguments)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
