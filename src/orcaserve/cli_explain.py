"""The command `orcaserve explain`: why the requests of a step log took as long as they did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from orcaserve.cli_simulate import read_logs
from orcaserve.engine.step_log import Log
from orcaserve.sim.explain import because, overview, reasons, tell
from orcaserve.sim.story import Story, stories

_LONGEST = 10  # requests of the summary
_WIDTH = 140


@click.command()
@click.argument("log", metavar="STEP_LOG", type=click.Path(path_type=Path))
@click.argument("request", required=False)
@click.option("--figure", type=click.Path(dir_okay=False, path_type=Path), help="Also draw it: a PNG.")
def explain(log: Path, request: str | None, figure: Path | None) -> None:
    """Say why requests of a STEP_LOG waited, and tell the story of one.

    Record one with orcaserve serve --step-log, or orcaserve simulate --step-log. REQUEST is a number that the log has,
    or the id of a response, or its X-Request-Id. Without it: the commonest reasons, and the longest waits.
    """
    lives = [(life, stories(life)) for life in read_logs(log)]
    if request is None:
        for number, (life, found) in enumerate(lives, 1):
            if len(lives) > 1:
                click.echo(f"engine {number}")
            _summarise(life, found)
        drawn, about = lives[-1], None
    else:
        drawn, about = _tell(lives, request)
    if figure is not None:
        _draw(drawn, figure, log.name, about)


def _tell(lives: Sequence[tuple[Log, list[Story]]], request: str) -> tuple[tuple[Log, list[Story]], Story]:
    """Every story of a request; the life that has the last one, and that."""
    told = [(number, life, story) for number, life in enumerate(lives) for story in life[1] if _is(story, request)]
    if not told:
        ids = [story.id for _, found in lives for story in found]
        there = f"its requests are {min(ids)} to {max(ids)}" if ids else "it has no request"
        raise click.ClickException(f"the step log knows no request {request!r}; {there}")
    for place, (number, (log, _), story) in enumerate(told):
        if place:
            click.echo()
        if len(lives) > 1:
            click.echo(f"engine {number + 1}")
        for line in tell(story, log.header.config):
            click.echo(line)
    return told[-1][1], told[-1][2]


def _is(story: Story, request: str) -> bool:
    if request.isdecimal() and story.id == int(request):
        return True
    return bool(story.name) and (story.name == request or story.name.partition("-")[2] == request)


def _summarise(log: Log, found: Sequence[Story]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else _WIDTH, highlight=False)
    click.echo(overview(log, found))
    table = Table(box=None, padding=(0, 2, 0, 0), title="What was waited for in the queue", title_justify="left")
    for name in ("seconds", "requests", "longest", ""):
        table.add_column(name, justify="left" if not name else "right")
    for line in reasons(found):
        table.add_row(
            f"{line.seconds:.3f}", str(line.requests), f"{line.longest:.3f}", because(line.why, log.header.config)
        )
    console.print()
    console.print(table)
    longest = sorted((story for story in found if story.waited > 0), key=lambda story: -story.waited)[:_LONGEST]
    table = Table(box=None, padding=(0, 2, 0, 0), title="The longest waits", title_justify="left")
    for name in ("request", "arrived", "waited", "preempted", "mostly", "name"):
        table.add_column(name, justify="left" if name in ("mostly", "name") else "right")
    for story in longest:
        table.add_row(
            str(story.id),
            f"{story.arrived:.3f}",
            f"{story.waited:.3f}",
            str(len(story.losses)),
            because(reasons([story])[0].why, log.header.config),
            story.name,
        )
    console.print()
    console.print(table)


def _draw(life: tuple[Log, list[Story]], path: Path, name: str, about: Story | None) -> None:
    try:
        from orcaserve.bench.draw_log import draw
    except ImportError:
        raise click.ClickException("--figure needs matplotlib: pip install 'orcaserve[plots]'") from None
    log, found = life
    if not found:
        raise click.ClickException("there is no request to draw")
    summary = overview(log, found).replace("; ", "\n", 1)
    title = f"{name}: {summary}" if about is None else f"{name}: request {about.id}, and who was there"
    try:
        draw(log, found, path, title, about)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from None
