"""`run`: measures section by section, says each line as soon as it is there, and writes down all that there is so far.

An error ends its section and no other, so that a run on a machine that is lent for minutes gives what it can.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from orcaserve.bench.gpu import SECTIONS
from orcaserve.bench.gpu.report import FIGURE, Found, Line, Report, told, write

Measure = Callable[[], Iterable[Line]]


def run(report: Report, sections: Mapping[str, Measure], out: Path | None, say: Callable[[str], None]) -> None:
    """Adds what the sections find to the report, in their order; out: the folder that it is written to.

    A picture that is there is of another run, and goes.
    """
    if out is not None:
        (out / FIGURE).unlink(missing_ok=True)
    for name, measure in sections.items():
        found = Found(name, SECTIONS[name], [])
        report.sections.append(found)
        say(f"== {found.title}")
        began = time.perf_counter()
        try:
            for line in measure():
                found.lines.append(line)
                say(f"  {told(line)}")
                found.seconds = time.perf_counter() - began
                _write(report, out)
        except Exception as error:  # whatever it is, the other sections can still be measured
            found.error = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            say(f"  ⚠ {found.error}")
        found.seconds = time.perf_counter() - began
        say(f"  ({found.seconds:.1f} s)")
        _write(report, out)


def _write(report: Report, out: Path | None) -> None:
    if out is not None:
        write(report, out)
