"""What a comparison found: its figures and ratios, and what was wrong with it, as a table, as Markdown and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from orcaserve import __version__
from orcaserve.bench.client import Record, Server
from orcaserve.bench.measures import FIGURES, figures
from orcaserve.bench.offline import Offline
from orcaserve.bench.workloads import Kind, Work

READING = (
    "Medians over rounds. In brackets: how many times as good as {baseline}, the median over rounds of the quotient "
    "within a round; above 1 is better, for rates and for times alike."
)

# Random prompts begin alike by chance, but not for so many tokens.
_KNOWN = 16


class Machine(msgspec.Struct, frozen=True):
    """Where the client runs. load: its load average when the comparison began; memory in bytes."""

    cpu: str
    cores: int
    memory: int
    system: str
    load: float

    @classmethod
    def this(cls) -> Machine:
        cpu = platform.processor() or platform.machine()
        try:
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    cpu = line.partition(":")[2].strip()
        except OSError:
            pass  # not Linux
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        system = f"{platform.system()} {platform.release().partition('-')[0]}"
        return cls(cpu, cores, memory, system, os.getloadavg()[0])

    def __str__(self) -> str:
        return f"{self.cores} cores of {self.cpu}, {self.memory / 2**30:.0f} GiB, {self.system}"


class Workload(msgspec.Struct, frozen=True):
    """A work's size, the same in every round."""

    name: str
    kind: Kind
    requests: int
    prompt_tokens: int
    output_tokens: int

    @classmethod
    def of(cls, work: Work) -> Workload:
        prompt_tokens = sum(len(item.prompt_ids) for item in work.items)
        return cls(work.name, work.kind, len(work.items), prompt_tokens, sum(item.max_tokens for item in work.items))


class Run(msgspec.Struct, frozen=True):
    """One server did one work once. round: from 1. client_cpu: the share of one core that the client took meanwhile."""

    round: int
    work: str
    server: str
    client_cpu: float
    records: list[Record]


class Report(msgspec.Struct, frozen=True):
    """The first server is the baseline. The runs are in the order in which they were made; their owner adds to them."""

    date: str
    machine: Machine
    seed: int
    vocab: int
    servers: Sequence[Server | Offline]
    works: list[Workload]
    runs: list[Run]
    orcaserve: str = __version__


class Cell(msgspec.Struct, frozen=True):
    """One figure of one server: round by round, its median, and how many times as good as the baseline it is.

    There is no ratio where either of the two is flawed, and none of the baseline itself.
    """

    by_round: list[float | None]
    median: float | None
    ratio: float | None
    is_flawed: bool


class Line(msgspec.Struct, frozen=True):
    """One figure of one work, for every server in the report's order."""

    work: str
    kind: Kind
    figure: str
    unit: str
    is_rate: bool
    cells: list[Cell]


def summary(report: Report) -> list[Line]:
    """Every figure of every work."""
    flawed = {(run.server, run.work) for run in report.runs for record in run.records for _ in _flaws(record)}
    baseline = report.servers[0].name
    lines = []
    for work in report.works:
        spoiled = {server for server, name in flawed if name == work.name}
        runs = [[run for run in report.runs if (run.server, run.work) == (s.name, work.name)] for s in report.servers]
        measured = [[figures(work.kind, run.records) for run in of_server] for of_server in runs]
        for i, figure in enumerate(FIGURES[work.kind]):
            values = [[of_run[i] for of_run in of_server] for of_server in measured]
            cells = []
            for server, mine in zip(report.servers, values, strict=True):
                is_comparable = server.name != baseline and not spoiled & {server.name, baseline}
                ratio = _ratio(mine, values[0], figure.is_rate) if is_comparable else None
                cells.append(Cell(mine, _median(mine), ratio, server.name in spoiled))
            lines.append(Line(work.name, work.kind, figure.name, figure.unit, figure.is_rate, cells))
    return lines


def problems(report: Report) -> list[str]:
    """What makes figures wrong: a line for each kind of flaw of a server's work, all rounds together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    total: dict[tuple[str, str], int] = {}
    for run in report.runs:
        total[run.server, run.work] = total.get((run.server, run.work), 0) + len(run.records)
        for record in run.records:
            for flaw, example in _flaws(record):
                found.setdefault((run.server, run.work, flaw), []).append(example)
    return [
        f"{server}, {work}: {len(examples)} of {total[server, work]} requests {flaw}: {examples[0]}"
        for (server, work, flaw), examples in found.items()
    ]


def notes(report: Report) -> list[str]:
    """What a reader should know: how tokens were counted where usage and chunks differ, and the client's own cost."""
    lines = []
    for server in report.servers:
        records = [record for run in report.runs if run.server == server.name for record in run.records]
        counted = [record.counted for record in records if not record.error]
        if count := counted.count("usage"):
            lines.append(
                f"{server.name}: in {count} of {len(counted)} replies the chunks did not show as many tokens as "
                f"`usage` counts; their times are spread evenly over the tokens."
            )
        if count := counted.count("guess"):
            lines.append(f"{server.name}: {count} of {len(counted)} replies came without `usage`: a chunk is a token.")
    if report.runs:
        most = max(run.client_cpu for run in report.runs)
        lines.append(f"The client itself took at most {most:.0%} of one core.")
    lines.append(f"The load average of the client's machine was {report.machine.load:.2f} at the start.")
    return lines


