"""R14: the worst legal request of each kind, many times at once: the memory of all processes stays in the budget."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
from e2e.serving import Serving

from torture.footprint import family, memory
from torture.rows import Outcome, Row, Setup

ROWS = (Row("R14", "the worst legal request of each kind × 32 at once", "peak memory ≤ the budget printed + 5 %"),)
TOLERANCE = 1.05
CONTEXT, VOCAB = 1024, 3072  # of the built-in model
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SAMPLE_SECONDS = 0.1
_TOTAL = re.compile(r"^total\s+([\d.]+) (\w+)")

Body = tuple[str, dict[str, Any]]


def torture(setup: Setup) -> Iterator[Outcome]:
    with Serving("--threads", "1", "--kv-memory", "128MiB", "--log-level", "warning") as server:
        budget = printed_budget(server.lines)
        before = memory(family(server.process.pid))
        peaks, answers = {}, {}
        for name, body in kinds(setup).items():
            with Peak(server.process.pid) as peak:
                answers[name] = asyncio.run(_ask(server.url, body, setup.size("count", 4, 32)))
            peaks[name] = peak.bytes
    yield _judge(setup, budget, before, peaks, answers)


def printed_budget(lines: list[str]) -> int:
    """Bytes, of the line that the server prints at its start."""
    found = next(match for line in lines if (match := _TOTAL.match(line)))
    return int(float(found[1]) * UNITS[found[2]])


class Peak:
    """The most memory that a family of processes takes while this is open, as often as it can be looked at."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self.bytes = 0

    def _look(self) -> None:
        while not self._is_over.is_set():
            self.bytes = max(self.bytes, memory(family(self._pid)))
            self._is_over.wait(SAMPLE_SECONDS)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()


def kinds(setup: Setup) -> dict[str, Callable[[int], Body]]:
    """By name, the path and the body of the i-th request. They begin differently, so that no prefix is shared.

    Where a kind generates much, `tokens` says how many for each choice, since a CPU takes hours for all of them.
    """
    draw = setup.random("R14")
    tokens = setup.size("tokens", 4, 100)
    before_choices = setup.size("prompt", 32, CONTEXT - 100)
    body_bytes = setup.size("body", 4, 31) << 20

    def ids(count: int) -> list[int]:
        return draw.choices(range(16, VOCAB), k=count)

    def completion(**fields: Any) -> Body:
        return "/v1/completions", {"temperature": 1, "ignore_eos": True, **fields}

    enum = [f"{number:08d}-{'x' * 40}" for number in range(2000)]
    schema = {"type": "object", "properties": {"a": {"enum": enum}}, "required": ["a"], "additionalProperties": False}
    return {
        "longest prompt": lambda i: completion(prompt=ids(CONTEXT - 1), max_tokens=1),
        "most choices": lambda i: completion(prompt=ids(before_choices), max_tokens=tokens, n=128),
        "logprobs": lambda i: completion(
            prompt=ids(9), max_tokens=tokens, n=setup.size("n", 16, 128), logprobs=20, return_token_ids=True
        ),
        "prompt logprobs": lambda i: completion(
            prompt=ids(CONTEXT - 1), max_tokens=1, logprobs=20, prompt_logprobs=20, echo=True
        ),
        "schema": lambda i: completion(
            prompt=ids(16),
            max_tokens=tokens,
            ignore_eos=False,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": f"s{i}", "schema": {**schema, "title": f"{i}"}},
            },
        ),
        "stops and biases": lambda i: completion(
            prompt=ids(16),
            max_tokens=tokens,
            stop=[f"{number}{'y' * 1000}" for number in range(16)],
            stop_token_ids=list(range(2000, 2256)),
            logit_bias={str(id): -1.5 for id in range(100, 1124)},
        ),
        "embeddings": lambda i: (
            "/v1/embeddings",
            {"input": [ids(CONTEXT - 1) for _ in range(setup.size("inputs", 1, 64))]},
        ),
        "biggest body": lambda i: completion(prompt=ids(16), max_tokens=1, user="z" * body_bytes),
    }


async def _ask(url: str, body: Callable[[int], Body], count: int) -> Counter[str]:
    """How many got which answer, all asked at once."""
    made = [(path, json.dumps(fields).encode()) for path, fields in map(body, range(count))]
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limits) as client:

        async def one(path: str, data: bytes) -> str:
            response = await client.post(path, content=data)
            if response.status_code in (200, 429):
                return str(response.status_code)
            return f"{response.status_code} {response.text[:200]}"

        return Counter(await asyncio.gather(*(one(*pair) for pair in made)))


def _judge(setup: Setup, budget: int, before: int, peaks: dict[str, int], answers: dict[str, Counter[str]]) -> Outcome:
    strange = [f"{name}: {answer}" for name, got in answers.items() for answer in got if answer not in ("200", "429")]
    over = [name for name, peak in peaks.items() if peak > budget * TOLERANCE]
    worst = max(peaks, key=peaks.__getitem__)
    lines = [
        f"{name}: {peak >> 20} MiB, {', '.join(f'{count} × {answer}' for answer, count in answers[name].items())}"
        for name, peak in peaks.items()
    ]
    (setup.folder / "r14.txt").write_text("\n".join(lines) + "\n")
    figure = (
        f"{setup.size('count', 4, 32)} at once of {len(peaks)} kinds: peak {peaks[worst] >> 20} MiB ({worst}) of a "
        f"budget of {budget >> 20} MiB, {before >> 20} MiB before"
    )
    cause = f"over it: {', '.join(over)}" if over else ""
    return Outcome(
        ROWS[0], figure, not over and not strange, cause, trace=(*strange, *lines) if strange or over else ()
    )
