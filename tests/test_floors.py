"""Imports go down only; the line that breaks the order is named."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "orcaserve"
FLOORS = [
    ({"core/request", "core/batch", "core/config", "core/timing"}, 0),
    ({"core"}, 1),
    ({"engine", "sim", "bench"}, 2),
    ({"ops", "parallel"}, 3),
    ({"model"}, 4),
    ({"worker"}, 5),
    ({"executors"}, 6),
    (
        {
            "serve",
            "llm",
            "cli",
            "cli_bench",
            "cli_simulate",
            "cli_config",
            "cli_engine",
            "cli_explain",
            "cli_policy",
            "cli_client",
            "cli_itl",
            "cli_size",
            "cli_top",
            "builtin",
            "__main__",
        },
        7,
    ),
]
PURE = ("core", "engine", "sim")
FORBIDDEN_IN_PURE = {"torch", "numpy", "time", "threading", "random", "logging", "asyncio", "os", "socket"}
UNSAFE = ("pickle", "dill", "torch.load", "trust_remote_code", "eval(", "exec(")


def floor_of(module: str) -> int | None:
    """The floor of a path below the package, such as "core/batch"; None for the package itself."""
    for names, floor in FLOORS:
        if any(module == name or module.startswith(name + "/") for name in names):
            return floor
    return None


def imports(path: Path) -> list[tuple[int, str]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}")]
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    module = str(path.relative_to(ROOT).with_suffix("")).replace("\\", "/").removesuffix("/__init__")
    own = floor_of(module)
    if own is None:
        assert module == "__init__", f"{module} stands on no floor: add it to FLOORS"
        return
    for line, name in imports(path):
        if name == "orcaserve" or name.startswith("orcaserve."):
            other = floor_of(name.removeprefix("orcaserve").removeprefix(".").replace(".", "/"))
            assert other is None or other <= own, f"{path}:{line}: floor {own} imports {name} of floor {other}"
        elif module.startswith(PURE):
            assert name.split(".")[0] not in FORBIDDEN_IN_PURE, f"{path}:{line}: plain floors do not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unsafe(path: Path) -> None:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        for word in UNSAFE:
            bare = line.replace("model.eval(", "").replace(".eval(", "")
            bare = bare.replace("asyncio.create_subprocess_exec(", "")  # a program with its arguments, and no shell
            assert word not in bare, f"{path}:{number}: {word}"
