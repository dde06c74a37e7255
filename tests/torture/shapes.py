"""Requests of random shape. Each is drawn from the seed and its own number, so any of them can be asked again alone."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

from torture.asking import Ask, Fate
from torture.rows import Setup

# What some servers know and others refuse. "ours": the fields that only this project has.
# "greedy n": several choices at temperature 0, which are all the same.
COMMON = (
    *("token ids", "ignore_eos", "chat", "seed", "n", "greedy n", "top_k", "penalties", "stop"),
    *("logprobs", "top_logprobs"),
)
OURS = (*COMMON, "ours")
TWIN = 5  # every fifth request is the one before it once more: streamed, if that was not
MOST_TOKENS = 90  # to generate
_TEXTS = ["Once upon a time", "The fox", "In the morning", "Tell me about the sea.", "A small boat", "What is a whale?"]
_STOPS = [".", " the", "a b", "\n", " and", "e", "ing"]


def draw(setup: Setup, run: str, number: int, features: Collection[str], model: str | None = None) -> Ask:
    """The request of this number. run: what the numbers count in."""
    shape = number - (number % TWIN == TWIN - 1)
    body = _body(setup.random(run, "shape", shape), setup.random(run, "stems"), features)
    if model is not None:
        body["model"] = model
    kind = body.pop("kind")
    chance = setup.random(run, "client", number)
    body["stream"] = (setup.random(run, "stream", shape).random() < 0.6) == (shape == number)
    if body["stream"] and chance.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    headers = {}
    if "ours" in features:
        headers["x-request-id"] = f"{run}-{number}".replace(" ", "-")
        if chance.random() < 0.06:
            if chance.random() < 0.5:
                body["timeout"] = chance.uniform(0.05, 3)
            else:
                headers["x-slo-ttft-ms"] = str(chance.randint(20, 2000))
    luck = chance.random()  # a little above the shares that are wanted: some end before their clients act
    fate: Fate = "leaves" if luck < 0.34 else "cancelled" if luck < 0.46 and "ours" in features else "stays"
    patience = int(chance.random() * body["max_tokens"] * body.get("n", 1)), chance.random() ** 2 * 3
    return Ask(number, kind, body, fate, patience, headers)


def _body(chance: random.Random, stems: random.Random, features: Collection[str]) -> dict[str, Any]:
    kind = "chat" if "chat" in features and chance.random() < 0.4 else "completions"
    body: dict[str, Any] = {"kind": kind, "max_tokens": chance.randint(1, MOST_TOKENS)}
    text = f"{chance.choice(_TEXTS)} {'and ' * chance.randint(0, 12)}"
    if kind == "chat":
        turns = [{"role": "user", "content": text}]
        if chance.random() < 0.3:
            turns = [*turns, {"role": "assistant", "content": "It was old."}, {"role": "user", "content": "Go on."}]
        body["messages"] = turns
    else:
        body["prompt"] = _ids(chance, stems) if "ours" in features and chance.random() < 0.7 else text
    body |= _sampling(chance, features)
    if "n" in features and chance.random() < 0.2:
        count = chance.randint(2, 3)
        if "greedy n" in features or body["temperature"]:
            body["n"] = count
    if "ignore_eos" in features and chance.random() < 0.7:
        body["ignore_eos"] = True
    if "token ids" in features:
        body["return_token_ids"] = True
    if "logprobs" in features and kind == "completions" and chance.random() < 0.6:
        body["logprobs"] = chance.randint(0, 5)
    if "top_logprobs" in features and kind == "chat" and chance.random() < 0.6:
        body |= {"logprobs": True, "top_logprobs": chance.randint(0, 5)}
    return body | (_of_ours(chance, kind, body["max_tokens"]) if "ours" in features else {})


def _ids(chance: random.Random, stems: random.Random) -> list[int]:
    """A prompt that shares its beginning with others."""
    shared = [[stems.randrange(300, 1500) for _ in range(100)] for _ in range(3)]
    return [*chance.choice(shared)[: chance.randint(1, 100)], *_tail(chance)]


def _tail(chance: random.Random) -> list[int]:
    return [chance.randrange(300, 1500) for _ in range(chance.randint(0, 40))]


def _sampling(chance: random.Random, features: Collection[str]) -> dict[str, Any]:
    """Greedy, or with a seed; penalties and stops on top."""
    found: dict[str, Any] = {"temperature": 0}
    if "seed" in features and chance.random() < 0.5:
        found = {"temperature": chance.choice((0.5, 1.0, 1.3)), "seed": chance.randrange(1 << 31)}
        found |= chance.choice(({}, {"top_p": 0.9}, {"top_p": 0.95, "top_k": 50}))
        if "top_k" not in features:
            found.pop("top_k", None)
    if "penalties" in features and chance.random() < 0.2:
        found |= {"presence_penalty": chance.uniform(-1, 1), "frequency_penalty": chance.uniform(-1, 1)}
    if "stop" in features and chance.random() < 0.25:
        found["stop"] = chance.sample(_STOPS, chance.randint(1, 3))
    return found


def _of_ours(chance: random.Random, kind: str, most: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if chance.random() < 0.5:
        found["priority"] = chance.randint(-3, 3)
    if chance.random() < 0.3:
        found["user"] = chance.choice(("anna", "bert"))
    if chance.random() < 0.1:
        found["cache_salt"] = chance.choice(("x", "y"))
    if chance.random() < 0.1:
        found["min_tokens"] = chance.randint(1, most)
    if chance.random() < 0.1:
        found |= {"repetition_penalty": chance.uniform(0.8, 1.5), "min_p": 0.01}
    if chance.random() < 0.1:
        found["logit_bias"] = {str(chance.randrange(300, 1500)): chance.uniform(-5, 5) for _ in range(5)}
    if chance.random() < 0.1:
        found["stop_token_ids"] = [chance.randrange(300, 1500) for _ in range(20)]
    if kind == "completions" and chance.random() < 0.1:
        found |= chance.choice(({"echo": True}, {"prompt_logprobs": 2}))
    return found
