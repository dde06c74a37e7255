"""What a run on a GPU found: line by line in the terminal, as Markdown, as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from orcaserve import __version__
from orcaserve.bench.gpu.roofline import Card
from orcaserve.bench.report import Machine, markdown_table, number

READING = (
    "Limit: what the card was measured to do, in the section above all others, for the bytes that must be read or the "
    "products that must be made, whichever takes longer. Share: of that limit. Others: their time at the same, and how "
    "many times as long as ours it is."
)
JSON, PAGE, FIGURE = "gpu.json", "gpu.md", "gpu.png"


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that was measured.

    seconds: of one call, iteration or run. rate: what came of it; limit: the most that could have come; both in `unit`.
    beside: others' seconds at the same. wrong: it is not as it has to be.
    """

    what: str
    seconds: float | None = None
    rate: float | None = None
    unit: str = ""
    limit: float | None = None
    beside: dict[str, float] = {}
    note: str = ""
    wrong: bool = False

    @property
    def share(self) -> float | None:
        """Of the limit."""
        return self.rate / self.limit if self.rate is not None and self.limit else None


class Found(msgspec.Struct):
    """One section. seconds: that it took. error: what ended it before its end."""

    name: str
    title: str
    lines: list[Line]
    seconds: float = 0.0
    error: str | None = None


class Report(msgspec.Struct):
    """Its owner adds to it while it is measured. device: the card's name. is_tiny: too small to be quoted."""

    date: str
    machine: Machine
    device: str
    versions: dict[str, str]
    is_tiny: bool
    card: Card | None
    sections: list[Found]
    orcaserve: str = __version__


def told(line: Line) -> str:
    """A line of the terminal."""
    parts = [line.what + (" ⚠" if line.wrong else "")]
    if line.seconds is not None:
        parts.append(duration(line.seconds))
    if line.rate is not None:
        parts.append(f"{number(line.rate)} {line.unit}")
    if line.share is not None:
        parts.append(f"{line.share:.0%} of {number(line.limit)}")
    parts += [f"{name} {text}" for name, text in _others(line)]
    return "; ".join([*parts, line.note] if line.note else parts)


def markdown(report: Report, figure: str | None = None) -> str:
    """The page; figure: the name of the picture beside it, if there is one."""
    return "\n".join(_markdown(report, figure)) + "\n"


def write(report: Report, folder: Path) -> None:
    """Writes gpu.json and gpu.md, in which the picture stands if there is one."""
    (folder / JSON).write_bytes(msgspec.json.encode(report))
    figure = FIGURE if (folder / FIGURE).exists() else None
    (folder / PAGE).write_text(markdown(report, figure), encoding="utf-8")


def read(path: Path) -> Report:
    """What `write` wrote. Raises ValueError for what is no such report."""
    return msgspec.json.decode(path.read_bytes(), type=Report)


def duration(seconds: float) -> str:
    """In the unit that fits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{number(seconds * factor)} {unit}"
    return f"{number(seconds * 1e6)} µs"


def problems(report: Report) -> list[str]:
    """What is missing, and what is not as it has to be."""
    broken = [f"“{found.title}” broke off: {found.error}" for found in report.sections if found.error]
    wrong = (line.what for found in report.sections for line in found.lines if line.wrong)
    return broken + [f"Not as it has to be: {what}." for what in wrong]


def warnings(report: Report) -> list[str]:
    """The problems, and why the figures should not be quoted."""
    tiny = ["A tiny run, to see that every part works: do not quote."] if report.is_tiny else []
    return tiny + problems(report)


def _markdown(report: Report, figure: str | None) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    yield from (f"# On {report.device}", "")
    yield f"{report.date}; {versions}; orcaserve {report.orcaserve}. The host: {report.machine}."
    for line in warnings(report):
        yield from ("", f"**⚠ {line}**")
    if figure:
        yield from ("", f"![Shares of the card's limits]({figure})")
    yield from ("", READING)
    for found in report.sections:
        yield from ("", f"## {found.title}", "")
        yield from _table(found.lines)
        yield from ("", f"It took {found.seconds:.0f} s.")


def _table(lines: list[Line]) -> Iterator[str]:
    """Without the columns that nobody fills."""
    others = list(dict.fromkeys(name for line in lines for name in line.beside))
    head = ["what", "time", "measured", "limit", "share", *others, "remark"]
    rows = []
    for line in lines:
        beside = dict(_others(line))
        rows.append(
            [
                line.what + (" ⚠" if line.wrong else ""),
                "" if line.seconds is None else duration(line.seconds),
                "" if line.rate is None else f"{number(line.rate)} {line.unit}",
                "" if line.limit is None else f"{number(line.limit)} {line.unit}",
                "" if line.share is None else f"{line.share:.0%}",
                *(beside.get(name, "") for name in others),
                line.note,
            ]
        )
    kept = [i for i in range(len(head)) if not i or any(row[i] for row in rows)]
    yield from markdown_table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _others(line: Line) -> Iterator[tuple[str, str]]:
    for name, seconds in line.beside.items():
        ratio = f" ({seconds / line.seconds:.2f}×)" if line.seconds else ""
        yield name, f"{duration(seconds)}{ratio}"
