"""`tools/long_prompts.py`: what failed ends it, and prompts that nobody read have waited."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Any

import pytest
from sse_server import DONE, FakeServer, Script, steady

from orcaserve.bench.client import Record, Server
from orcaserve.bench.workloads import Item

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("long_prompts")


def test_a_request_that_failed_ends_the_program(tool: Any) -> None:
    said = pytest.raises(SystemExit, match=r"^any: 2 of 2 requests failed; the first: HTTP 429: the queue is full")
    with FakeServer(lambda body: (429, {"error": {"message": "the queue is full"}})) as server, said:
        asyncio.run(tool.put(Server("any", server.url, "m"), [Item(0.0, (100,), 2)] * 2, 60))


def test_a_stream_that_is_cut_off_at_the_end_has_not_failed(tool: Any) -> None:
    def answer(body: dict[str, Any]) -> Script:
        return steady()(body) if body["max_tokens"] == 1 else [(3600.0, DONE)]

    items = [Item(0.0, (100,), 1), Item(0.0, (100,), 2)]
    with FakeServer(answer) as server:
        first, second = asyncio.run(tool.put(Server("any", server.url, "m"), items, 2))
    assert (first.error, second.error_kind) == (None, "interrupted")


def test_a_prompt_that_was_not_read_has_waited_until_the_end(tool: Any) -> None:
    stream = Record(due=0, sent=0, token_times=(1.0, 2.0), max_tokens=9, prompt_tokens=1)
    read = Record(due=1, sent=1, token_times=(2.0,), max_tokens=1, prompt_tokens=5)
    unread = Record(due=2, sent=2, max_tokens=1, prompt_tokens=5)
    late = Record(due=3, sent=3, token_times=(11.0,), max_tokens=1, prompt_tokens=5)
    figures = tool.show("any", [stream, read, unread, late], 1, (0.0, 10.0))
    assert (figures["ttft"], figures["late"]) == (7.0, 8.0)
