"""What an operator sees of a start: progress while the model loads, then where the memory goes."""

from __future__ import annotations

import contextlib

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from orcaserve.core.config import EngineInfo

UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def in_bytes(count: int) -> str:
    """ "1.5 GiB" for 1610612736."""
    for size, unit in UNITS:
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


class Console:
    """Owner of what is shown on the terminal (stderr) until the model is loaded."""

    def __init__(self, terminal: Terminal | None = None) -> None:
        self._terminal = Terminal(stderr=True, highlight=False) if terminal is None else terminal
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def say(self, line: str) -> None:
        """One line. Plain text: nothing in it is taken for markup."""
        with contextlib.suppress(OSError):  # what cannot be written is no reason to fail
            self._terminal.print(line, markup=False, soft_wrap=True)

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """A stage of the start has come so far; a bar on a terminal, nothing in a file."""
        if not self._terminal.is_terminal:
            return
        if self._progress is None:
            columns = (TextColumn("{task.description:>24}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._progress = Progress(*columns, TimeElapsedColumn(), console=self._terminal, transient=True)
            self._progress.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total or None)
        self._progress.update(self._tasks[stage], completed=done, total=total or None)

    def on_ready(self, info: EngineInfo, replicas: int = 1) -> None:
        """The model is loaded: where the memory goes, and how long each part of the start took.

        replicas: of which this is the first one that is ready; the others are loading, or are ready as well.
        """
        self.close()
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(justify="left")
        table.add_column(justify="right")
        table.add_column(justify="left", style="dim")
        for line in info.budget:
            table.add_row(line.name, in_bytes(line.num_bytes), line.note)
        if replicas > 1:
            self.say(f"{replicas} replicas, each with its part of threads and memory; of one of them:")
        with contextlib.suppress(OSError):
            self._terminal.print(table)
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in info.timings)
        promise = "bit-exact whatever the load" if info.deterministic else "outside the promise of equal bits"
        self.say(
            f"{info.architecture}, {info.dtype}, {info.threads} threads, up to {info.max_model_len} tokens a request, "
            f"numerics profile {info.profile} ({promise}); {parts}"
        )

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._tasks.clear()
