"""The report on the paper's experiments: report.md to read, report.json to compute with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.console import Console

from orcaserve import __version__
from orcaserve.bench.paper import alone, curves, ladder, memory, variance
from orcaserve.bench.paper.alone import Alone
from orcaserve.bench.paper.curves import Curves
from orcaserve.bench.paper.ladder import Ladder
from orcaserve.bench.paper.memory import Memory
from orcaserve.bench.paper.section import Section
from orcaserve.bench.paper.variance import Variance
from orcaserve.bench.report import Machine, markdown_table, number


class ModelSize(msgspec.Struct, frozen=True, kw_only=True):
    """The model that ran. Sizes in bytes and tokens."""

    name: str
    architecture: str
    dtype: str
    profile: str
    weight_bytes: int
    kv_bytes_per_token: int
    kv_slots: int
    max_model_len: int
    vocab_size: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the parts measured; None or nothing for one that did not run."""

    alone: Alone | None = None
    mixed: list[Curves] = []
    equal: list[Curves] = []
    variance: Variance | None = None
    ladder: Ladder | None = None
    memory: Memory | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """seconds: what each part took, by its name. versions: of the packages that computed."""

    date: str
    machine: Machine
    threads: int
    versions: dict[str, str]
    model: ModelSize
    effort: str
    requests: int
    seed: int
    found: Found
    seconds: dict[str, float]
    orcaserve: str = __version__


def sections(found: Found) -> dict[str, Section]:
    """Of the parts that ran, by name and in order."""
    parts = {
        "alone": alone.section(found.alone) if found.alone else None,
        "mixed": curves.section("mixed", found.mixed) if found.mixed else None,
        "equal": curves.section("equal", found.equal) if found.equal else None,
        "variance": variance.section(found.variance) if found.variance else None,
        "ladder": ladder.section(found.ladder) if found.ladder else None,
        "memory": memory.section(found.memory) if found.memory else None,
    }
    return {name: section for name, section in parts.items() if section is not None}


def show(report: Report, terminal: Console) -> None:
    """What was found, and what was not as expected."""
    for section in sections(report.found).values():
        terminal.print(section.title, style="bold", markup=False, highlight=False)
        terminal.print(" ".join(section.found), markup=False, highlight=False, soft_wrap=True)
        for line in section.surprises:
            terminal.print(f"⚠ {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def write(report: Report, folder: Path, figures: dict[str, str]) -> None:
    """Writes report.md and report.json. figures: names of the pictures beside them, by part."""
    (folder / "report.md").write_text("\n".join(_markdown(report, figures)), encoding="utf-8")
    said = {name: msgspec.structs.asdict(section) for name, section in sections(report.found).items()}
    found = {"sections": said, "figures": figures, **msgspec.structs.asdict(report)}
    (folder / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))


def _markdown(report: Report, figures: dict[str, str]) -> Iterator[str]:
    parts = sections(report.found)
    yield from ("# The paper's experiments on this machine", "")
    yield (
        f"Experiments of Orca (OSDI 2022), and of what came after it, with {report.model.name} on {report.machine}; "
        f"{report.date}. All of them run the engine's own scheduler, loop and kernels, in real time."
    )
    yield ""
    for section in parts.values():
        yield from (f"- **{section.title}.** {section.found[0]}", *(f"  - ⚠ {line}" for line in section.surprises))
    if not any(section.surprises for section in parts.values()):
        yield from ("", "Every part came out in the expected order.")
    yield ""
    for name, section in parts.items():
        yield from section.markdown(figures.get(name), report.seconds.get(name, 0.0))
    yield from _machine(report)


def _machine(report: Report) -> Iterator[str]:
    model = report.model
    yield from ("## The machine and the model", "")
    yield from markdown_table(
        ["what", "value"],
        [
            ["machine", f"{report.machine}; load average {report.machine.load:.2f} at the start"],
            ["threads", str(report.threads)],
            ["model", f"{model.name}: {model.architecture}, {model.dtype}, up to {model.max_model_len} tokens"],
            ["weights", f"{model.weight_bytes / 2**20:.0f} MiB"],
            ["KV cache", f"{model.kv_slots} tokens of {model.kv_bytes_per_token} bytes; parts use as much as they say"],
            ["numerics profile", model.profile],
            ["versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())],
            ["effort", f"{report.effort}: {report.requests} requests a point"],
            ["seed", str(report.seed)],
            *([f"part “{name}”", f"{number(seconds)} s"] for name, seconds in report.seconds.items()),
        ],
    )
    yield ""
