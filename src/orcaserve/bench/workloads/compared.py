"""The works that servers are compared by: pure functions of a name, a seed and a round."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable

from orcaserve.bench.workloads.work import LOWEST_ID, Item, Kind, Work

DECODE_BATCHES = (1, 4, 16)


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
