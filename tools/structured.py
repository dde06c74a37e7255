"""Measures structured output on a real server: are all answers valid, and what does a token cost under a schema?

    python tools/structured.py --schemas 200 --pairs 10 [--model DIR]

Schemas of rising depth are drawn by seed, and each must be answered by JSON that follows it. Then, in turn, the same
number of tokens is generated under a schema and freely, alone and eight at a time; ratios of seconds per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "api"))
from schemas import schema  # the schemas of the tests

PROMPT = "The data of the record are: "


def answer(client: httpx.Client, **fields: Any) -> tuple[dict[str, Any], float]:
    began = time.perf_counter()
    response = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 800} | fields)
    response.raise_for_status()
    return response.json(), time.perf_counter() - began


def validity(client: httpx.Client, count: int) -> int:
    """How many of so many schemas were followed, a quarter of them at each depth from 1 to 4."""

    def follows(seed: int) -> bool:
        asked = schema(seed, 1 + 4 * seed // count)
        got, _ = answer(client, seed=seed, guided_json=asked)
        [choice] = got["choices"]
        try:
            jsonschema.validate(json.loads(choice["text"]), asked)
        except ValueError:
            print(f"seed {seed}: {choice['finish_reason']}: {choice['text'][:200]}", file=sys.stderr)
            return False
        return True

    with ThreadPoolExecutor(8) as several:
        return sum(several.map(follows, range(count)))


def ratio(client: httpx.Client, pairs: int, at_once: int) -> list[float]:
    """Seconds per token under a schema over those without, pair by pair."""
    found = []
    for pair in range(pairs):
        seeds = range(pair * at_once, (pair + 1) * at_once)
        with ThreadPoolExecutor(at_once) as several:
            held = list(several.map(lambda seed: answer(client, seed=seed, guided_json=schema(seed, 3)), seeds))
            lengths = [got["usage"]["completion_tokens"] for got, _ in held]
            free = list(
                several.map(
                    lambda pair: answer(client, seed=pair[0], max_tokens=pair[1], ignore_eos=True),
                    zip(seeds, lengths, strict=True),
                )
            )
        found.append(sum(seconds for _, seconds in held) / sum(seconds for _, seconds in free))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="orcaserve-tiny")
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--port", type=int, default=8765)
    given = parser.parse_args()
    command = [sys.executable, "-m", "orcaserve", "serve", given.model, "--port", str(given.port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{given.port}", timeout=600) as client:
            while True:
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
            answer(client, guided_json=schema(0, 1))  # the vocabulary is read once
            if given.schemas:
                print(f"{validity(client, given.schemas)} of {given.schemas} schemas were followed")
            for at_once in (1, 8):
                found = sorted(ratio(client, given.pairs, at_once))
                print(
                    f"{at_once} at a time: a token takes {statistics.median(found):.3f} times as long as without "
                    f"({found[0]:.3f} … {found[-1]:.3f} in {len(found)} pairs)"
                )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
