"""R4: one request fails at a certain point, among others that must not notice: they get the answers they get alone.

Nothing in the product can be told to fail. Six of the eight faults are made of data: a request, or a checkpoint that is
spoiled in one place. Two are doubles at a public seam: a model whose forward pass raises (`faulty_engine`), and a
tokenizer that cannot write one token (`faulty_server`).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from e2e.crowd import body, stream

from orcaserve.builtin import MODEL_DIR
from torture.rows import Outcome, Row, Setup

ROWS = (
    Row(
        "R4",
        "8 injection points × 1 000 (validate, template, tokenise, grammar, sampler row, detokenise, forward, NaN "
        "logits)",
        "no innocent request touched",
    ),
)
SERVER = Path(__file__).with_name("faulty_server.py")
WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
GONE, NAN, FORWARD, WRITTEN = "~", "^", "`", "{"  # characters that neither innocent prompts nor stories have
MISSING = "<missing>"
TEMPLATE_FAULT = "{% for m in messages %}{% if 'Wombat' in m.content %}{{ 1 // 0 }}{% endif %}{% endfor %}"
SHARED = [0, *range(5, 45)]  # two blocks and a half of a guilty prompt, which innocents may find in the cache
INNOCENTS = [body(i, 8 + i % 9) for i in range(20)] + [body(i, 8, prompt=[*SHARED, 50 + i]) for i in range(4)]
AT_ONCE = 5
LEAK = re.compile(r"Traceback|\.py\b|/(usr|home|root|tmp|var)/|0x[0-9a-f]{6}")
IDLE_SECONDS = 30.0


@dataclass(frozen=True)
class Guilt:
    """A request that fails at this point. how: what makes it fail. status: of the answer that says so."""

    point: str
    how: str
    path: str
    body: dict
    status: int


def torture(setup: Setup) -> Iterator[Outcome]:
    [row] = ROWS
    rounds = setup.size("rounds", 3, 1000)
    with tempfile.TemporaryDirectory(prefix="orcaserve-r04-") as folder:
        model = Path(folder) / "model"
        ids = spoiled(model)
        with serving(model, ids) as url:
            trace, num_touched, num_asked = asyncio.run(_ask(setup, url, guilts(ids), rounds))
    points = ", ".join(guilt.point for guilt in guilts(ids))
    figure = (
        f"{num_asked} faults ({rounds} at each of {points}) among {AT_ONCE} innocent requests each: "
        f"{num_touched} of {AT_ONCE * num_asked} innocent answers differ from solo, {len(trace) - num_touched} other "
        "faults"
    )
    yield Outcome(row, figure, not trace, trace=tuple(trace))


def guilts(ids: dict[str, int]) -> list[Guilt]:
    complete, chat = "/v1/completions", "/v1/chat/completions"
    few = {"max_tokens": 8, "temperature": 0}
    said = [{"role": "user", "content": "Hello Wombat"}]
    story = "Once upon a time"
    forced = {"logit_bias": {str(ids[WRITTEN]): 100}}
    return [
        Guilt("validate", "a temperature out of range", complete, {"prompt": story, "temperature": 1e300}, 400),
        Guilt("template", "a template that divides by zero at a word", chat, {"messages": said, **few}, 400),
        Guilt(
            "tokenise", "a tokenizer that lacks a byte and its unknown token", complete, {"prompt": GONE, **few}, 500
        ),
        Guilt("grammar", "a regex that is none", complete, {"prompt": story, "guided_regex": "(a", **few}, 400),
        Guilt(
            "sampler row",
            "a grammar that no token of the vocabulary can follow",
            complete,
            {"prompt": story, "guided_regex": f"{GONE}+", "max_tokens": 8},
            400,
        ),
        Guilt("detokenise", "a tokenizer that raises on one token", complete, {"prompt": story, **few, **forced}, 500),
        Guilt("forward", "a model that raises on one token", complete, {"prompt": [*SHARED, ids[FORWARD]], **few}, 500),
        Guilt("NaN logits", "an embedding of NaN for one token", complete, {"prompt": [*SHARED, ids[NAN]], **few}, 500),
    ]


def spoiled(folder: Path) -> dict[str, int]:
    """A copy of the built-in model with its faults; gives the ids of the characters that they hang on."""
    shutil.copytree(MODEL_DIR, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    ids = {character: vocabulary[character] for character in (NAN, FORWARD, WRITTEN)}
    vocabulary[MISSING[::-1]] = vocabulary.pop(GONE)
    tokenizer["model"]["unk_token"] = MISSING
    path.write_text(json.dumps(tokenizer))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": TEMPLATE_FAULT + config["chat_template"]}))
    data = bytearray((folder / WEIGHTS).read_bytes())
    (size,) = struct.unpack_from("<Q", data)
    entry = json.loads(data[8 : 8 + size])[EMBEDDING]
    assert entry["dtype"] == "BF16"
    width = 2 * entry["shape"][1]
    at = 8 + size + entry["data_offsets"][0] + ids[NAN] * width
    data[at : at + width] = struct.pack("<H", 0x7FC0) * entry["shape"][1]
    (folder / WEIGHTS).write_bytes(data)
    return ids


@contextmanager
def serving(model: Path, ids: dict[str, int]) -> Iterator[str]:
    """The URL of a server over it."""
    command = [sys.executable, str(SERVER), str(model), str(ids[FORWARD]), str(ids[WRITTEN])]
    log = model.parent / "log"
    with log.open("wb") as said:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url, f"the server did not start: {log.read_text()}"
        yield url
        assert server.poll() is None, f"the server has ended: {log.read_text()}"
    finally:
        server.terminate()
        server.communicate()


async def _ask(setup: Setup, url: str, all_guilts: Sequence[Guilt], rounds: int) -> tuple[list[str], int, int]:
    """What went wrong, how many innocents were touched, and how many faults there were."""
    trace: list[str] = []
    num_touched = num_asked = 0
    rng = setup.random("R4")
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        solo = [await stream(client, asked, [0], 0) for asked in INNOCENTS]
        for turn in range(rounds):
            for guilt in all_guilts:
                num_asked += 1
                chosen = rng.sample(range(len(INNOCENTS)), AT_ONCE)
                innocents = asyncio.gather(
                    *(stream(client, INNOCENTS[i], [0], 0) for i in chosen), return_exceptions=True
                )
                wrong = await _accuse(client, guilt, rng)
                answers = await innocents
                touched = [i for i, answer in zip(chosen, answers, strict=True) if answer != solo[i]]
                num_touched += len(touched)
                trace += [f"{guilt.point}, round {turn}: innocent {i} was touched" for i in touched]
                trace += [f"{guilt.point}, round {turn}: {wrong}"] if wrong else []
        end = time.monotonic() + IDLE_SECONDS
        while (left := await _left(client)) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        if left:
            trace.append(f"of the guilty there is left: {left}")
    return trace, num_touched, num_asked


async def _accuse(client: httpx.AsyncClient, guilt: Guilt, rng: random.Random) -> str | None:
    """Sends it at some moment, as a stream or not; what was wrong with its answer."""
    await asyncio.sleep(rng.uniform(0, 0.1))
    is_stream = rng.random() < 0.5
    answer = await client.post(guilt.path, json={**guilt.body, "stream": is_stream})
    text = answer.text
    if answer.status_code == 200 and is_stream:
        said = [line.removeprefix("data: ") for line in text.splitlines() if '"error"' in line]
        text = said[0] if said else text
    elif answer.status_code != guilt.status:
        return f"status {answer.status_code} instead of {guilt.status}: {text[:300]}"
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return f"no typed error: {text[:300]}"
    if not (error["message"] and error["type"]) or LEAK.search(error["message"]):
        return f"an error that says too little or too much: {error}"
    return None


async def _left(client: httpx.AsyncClient) -> str:
    """What the engine still holds of requests, by its gauges; empty if it holds nothing."""
    wanted = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    lines = (await client.get("/metrics")).text.splitlines()
    return ", ".join(line for line in lines if line.startswith(wanted) and float(line.split()[-1]) != 0)
