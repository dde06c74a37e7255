"""`python -m torture`: the rows of the scorecard, one line each as it ends, and a table of all in the folder."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torture
from torture.rows import Outcome, Setup


def modules() -> Iterator[ModuleType]:
    """Every module of the package that has rows, in the order of their numbers."""
    found = [
        importlib.import_module(f"torture.{info.name}")
        for info in pkgutil.iter_modules(torture.__path__)
        if info.name[0] == "r" and info.name[1].isdigit()
    ]
    yield from sorted(found, key=lambda module: int(module.ROWS[0].name[1:]))


def table(outcomes: list[Outcome]) -> str:
    """Markdown: a line per outcome."""
    verdict = {True: "met", False: "**missed**", None: "not asked"}
    lines = ["| row | test | target | figure | |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        said = outcome.figure + (f"; {outcome.cause}" if outcome.cause else "")
        lines.append(
            f"| {outcome.row.name} | {outcome.row.what} | {outcome.row.target} | {said} | {verdict[outcome.is_met]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--rows", help="only these, by commas: R1,R7")
    parser.add_argument("--scale", choices=("short", "full"), default="full")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--url", help="a server that runs already, of any make: the rows that can be asked of it")
    parser.add_argument("--model", help="what that server calls its model")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=N", help="another count than the scale's")
    parser.add_argument("--out", type=Path, default=Path("build/torture"), help="folder of the records and the table")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = {name: int(count) for name, _, count in (size.partition("=") for size in args.size)}
    setup = Setup(args.scale, args.seed, args.out, args.url, args.model, sizes)
    wanted = set(args.rows.upper().split(",")) if args.rows else None
    print(f"seed {args.seed}", flush=True)
    outcomes: list[Outcome] = []
    for module in modules():
        if wanted is not None and wanted.isdisjoint(row.name for row in module.ROWS):
            continue
        if args.url and not getattr(module, "HAS_NEIGHBOURS", False):
            continue
        for outcome in module.torture(setup):
            outcomes.append(outcome)
            print(outcome.line(), flush=True)
            for step in outcome.trace:
                print(f"     {step}", flush=True)
            (args.out / "table.md").write_text(table(outcomes))
            (args.out / "outcomes.json").write_text(json.dumps([dataclasses.asdict(one) for one in outcomes], indent=1))
    return 1 if any(outcome.is_met is False for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
