"""What the documentation site has from the code, and that every option has something to say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import click
import pytest

from orcaserve.cli import main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site = hook()
COMMANDS = dict(site.commands(main, "orcaserve"))


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_says_what_it_does(path: str) -> None:
    command = COMMANDS[path]
    assert command.help, f"{path} has no words"
    silent = [one.opts for one in command.params if isinstance(one, click.Option) and not one.hidden and not one.help]
    assert not silent, f"{path}: no help for {silent}"


def test_the_page_has_every_option_and_none_that_is_hidden() -> None:
    page = site.options_page(main, "orcaserve")
    sections = dict(section.split("\n", 1) for section in page.split("\n## ")[1:])
    assert {"orcaserve serve", "orcaserve bench compare", "orcaserve simulate plan"} <= set(sections)
    for path, command in COMMANDS.items():
        if isinstance(command, click.Group) and not command.invoke_without_command:
            continue
        rows = re.findall(r"^\| `(--[a-z-]+)`", sections[path], re.MULTILINE)
        assert rows == [one.opts[0] for one in command.params if isinstance(one, click.Option) and not one.hidden]
    assert "--end-with-parent" not in page
    row = next(line for line in page.splitlines() if line.startswith("| `--max-batch-size`"))
    assert row.endswith("| `64` |")
    for line in page.splitlines():
        if line.startswith("| `"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 4, line


def test_what_would_be_loaded_from_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text(
        '<link rel="canonical" href="https://a/"><a href="https://b/">b</a><script src="assets/x.js"></script>'
    )
    assert site.loads(tmp_path) == []
    (tmp_path / "bad.html").write_text(
        '<script src="//c/x.js"></script><link rel="stylesheet" href="https://d/x.css"><img src="http://e/x.png">'
        '<p style="background: url(https://f/x.png)">'
    )
    (tmp_path / "bad.css").write_text('@import "https://g/x.css"; a { background: url(assets/x.png) }')
    found = [line.partition(": ")[2] for line in site.loads(tmp_path)]
    assert found == ["https://g/x.css", "//c/x.js", "https://d/x.css", "http://e/x.png", "https://f/x.png"]


def test_the_pages_that_are_named_exist_and_every_decision_is_listed() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r"- (\S+\.md)$", nav, re.MULTILINE))
    assert all((DOCS / name).exists() for name in named - {site.OPTIONS}), named
    everything = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert site.unplaced(DOCS, everything[1:]) == everything[:1]
    page = site.decisions_page(DOCS / "decisions")
    assert set(re.findall(r"\]\((.+)\)$", page, re.MULTILINE)) == {p.name for p in (DOCS / "decisions").glob("*.md")}


def test_relative_links_lead_somewhere() -> None:
    generated = {DOCS / site.OPTIONS, DOCS / site.DECISIONS}
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:")):
                to = (path.parent / target).resolve()
                assert to.exists() or to in generated, f"{path.relative_to(ROOT)}: {target}"


def options_of(path: str) -> set[str]:
    return {name for one in COMMANDS[path].params for name in (*one.opts, *one.secondary_opts)} | {"--help"}


def test_the_options_that_pages_name_exist() -> None:
    count = 0
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for line in re.findall(r"^(?:\$ )?(orcaserve .*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            line = line.partition(" #")[0]
            path = max((path for path in COMMANDS if f"{line} ".startswith(f"{path} ")), key=len)
            named = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", line))
            unknown = named - options_of(path)
            count += len(named)
            assert not unknown, f"{page.relative_to(ROOT)}: {line}: {unknown}"
    assert count > 50


def test_what_others_options_are_called_here_exists() -> None:
    rows = re.findall(r"^\| (.+?) \| (.*?) \|", (DOCS / "coming-from.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 50
    for theirs, ours in rows:
        named = theirs if ours == "the same" else ours
        if not ours.startswith("`orcaserve"):
            unknown = set(re.findall(r"--[a-z][a-z-]*", named)) - options_of("orcaserve serve")
            assert not unknown, f"{theirs}: {unknown}"
