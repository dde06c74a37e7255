"""`--config FILE.toml`: a command's options from a file; what stands on the command line goes first."""

from __future__ import annotations

import difflib
import tomllib
from typing import Any

import click


def _load(context: click.Context, option: click.Parameter, path: str | None) -> None:
    if path is None:
        return
    try:
        with open(path, "rb") as file:
            given = tomllib.load(file)
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is no TOML: {error}") from None
    names = {_plain(word): one for one in context.command.params for word in (one.name or "", *one.opts)}
    found: dict[str, Any] = {}
    for key, value in given.items():
        one = names.get(_plain(key))
        if one is None or one is option or one.name is None:
            near = difflib.get_close_matches(_plain(key), names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise click.BadParameter(f"{path}: there is no option {key!r}{hint}")
        if isinstance(value, dict) or isinstance(value, list) != bool(one.multiple):
            wanted = "a list" if one.multiple else "one value"
            raise click.BadParameter(f"{path}: {key!r} wants {wanted}")
        found[one.name] = value
    context.default_map = found


def _plain(word: str) -> str:
    return word.lstrip("-").replace("_", "-")


config_option = click.option(
    "--config",
    type=click.Path(dir_okay=False),
    is_eager=True,
    expose_value=False,
    callback=_load,
    metavar="FILE.toml",
    help="Options from a file, by their names; those on the command line go first.",
)
