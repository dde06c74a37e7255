"""The option `--max-itl`: milliseconds on the command line, seconds inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_HELP = "Most milliseconds between two tokens of a running stream: prompts are read in chunks short enough for that."


def max_itl_option(otherwise: str) -> Callable[[Any], Any]:
    """otherwise: what happens without it, in words."""
    return click.option(
        "--max-itl",
        type=click.FloatRange(0),
        callback=lambda context, param, value: None if value is None else value / 1000,
        metavar="MS",
        help=f"{_HELP} {otherwise}",
    )
