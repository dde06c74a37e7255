"""R16: one tenant guesses what another has asked, by what the prefix cache spares it: counts of tokens, and time.

In each trial a prompt is drawn, and the victim asks it or does not; half of them each, so that who always says the same
is right in half. The same attack with the victim's own key is the control: it works there, or the row shows nothing.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Iterator
from typing import NamedTuple

import httpx

from torture.hostile import target
from torture.rows import Outcome, Row, Setup

ROWS = (Row("R16", "two keys, prefix probing by time and by counts of cached tokens", "accuracy across keys ≤ 0.55"),)
_VICTIM, _GUESSER = "the-key-of-the-victim", "the-key-of-the-guesser"
_WORDS = [
    "whale",
    "fox",
    "lake",
    "moon",
    "bird",
    "king",
    "boat",
    "star",
    "wind",
    "tree",
    "stone",
    "fish",
    "river",
    "night",
    "song",
    "bread",
    "sheep",
    "clock",
    "road",
    "snow",
]
_LENGTH = 300  # words of a prompt
_CALIBRATION = 8  # prompts of the guesser's own, cold and warm
_LEAST_CONTROL = 0.9


class Probe(NamedTuple):
    """seconds: until the whole answer of one token. num_cached: tokens that the server says it knew."""

    seconds: float
    num_cached: int


class Accuracy(NamedTuple):
    """Shares of right guesses."""

    by_count: float
    by_time: float


class _Attack:
    """Owner of the drawn prompts. A threshold tells known prompts from new ones by their time."""

    def __init__(self, client: httpx.Client, model: str, draw: random.Random) -> None:
        self._client = client
        self._model = model
        self._draw = draw
        cold, warm = [], []
        for _ in range(_CALIBRATION):
            prompt = self.prompt()
            cold.append(self.ask(prompt, _GUESSER).seconds)
            warm.append(self.ask(prompt, _GUESSER).seconds)
        self.cold, self.warm = statistics.median(cold), statistics.median(warm)

    def prompt(self) -> str:
        return " ".join(self._draw.choices(_WORDS, k=_LENGTH))

    def ask(self, prompt: str, key: str) -> Probe:
        body = {"model": self._model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        began = time.perf_counter()
        response = self._client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        seconds = time.perf_counter() - began
        response.raise_for_status()
        return Probe(seconds, response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    def accuracy(self, count: int, key: str) -> Accuracy:
        """Of so many trials, an even number. key: of who guesses."""
        was_asked = [True, False] * (count // 2)
        self._draw.shuffle(was_asked)
        by_count = by_time = 0
        for truth in was_asked:
            prompt = self.prompt()
            # The victim is busy in either case, with this prompt or with another one.
            self.ask(prompt if truth else self.prompt(), _VICTIM)
            probe = self.ask(prompt, key)
            by_count += (probe.num_cached > 0) == truth
            by_time += (probe.seconds < (self.cold + self.warm) / 2) == truth
        return Accuracy(by_count / len(was_asked), by_time / len(was_asked))


def torture(setup: Setup) -> Iterator[Outcome]:
    count = 2 * (setup.size("probes", 40, 1_000) // 2)
    keys = ("--api-key", f"victim={_VICTIM}", "--api-key", f"guesser={_GUESSER}")
    with target(setup, *keys) as (url, model, *_), httpx.Client(base_url=url, timeout=60) as client:
        attack = _Attack(client, model, setup.random("prefixes"))
        across = attack.accuracy(count, _GUESSER)
        control = attack.accuracy(max(2, 2 * (count // 8)), _VICTIM)
    # Who is wrong more often than by chance knows something, too.
    known = max(abs(share - 0.5) for share in across)
    allowed = max(0.05, 3 * 0.5 / math.sqrt(count))  # fewer probes say less: three standard deviations of a coin's
    works = max(control) >= _LEAST_CONTROL
    figure = (
        f"{count} probes across keys: right by counts {across.by_count:.3f}, by time {across.by_time:.3f}; with the "
        f"victim's own key {control.by_count:.3f} and {control.by_time:.3f}; a new prompt takes "
        f"{1000 * attack.cold:.0f} ms, a known one {1000 * attack.warm:.0f} ms"
    )
    cause = "" if works else "the attack does not even work with the victim's own key"
    if allowed > 0.05:
        cause = cause or f"so few probes can only show accuracies beyond {0.5 + allowed:.2f}"
    yield Outcome(ROWS[0], figure, works and known <= allowed, cause)
