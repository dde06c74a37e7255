"""The command `orcaserve`, as a newcomer types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from serving import Serving

from orcaserve.cli_size import Size


def orcaserve(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orcaserve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def test_generate_writes_the_text_to_stdout() -> None:
    done = orcaserve("generate", "--chat", "Hello!", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 2
    again = orcaserve("generate", "--chat", "Hello!", "--temperature", "0", "--dtype", "bfloat16")
    assert again.stdout == done.stdout


def test_chat_talks_to_a_running_server(served: Serving) -> None:
    talk = orcaserve("chat", "--url", served.url, "--temperature", "0", input="Hello!\nAnd then?\n\n")
    assert talk.returncode == 0, talk.stderr
    messages = [{"role": "user", "content": "Hello!"}]
    for question in ("And then?", None):
        body = {"messages": messages, "temperature": 0}
        answer = served.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert answer.strip() in talk.stdout
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
    assert any(line.startswith("KV cache") for line in served.lines), "the memory table is shown at the start"


def test_a_folder_to_swap_to_needs_a_size(tmp_path: Path) -> None:
    done = orcaserve("generate", "Hello", "--swap-dir", str(tmp_path))
    assert done.returncode == 1
    assert "--swap-space needs a size" in done.stderr


def test_chat_without_a_server_says_so() -> None:
    done = orcaserve("chat", "--url", "http://127.0.0.1:9", input="Hello\n")
    assert done.returncode == 1
    assert "is a server running there?" in done.stderr


def test_models_lists_the_built_in_one_and_the_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--tiny--cached" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    done = orcaserve("models", env={**os.environ, "HF_HUB_CACHE": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("orcaserve-tiny")
    assert second.startswith("tiny/cached") and "cannot be served" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder"], "neither a model folder nor a name"),
        (["--host", "0.0.0.0"], "API key"),
        (["--policy", "luck"], "policy"),
        (["--kv-memory", "lots"], "not a size"),
        (["--kv-memory", "1KiB"], "KV"),
        (["--max-model-len", "9999999"], "context|positions|tokens"),
        (["--port", "70000"], "port"),
    ],
)
def test_what_cannot_be_served_ends_the_start_with_a_clear_line(arguments: list[str], message: str) -> None:
    done = orcaserve("serve", *arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert click.unstyle(last)
    assert re.search(message, last), done.stderr


def test_an_occupied_port_is_one_line(served: Serving) -> None:
    done = orcaserve("serve", "--port", served.url.rpartition(":")[2])
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "port" in done.stderr


@pytest.mark.parametrize(
    ("text", "count"),
    [("24MiB", 24 << 20), ("4GiB", 4 << 30), ("4gib", 4 << 30), ("500MB", 500 * 10**6), ("1.5 GiB", 3 << 29), ("7", 7)],
)
def test_sizes(text: str, count: int) -> None:
    assert Size().convert(text, None, None) == count
    assert Size().convert("auto", None, None) is None
