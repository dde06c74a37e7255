"""The documentation site's hook (mkdocs.yml): what it has from the code, and that it needs nothing from elsewhere.

The page of options is made of the command line's own parser, so it cannot go stale; the list of decisions of their
files. When the site is built every page is searched for what a browser would load from another host, which is an error.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click

OPTIONS = "options.md"
DECISIONS = "decisions/index.md"
_ATTRIBUTES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
_LINKS = ("canonical", "next", "prev", "alternate")  # a <link> that nobody loads
_NUMBERS = {"INTEGER": "N", "INTEGER RANGE": "N", "FLOAT": "X", "FLOAT RANGE": "X"}
_IN_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""")


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, with what one types to get there."""
    yield path, command
    if isinstance(command, click.Group):
        for name in command.commands:
            if not command.commands[name].hidden:
                yield from commands(command.commands[name], f"{path} {name}")


def options_page(main: click.Command, name: str) -> str:
    """Every option of every command, as Markdown."""
    lines = [
        "# Every option",
        "",
        "This page is made of the command line's own parser when the site is built. `--help` says the same in a",
        "terminal. A file of `--config` has the same names, without the dashes; what stands on the command line goes",
        "first. No option is an environment variable, and none of `serve` needs to be set.",
    ]
    for path, command in commands(main, name):
        options = [one for one in command.params if isinstance(one, click.Option) and not one.hidden]
        arguments = [one for one in command.params if isinstance(one, click.Argument)]
        if isinstance(command, click.Group) and not command.invoke_without_command:
            continue
        context = click.Context(command, info_name=path)
        words = [path, *(one.make_metavar(context) for one in arguments), *(["[OPTIONS]"] if options else [])]
        lines += ["", f"## {path}", "", *_prose(command.help or ""), "", "```", " ".join(words), "```"]
        if options:
            lines += ["", "| option | what it does | default |", "|---|---|---|"]
            lines += [
                f"| {_names(one, context)} | {_cell(one.help or '')} | {_default(one, context)} |" for one in options
            ]
    return "\n".join(lines) + "\n"


def _prose(text: str) -> list[str]:
    """A command's own words: Click's mark of a paragraph that keeps its lines makes a block of code."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            lines += ["```", *paragraph.splitlines()[1:], "```", ""]
        else:
            lines += [*(line.replace("<", "&lt;") for line in paragraph.splitlines()), ""]
    return lines[:-1]


def _names(option: click.Option, context: click.Context) -> str:
    names = [f"`{name}`" for name in (*option.opts, *option.secondary_opts)]
    if option.is_flag:
        return ", ".join(names)
    choices = option.type.choices if isinstance(option.type, click.Choice) else ()
    metavar = " \\| ".join(map(str, choices)) if choices else _NUMBERS.get(option.make_metavar(context))
    metavar = metavar or option.make_metavar(context)
    return f"{', '.join(names)} <span class='metavar'>{_cell(metavar)}</span>"


def _default(option: click.Option, context: click.Context) -> str:
    if option.required:
        return "required"
    value = option.get_default(context, call=False)
    if option.is_flag or value is None or value == () or "UNSET" in repr(value):
        return ""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return f"`{value}`"


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", "\\|", text.replace("<", "&lt;").replace("\n", " "))


def decisions_page(folder: Path) -> str:
    """The decisions by their titles, each with its first sentence."""
    lines = ["# Decisions", "", "Why it is as it is: what was tried, what was measured, and what was left.", ""]
    for path in decisions(folder):
        text = path.read_text(encoding="utf-8")
        title = text.splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}]({path.name})")
    return "\n".join(lines) + "\n"


def decisions(folder: Path) -> list[Path]:
    """Their files, by title."""
    return sorted(folder.glob("*.md"), key=lambda path: path.read_text(encoding="utf-8").splitlines()[0].lower())


def unplaced(docs: Path, named: Sequence[str]) -> list[str]:
    """The pages on disk that are not among those named."""
    return sorted({path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} - set(named))


class _Loads(HTMLParser):
    """Finds what a page would load from another host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        target = given.get(_ATTRIBUTES.get(tag, ""), "")
        if tag == "link" and given.get("rel", "") in _LINKS:
            target = ""
        if target.startswith(("http:", "https:", "//")):
            self.found.append(target)
        self.found += _IN_STYLE.findall(given.get("style", ""))


def loads(site: Path) -> list[str]:
    """PAGE: URL of everything that pages, style sheets and scripts of the site would get from elsewhere."""
    found = []
    for path in sorted(site.rglob("*")):
        name = path.relative_to(site)
        if path.suffix == ".html":
            parser = _Loads()
            parser.feed(path.read_text(encoding="utf-8"))
            found += [f"{name}: {url}" for url in parser.found]
        elif path.suffix == ".css":
            found += [f"{name}: {url}" for url in _IN_STYLE.findall(path.read_text(encoding="utf-8"))]
    return found


# -- what mkdocs calls -------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """The decisions, and pages that have no place yet, are in the navigation without being named there."""
    docs = Path(config["docs_dir"])
    for entry in config["nav"]:
        if "Decisions" in entry:
            entry["Decisions"] = [DECISIONS, *(f"decisions/{path.name}" for path in decisions(docs / "decisions"))]
    if left := unplaced(docs, re.findall(r"[\w./-]+\.md", str(config["nav"]))):
        config["nav"].append({"More": left})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    from orcaserve.cli import main

    folder = Path(config["docs_dir"]) / "decisions"
    files.append(File.generated(config, OPTIONS, content=options_page(main, "orcaserve")))
    files.append(File.generated(config, DECISIONS, content=decisions_page(folder)))
    return files


def on_post_build(config: Any) -> None:
    from mkdocs.exceptions import PluginError

    if found := loads(Path(config["site_dir"])):
        raise PluginError("the site would load from elsewhere:\n" + "\n".join(found[:20]))
