"""What a benchmark of kernels found: as a table, as Markdown, as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from orcaserve import __version__
from orcaserve.bench.kernels import FEW, MANY, OURS, Cell, Line, Sample, Shape, Work, summary
from orcaserve.bench.report import Machine, markdown_table, number

READING = (
    "Medians over rounds. bw, peak: shares of the ceilings measured right before the kernel, of the memory's "
    f"bandwidth below {MANY} rows, of the peak of products above {FEW}, of neither where data lie in a cache. "
    "Bytes are those that were read, which is fewer than torch reads where weights are coded. "
    "torch, twin: torch's own operators, and the twin with equal bits, and how many times as fast as ours they are."
)
HEAD = ("kernel", "M", "µs", "GB/s", "GFLOP/s", "bw", "peak", "torch", "twin")


class Report(msgspec.Struct, frozen=True):
    """bandwidth, peak: how the ceilings were measured. is_quick: too short to be quoted.

    quantization, kv_dtype: of what is ours.
    """

    date: str
    machine: Machine
    shape: Shape
    dtype: str
    isa: str
    threads: int
    torch: str
    is_quick: bool
    bandwidth: str
    peak: str
    works: list[Work]
    samples: list[Sample]
    quantization: str = "none"
    kv_dtype: str = "auto"
    orcaserve: str = __version__


class Ceiling(msgspec.Struct, frozen=True):
    """Bytes or FLOPs a second, over the whole run."""

    best: float
    median: float


def watched(samples: Iterable[Sample], total: int, terminal: Console) -> list[Sample]:
    """All samples, with a bar while they come."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    found: list[Sample] = []
    with Progress(*columns, console=terminal, refresh_per_second=2, transient=True) as progress:
        task = progress.add_task("", total=total)
        for sample in samples:
            found.append(sample)
            progress.update(task, advance=1, description=f"round {sample.round}, {sample.kernel}")
    return found


def ceilings(report: Report) -> dict[str, Ceiling]:
    """The best and the median of the run, of those that it measured."""
    measured = {
        "bandwidth": [sample.bandwidth for sample in report.samples if sample.bandwidth],
        "peak": [sample.peak for sample in report.samples if sample.peak],
    }
    return {name: Ceiling(max(values), statistics.median(values)) for name, values in measured.items() if values}


def notes(report: Report) -> list[str]:
    """What the ceilings were, and what a reader should know."""
    lines = []
    for name, found in ceilings(report).items():
        title, how, unit = {
            "bandwidth": ("Read bandwidth", report.bandwidth, "GB/s"),
            "peak": ("Peak of products", report.peak, "GFLOP/s"),
        }[name]
        lines.append(f"{title}: median {number(found.median / 1e9)}, best {number(found.best / 1e9)} {unit} ({how}).")
    return lines


def warnings(report: Report) -> list[str]:
    """Why the figures should not be quoted."""
    lines = ["A quick run: copies may fit a cache and times are short; do not quote."] if report.is_quick else []
    if report.machine.load >= 0.5:
        lines.append(f"The load average was {report.machine.load:.2f} at the start: somebody else was computing.")
    return lines


def subject(report: Report) -> str:
    """What was measured, in a line."""
    threads = f"{report.threads} thread{'s' * (report.threads > 1)}"
    fewer = "" if report.quantization == "none" else f", weights in {report.quantization}"
    fewer += "" if report.kv_dtype == "auto" else f", KV in {report.kv_dtype}"
    return f"{report.shape.name}, {report.dtype}{fewer}, {report.isa}, {threads}, torch {report.torch}"


def table(report: Report) -> Table:
    """For the terminal."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title=subject(report), caption=READING, caption_justify="left")
    for i, name in enumerate(HEAD):
        shown.add_column(name, justify="right" if i else "left", no_wrap=True)
    previous = None
    for line in summary(report.works, report.samples):
        name, *rest = _row(line, "{1}×")
        if previous not in (None, name):
            shown.add_section()
        shown.add_row("" if name == previous else name, *rest)
        previous = name
    return shown


def show(report: Report, terminal: Console) -> None:
    """The table, the ceilings, and why it should not be quoted, if so."""
    terminal.print(table(report))
    for line in notes(report):
        terminal.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in warnings(report):
        terminal.print(f"⚠ {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def markdown(report: Report, figure: str | None = None) -> str:
    """The page; figure: the name of the picture beside it, if there is one."""
    return "\n".join(_markdown(report, figure)) + "\n"


def write(report: Report, folder: Path, figure: str | None = None) -> None:
    """Writes kernels.md and kernels.json."""
    (folder / "kernels.md").write_text(markdown(report, figure), encoding="utf-8")
    found = {"summary": summary(report.works, report.samples), "ceilings": ceilings(report)}
    found |= {"notes": notes(report), "warnings": warnings(report)}
    (folder / "kernels.json").write_bytes(msgspec.json.encode(found | msgspec.structs.asdict(report)))


def save(report: Report, folder: Path) -> None:
    """`write`, with kernels.png where matplotlib is installed."""
    try:
        from orcaserve.bench.draw_kernels import draw
    except ImportError:  # it is an extra
        write(report, folder)
    else:
        draw(report, folder / "kernels.png")
        write(report, folder, "kernels.png")


def _markdown(report: Report, figure: str | None) -> Iterator[str]:
    yield from ("# Kernels", "", f"{subject(report)}; {report.date}, {report.machine}; orcaserve {report.orcaserve}.")
    for line in warnings(report):
        yield from ("", f"**⚠ {line}**")
    for line in notes(report):
        yield from ("", line)
    yield ""
    head = [*HEAD[:-2], "torch, µs", "twin, µs"]
    yield from markdown_table(head, [_row(line, "{0} ({1}×)") for line in summary(report.works, report.samples)])
    yield from ("", READING)
    if figure:
        yield from ("", f"![Share of the nearer ceiling, kernel by kernel]({figure})")


def _row(line: Line, beside: str) -> list[str]:
    """beside: how another's time and its speed are written beside ours."""
    work, ours = line.work, line.cells[OURS]
    gflops = number(work.flops / ours.seconds / 1e9) if work.flops else "—"
    shares = (_percent(ours.of_bandwidth), _percent(ours.of_peak))
    rates = (number(ours.seconds * 1e6), number(ours.bytes / ours.seconds / 1e9), gflops)
    others = (_others(line.cells.get(name), beside) for name in ("torch", "twin"))
    return [work.kernel, str(work.m), *rates, *shares, *others]


def _others(cell: Cell | None, form: str) -> str:
    return "—" if cell is None else form.format(number(cell.seconds * 1e6), _speed(cell.speed))


def _speed(speed: float) -> str:
    return f"{speed:.2f}" if speed >= 0.01 else "<0.01"


def _percent(share: float | None) -> str:
    return "—" if share is None else f"{share:.0%}"