def table(report: Report) -> Table:
    """For the terminal."""
    shown = Table(box=SIMPLE_HEAD, caption=READING.format(baseline=report.servers[0].name), caption_justify="left")
    shown.add_column("work", no_wrap=True)
    shown.add_column("figure", no_wrap=True)
    for server in report.servers:
        shown.add_column(server.name, justify="right")
    previous = None
    for line in summary(report):
        if previous not in (None, line.work):
            shown.add_section()
        cells = (f"[red]{_cell(cell)}[/]" if cell.is_flawed else _cell(cell) for cell in line.cells)
        shown.add_row("" if line.work == previous else line.work, f"{line.figure}, {line.unit}", *cells)
        previous = line.work
    return shown


def show(report: Report, terminal: Console) -> None:
    """The table, what is wrong, and what a reader should know."""
    terminal.print(table(report))
    for line in problems(report):
        terminal.print(f"⚠ {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    for line in notes(report):
        terminal.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def markdown(report: Report, figure: str | None = None) -> str:
    """The page; figure: the name of the picture beside it, if there is one."""
    return "\n".join(_markdown(report, figure)) + "\n"


def write(report: Report, folder: Path, figure: str | None = None) -> None:
    """Writes report.md and report.json."""
    (folder / "report.md").write_text(markdown(report, figure), encoding="utf-8")
    found = {"summary": summary(report), "problems": problems(report), "notes": notes(report)}
    (folder / "report.json").write_bytes(msgspec.json.encode(found | msgspec.structs.asdict(report)))


def _markdown(report: Report, figure: str | None) -> Iterator[str]:
    yield from ("# Comparison of servers", "", f"{report.date}, {report.machine}; orcaserve bench {report.orcaserve}.")
    if wrong := problems(report):
        yield from ("", "## ⚠ Flawed: do not quote", "", *(f"- **{line}**" for line in wrong))
    names = [server.name for server in report.servers]
    lines = summary(report)
    yield from ("", "## Figures", "")
    yield from markdown_table(
        ["work", "figure", *names],
        [[line.work, f"{line.figure}, {line.unit}", *map(_cell, line.cells)] for line in lines],
    )
    yield from ("", READING.format(baseline=names[0]))
    if figure:
        yield from ("", f"![Figures of every server, side by side]({figure})")
    yield from ("", "## Servers and works", "")
    yield from markdown_table(
        ["server", "address", "model", "version", "requests in flight"],
        [[s.name, s.address, s.model or "", s.version or "", f"{s.concurrency or 'no limit'}"] for s in report.servers],
    )
    yield ""
    yield from markdown_table(
        ["work", "requests", "prompt tokens", "output tokens"],
        [[work.name, *map(str, (work.requests, work.prompt_tokens, work.output_tokens))] for work in report.works],
    )
    yield from ("", f"Token ids below {report.vocab}, seed {report.seed}.", *(f"\n{note}" for note in notes(report)))
    yield from ("", "## Round by round", "")
    yield from markdown_table(
        ["work", "figure", *names],
        [[line.work, f"{line.figure}, {line.unit}", *(_rounds(cell) for cell in line.cells)] for line in lines],
    )


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cell.replace('|', '¦') for cell in row)} |"


def _flaws(record: Record) -> Iterator[tuple[str, str]]:
    """(flaw, example)."""
    if record.error:
        yield "failed", record.error
    elif record.output_tokens != record.max_tokens:
        yield "got another number of tokens than asked for", f"{record.output_tokens} instead of {record.max_tokens}"
    if record.seen_prompt_tokens not in (None, record.prompt_tokens):
        example = f"{record.seen_prompt_tokens} instead of {record.prompt_tokens}"
        yield "had another number of prompt tokens than was sent", example
    if record.cached_tokens >= _KNOWN:
        example = f"{record.cached_tokens} of {record.prompt_tokens} tokens"
        yield "had a known prompt (restart the servers, or give another --seed)", example


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _ratio(mine: Sequence[float | None], baseline: Sequence[float | None], is_rate: bool) -> float | None:
    pairs = [(a, b) for a, b in zip(mine, baseline, strict=False) if a and b]
    return _median([a / b if is_rate else b / a for a, b in pairs])


def _cell(cell: Cell) -> str:
    mark = "⚠ " * cell.is_flawed
    ratio = "" if cell.ratio is None else f" ({cell.ratio:.2f}×)"
    return f"{mark}{number(cell.median)}{ratio}"


def _rounds(cell: Cell) -> str:
    return " / ".join(map(number, cell.by_round))


def number(value: float | None) -> str:
    """Three digits; "—" for a figure that there is not."""
    if value is None:
        return "—"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
