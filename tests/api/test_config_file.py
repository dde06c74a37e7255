"""Options from a file, and the files in deploy/ that use options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from orcaserve.cli import main, serve
from orcaserve.cli_config import config_option
from orcaserve.cli_size import Size

DEPLOY = Path(__file__).parent.parent.parent / "deploy"


@click.command()
@config_option
@click.argument("model", default="tiny")
@click.option("--max-batch-size", "batch_size", type=click.IntRange(1), default=64)
@click.option("--kv-memory", type=Size(), default="auto")
@click.option("--api-key", multiple=True)
@click.option("--check", is_flag=True)
def command(**options: Any) -> None:
    for name, value in options.items():
        click.echo(f"{name}={value!r}")


def said(tmp_path: Path, text: str, *arguments: str) -> str:
    path = tmp_path / "it.toml"
    path.write_text(text)
    return CliRunner().invoke(command, ["--config", str(path), *arguments]).output


def test_options_of_a_file_stand_in_for_those_not_given(tmp_path: Path) -> None:
    text = 'max-batch-size = 3\nkv_memory = "1KiB"\napi-key = ["a", "b"]\ncheck = true\nmodel = "mine"\n'
    assert said(tmp_path, text).splitlines() == [
        "model='mine'", "batch_size=3", "kv_memory=1024", "api_key=('a', 'b')", "check=True"
    ]  # fmt: skip
    assert "batch_size=5" in said(tmp_path, text, "--max-batch-size", "5")
    assert "model='yours'" in said(tmp_path, text, "yours")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-bach-size = 3", "there is no option 'max-bach-size'; did you mean max-batch-size?"),
        ("max-batch-size = 0", "0 is not in the range"),
        ("max-batch-size = [1]", "'max-batch-size' wants one value"),
        ('api-key = "a"', "'api-key' wants a list"),
        ("[check]\na = 1", "'check' wants one value"),
        ("config = 'x'", "there is no option 'config'"),
        ("nonsense", "is no TOML"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, message: str) -> None:
    assert message in " ".join(said(tmp_path, text).split())


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["serve", "--config", str(tmp_path / "none.toml")])
    assert result.exit_code == 2 and "No such file" in result.output


@pytest.mark.parametrize(
    ("name", "start"),
    [("orcaserve.service", "ExecStart=.*"), ("Containerfile", "orcaserve /model .*"), ("kubernetes.yaml", "args: .*")],
)
def test_the_options_that_deployments_use_exist(name: str, start: str) -> None:
    known = {word for one in serve.params for word in one.opts}
    [line] = re.findall(start, (DEPLOY / name).read_text())
    used = set(re.findall(r"--[a-z-]+", line))
    assert used and used <= known, used - known
