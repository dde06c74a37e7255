"""What the clients' programs have in common: checks one by one, and a last line with counts.

A program gets four arguments: the server's URL, the model's name and folder, and a folder to write in. It runs in the
client's own environment, so it knows nothing but the standard library and the client.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Check = Callable[[], str | None]

BURST = (64, 32, 20)  # of the tools that measure: tokens of a prompt, tokens to generate, requests, all at once

_LAST = re.compile(r"passed (\d+), failed (\d+), deselected (\d+)(?:; (.*))?")


class Arguments(NamedTuple):
    """url: ends in no slash and has no /v1."""

    url: str
    model: str
    checkpoint: Path
    out: Path


class Counts(NamedTuple):
    """What a program's last line says. said: what it measured, in words."""

    passed: int
    failed: int
    deselected: int = 0
    said: str = ""

    def line(self) -> str:
        counts = f"passed {self.passed}, failed {self.failed}, deselected {self.deselected}"
        return f"{counts}; {self.said}" if self.said else counts

    @classmethod
    def of(cls, line: str) -> Counts | None:
        """None: this is not such a line."""
        found = _LAST.fullmatch(line.strip())
        return found and cls(*(int(found[at]) for at in (1, 2, 3)), found[4] or "")


def arguments() -> Arguments:
    url, model, checkpoint, out = sys.argv[1:]
    return Arguments(url, model, Path(checkpoint), Path(out))


def end(counts: Counts) -> None:
    """Says them and ends the program: with 1 if anything failed."""
    print(counts.line(), flush=True)
    sys.exit(1 if counts.failed else 0)


def figures(rate: float, ttft: float, tpot: float, latency: float) -> str:
    """What the tools that measure say of BURST: tokens a second, and medians in seconds."""
    return f"{rate:.0f} output tokens/s; medians: TTFT {ttft:.2f} s, TPOT {tpot * 1000:.0f} ms, latency {latency:.2f} s"


def run(checks: list[Check]) -> None:
    """Each of them, whatever the others did. What one returns is said in the last line."""
    failed, said = 0, []
    for check in checks:
        try:
            word = check()
        except Exception:
            failed += 1
            traceback.print_exc()
            print(f"FAILED {check.__name__}", flush=True)
        else:
            print(f"passed {check.__name__}", flush=True)
            said += [word] if word else []
    end(Counts(len(checks) - failed, failed, 0, ", ".join(said)))
