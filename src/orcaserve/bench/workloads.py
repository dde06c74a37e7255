"""What servers are given to do: pure functions of a name, a seed and a round."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

Kind = Literal["decode", "trace", "poisson"]
DECODE_BATCHES = (1, 4, 16)
# Below lie the special tokens of many vocabularies; a prompt of them is no prompt.
LOWEST_ID = 100


class Item(msgspec.Struct, frozen=True):
    """One request: when it is due (seconds after the work begins), its prompt, how many tokens it generates."""

    at: float
    prompt_ids: tuple[int, ...]
    max_tokens: int


class Work(msgspec.Struct, frozen=True):
    """Requests in the order in which they are due, and what kind of work they are."""

    name: str
    kind: Kind
    items: tuple[Item, ...]


def make(name: str, *, vocab: int, seed: int, round: int, requests: int = 32) -> Work:
    """The work called "decode-BATCH", "trace" or "poisson-RATE"; ValueError says which names there are.

    decode: BATCH requests at once, 32 tokens in, 128 out. trace (Orca, section 6): `requests` at once, U(32,512) in,
    U(1,128) out. poisson: the same lengths, RATE arrivals a second. Rounds have the same lengths and arrivals, so that
    they can be compared, but other token ids, so that no server knows a prompt from an earlier round.
    """
    kind, parameter = _parse(name)
    rng = random.Random(f"{seed} {name}")  # noqa: S311
    if kind == "decode":
        shapes = [(0.0, 32, 128)] * int(parameter)
    elif kind == "trace":
        shapes = [(0.0, *_lengths(rng)) for _ in range(requests)]
    else:
        arrivals = itertools.accumulate(rng.expovariate(parameter) for _ in range(requests))
        shapes = [(at, *_lengths(rng)) for at in arrivals]
    ids = random.Random(f"{seed} {name} {round}")  # noqa: S311
    items = (Item(at, tuple(ids.choices(range(LOWEST_ID, vocab), k=num_in)), out) for at, num_in, out in shapes)
    return Work(name, kind, tuple(items))


def names(kinds: Iterable[str], rates: Iterable[float]) -> list[str]:
    """Names of works: "decode" stands for its three batches, "poisson" for all rates; others stand for themselves.

    ValueError for what `make` would not know.
    """
    several = {
        "decode": [f"decode-{batch}" for batch in DECODE_BATCHES],
        "poisson": [f"poisson-{rate:g}" for rate in rates],
    }
    chosen = list(dict.fromkeys(name for kind in kinds for name in several.get(kind.strip(), [kind.strip()])))
    for name in chosen:
        _parse(name)
    return chosen


def save(work: Work, path: Path) -> None:
    """Writes JSON lines: one with name and kind, then one per request."""
    lines = [{"name": work.name, "kind": work.kind}, *work.items]
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def load(path: Path) -> Work:
    """Reads what `save` wrote."""
    head, *items = path.read_bytes().splitlines()
    work = msgspec.json.decode(head)
    return Work(work["name"], work["kind"], tuple(msgspec.json.decode(line, type=Item) for line in items))


def _parse(name: str) -> tuple[Kind, float]:
    """Its kind, and its batch or rate."""
    kind, _, parameter = name.partition("-")
    if name == "trace":
        return "trace", 0
    if kind == "decode" and re.fullmatch("[1-9][0-9]{0,3}", parameter):
        return "decode", int(parameter)
    if kind == "poisson" and re.fullmatch(r"[0-9]*\.?[0-9]+", parameter) and float(parameter) > 0:
        return "poisson", float(parameter)
    raise ValueError(
        f"there is no work {name!r}: works are decode, trace and poisson, or one as decode-4, poisson-0.63"
    )


def _lengths(rng: random.Random) -> tuple[int, int]:
    return rng.randint(32, 512), rng.randint(1, 128)
