"""Many clients, a third of whom hang up at a random point: the others get what they get alone, and nothing is left."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import psutil
from api_world import Server


async def ask(port: int, body: dict[str, Any], patience: float | None) -> bytes | None:
    """A response's bytes over a socket of its own, or None from a client that hangs up after so many seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    fields = f"Host: localhost\r\nConnection: close\r\nContent-Length: {len(data)}"
    head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n"
    try:
        writer.write(head.encode() + data)
        return await asyncio.wait_for(reader.read(-1), patience)
    except TimeoutError:
        return None
    finally:
        writer.transport.abort()


def text_of(response: bytes) -> str:
    head, _, body = response.partition(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], response
    if b"text/event-stream" not in head:
        return str(json.loads(body)["choices"][0]["text"])
    lines = [line for line in body.split(b"\n") if line.startswith(b"data: {")]
    assert b"data: [DONE]" in body
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)


def test_hang_ups_harm_nobody(model_dir: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    draw = random.Random(seed)
    bodies = [
        {
            "prompt": [draw.randrange(2, 400) for _ in range(draw.randint(1, 60))],
            "max_tokens": draw.randint(1, 40),
            "seed": index,
            "stream": draw.random() < 0.5,
            "ignore_eos": True,
        }
        for index in range(100)
    ]
    patience = [draw.random() / 2 if draw.random() < 0.33 else None for _ in bodies]

    async def crowd(port: int) -> list[bytes | None]:
        return list(await asyncio.gather(*(ask(port, *pair) for pair in zip(bodies, patience, strict=True))))

    async def alone(port: int, index: int) -> bytes | None:
        return await ask(port, {**bodies[index], "stream": False}, None)

    # Room for a handful of requests at a time: the rest waits, or is preempted.
    with Server(model_dir, "--blocks", "32", "--step-seconds", "0.002").ready() as server, server.client() as client:
        port = int(server.url.rpartition(":")[2])
        process = psutil.Process(server.process.pid)
        before = process.num_fds()
        answers = asyncio.run(crowd(port))
        assert sum(answer is None for answer in answers) > 5

        end = time.monotonic() + 10
        while True:
            lines = client.get("/metrics").text.splitlines()
            left = {line.split("{")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            if all(left[f"vllm:{name}"] == 0 for name in names):
                break
            assert time.monotonic() < end, left
        assert process.num_fds() <= before + 1  # the client that asks for the metrics
        for index in draw.sample([i for i, answer in enumerate(answers) if answer is not None], 15):
            again = asyncio.run(alone(port, index))
            assert again is not None
            assert text_of(answers[index] or b"") == text_of(again)
