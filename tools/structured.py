"""Measures structured output on a real server: are all answers valid, and what does a token cost under a schema?

    python tools/structured.py --schemas 200 --pairs 15 [--model DIR]

Schemas of rising depth are drawn by seed, and each must be answered by JSON that follows it. Then an engine alone, in
this process, generates the same number of tokens under schemas and freely, in turn; ratios of seconds per token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from orcaserve.core.config import EngineOptions
from orcaserve.core.policy import DEFAULT
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Command, Step, Submit
from orcaserve.executors.build import build
from orcaserve.serve.find_model import find_model
from orcaserve.serve.protocol import CompletionRequest
from orcaserve.serve.served_model import ServedModel

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "api"))
from schemas import schema  # the schemas of the tests

PROMPT = "The data of the record are: "
MOST_TOKENS = 800
KV_MEMORY = 1 << 30


def answer(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": MOST_TOKENS} | fields)
    response.raise_for_status()
    return response.json()


def validity(client: httpx.Client, count: int) -> int:
    """How many of so many schemas were followed, a quarter of them at each depth from 1 to 4."""

    def follows(seed: int) -> bool:
        asked = schema(seed, 1 + 4 * seed // count)
        got = answer(client, seed=seed, guided_json=asked)
        [choice] = got["choices"]
        try:
            jsonschema.validate(json.loads(choice["text"]), asked)
        except (ValueError, jsonschema.ValidationError):
            print(f"seed {seed}: {choice['finish_reason']}: {choice['text'][:200]}", file=sys.stderr)
            return False
        return True

    with ThreadPoolExecutor(8) as several:
        return sum(several.map(follows, range(count)))


class _Desk:
    """Where an engine alone finds its commands, and leaves its results."""

    def __init__(self, commands: list[Command]) -> None:
        self._commands = commands
        self.steps: list[Step] = []

    def take(self, block: bool) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    def put(self, step: Step) -> None:
        self.steps.append(step)


class Cost:
    """What a token costs an engine alone, in this process: scheduler, model and draws. Owner of the engine."""

    def __init__(self, folder: Path, most_tokens: int) -> None:
        self._most_tokens = most_tokens
        self._executor, self._info = build(EngineOptions(model=str(folder), kv_memory=KV_MEMORY))
        served = ServedModel(folder.name, folder)
        self._prompt = tuple(served.tokenizer.encode(PROMPT))
        self._ends = served.end_token_ids
        self._structures = served.structures

    def ratios(self, pairs: int, at_once: int) -> tuple[list[float], list[float]]:
        """Seconds of so many responses under schemas over those of as many tokens without, pair by pair.

        The first time that the engine meets the schemas, and when it knows them.
        """
        first, again = [], []
        for pair in range(pairs):
            begin = 1000 * at_once + pair * at_once  # no schema twice
            seeds = range(begin, begin + at_once)
            under = [SamplingParams(grammar=self._grammar(seed)) for seed in seeds]
            lengths, fresh = self._run(under, [self._most_tokens] * at_once)
            ways = {"held": under, "free": [SamplingParams(ignore_eos=True)] * at_once}
            order = ["held", "free"] if pair % 2 else ["free", "held"]
            seconds = {way: self._run(ways[way], lengths)[1] for way in order}
            first.append(fresh / seconds["free"])
            again.append(seconds["held"] / seconds["free"])
        return first, again

    def _grammar(self, seed: int) -> str | None:
        asked = CompletionRequest(prompt=PROMPT, guided_json=schema(seed, 3))
        return asyncio.run(self._structures.grammar(asked, self._ends, self._info.vocab_size))

    def _run(self, params: list[SamplingParams], lengths: list[int]) -> tuple[list[int], float]:
        """How long each response is, in tokens, and how long all took."""
        self._executor.forget_all()
        config = SchedulerConfig(
            policy=DEFAULT,
            num_blocks=self._info.num_blocks,
            block_size=self._info.block_size,
            max_batch_size=len(params),
            max_batch_tokens=512,
        )
        scheduler = Scheduler(config)
        requests = [
            NewRequest(
                id=id, token_ids=self._prompt, num_prompt=len(self._prompt), max_tokens=length, params=one, seed=id,
                end_token_ids=() if one.ignore_eos else self._ends,
            ) for id, (one, length) in enumerate(zip(params, lengths, strict=True))
        ]  # fmt: skip
        desk = _Desk([Submit(request) for request in requests])
        loop = EngineLoop(scheduler, self._executor, desk, desk, time.perf_counter)
        began = time.perf_counter()
        loop.step()
        while scheduler.requests:
            loop.step()
        seconds = time.perf_counter() - began
        counts = [0] * len(params)
        for output in (output for step in desk.steps for output in step.outputs):
            counts[output.id] += len(output.token_ids)
        return counts, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="orcaserve-tiny")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=MOST_TOKENS, help="most of a response of the pairs")
    parser.add_argument("--batch", type=int, action="append", help="responses at a time; 1, 4 and 16 if none is given")
    parser.add_argument("--port", type=int, default=8765)
    given = parser.parse_args()
    if given.schemas:
        say_validity(given.model, given.schemas, given.port)
    if given.pairs:
        say_cost(find_model(given.model)[1], given.pairs, given.tokens, given.batch or (1, 4, 16))


def say_validity(model: str, schemas: int, port: int) -> None:
    command = [sys.executable, "-m", "orcaserve", "serve", model, "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:
            while True:
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
            print(f"{validity(client, schemas)} of {schemas} schemas were followed")
    finally:
        server.terminate()
        server.wait()


def say_cost(folder: Path, pairs: int, most_tokens: int, batches: Sequence[int]) -> None:
    cost = Cost(folder, most_tokens)
    for at_once in batches:
        for name, found in zip(("new", "known"), cost.ratios(pairs, at_once), strict=True):
            print(
                f"{at_once} at a time, {name} schemas: a token takes {statistics.median(found):.3f} times as long as "
                f"without ({min(found):.3f} … {max(found):.3f} in {pairs} pairs)"
            )


if __name__ == "__main__":
    main()
