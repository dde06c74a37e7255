"""A workload as people write it: kind:key=value,key=value, several joined by " + "."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from orcaserve.bench.workloads.kinds import KINDS, Draw
from orcaserve.bench.workloads.lengths import FORMS, Lengths
from orcaserve.bench.workloads.work import Work


def _from_zero(text: str) -> float:
    if not re.fullmatch(r"\d{0,9}\.?\d{1,9}", text):
        raise ValueError
    return float(text)


def _above_zero(text: str) -> float:
    if not (value := _from_zero(text)):
        raise ValueError
    return value


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,7}", text):
        raise ValueError
    return int(text)


def _count(text: str) -> int:
    if not (value := _whole(text)):
        raise ValueError
    return value


def _level(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,7}", text):
        raise ValueError
    return int(text)


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w.@-]{1,64}", text):
        raise ValueError
    return text


def _path(text: str) -> Path:
    return Path(text).expanduser()


class Key(NamedTuple):
    """argument: what a kind's function calls it. form: how its value is written. parse raises ValueError."""

    argument: str
    parse: Callable[[str], Any]
    form: str
    what: str


_ABOVE_ZERO, _FROM_ZERO = (_above_zero, "a number above 0"), (_from_zero, "a number from 0")
_COUNT, _LENGTHS = (_count, "a whole number from 1"), (Lengths.of, FORMS)
KEYS = {
    "n": Key("n", *_COUNT, "requests; of a file, the first so many"),
    "rate": Key("rate", *_ABOVE_ZERO, "arrivals a second"),
    "cv": Key("cv", *_ABOVE_ZERO, "coefficient of variation of the gaps between arrivals; Gamma's shape is 1/cv²"),
    "on": Key("on", *_ABOVE_ZERO, "seconds with arrivals"),
    "off": Key("off", *_ABOVE_ZERO, "seconds without"),
    "in": Key("prompts", *_LENGTHS, "tokens of a prompt; in a chat, those new in a turn"),
    "out": Key("outputs", *_LENGTHS, "tokens to generate"),
    "sessions": Key("sessions", *_COUNT, "chats; `rate` is theirs"),
    "turns": Key("turns", *_LENGTHS, "requests of a chat"),
    "think": Key("think", *_ABOVE_ZERO, "mean seconds from a turn's arrival to the next one's, exponential"),
    "system": Key("system", _whole, "a whole number from 0", "tokens that all chats begin with"),
    "path": Key("path", _path, "a file", "the trace, or the workload.jsonl of an earlier run"),
    "speed": Key("speed", *_ABOVE_ZERO, "arrivals so many times as fast"),
    "lengths": Key("lengths", *_ABOVE_ZERO, "prompts and outputs so many times as long"),
    "max-in": Key("max_in", *_COUNT, "prompts are cut there"),
    "max-out": Key("max_out", *_COUNT, "outputs are cut there"),
    "spread": Key("spread", *_FROM_ZERO, "arrivals within so many seconds are dealt out over them"),
    "tenant": Key("tenant", _name, "a name", "who sends these; the server gets it as `user`"),
    "priority": Key("priority", _level, "a whole number", "of these requests; the lower, the earlier"),
    "deadline": Key("deadline", *_ABOVE_ZERO, "seconds until the first token is due; for orcaserve simulate"),
    "start": Key("start", *_FROM_ZERO, "seconds before the first of these may arrive"),
}
# Of every kind.
COMMON = {"tenant": None, "priority": None, "deadline": None, "start": "0"}


def make(text: str, *, vocab: int, seed: int) -> Work:
    """The requests that a text stands for: the same for the same text, vocabulary size and seed.

    ValueError says in one line what is wrong with the text or the file it names; OSError if that cannot be read.
    """
    items = []
    # Paths may hold a plus or a comma.
    for part, written in enumerate(re.split(r"\s*\+\s*(?=[a-z]+:)", text.strip())):
        kind, options = _parse(written)
        start = options.pop("start")
        said = {name: value for name in ("tenant", "priority", "deadline") if (value := options.pop(name)) is not None}
        draw = Draw(written, part, vocab=vocab, seed=seed)
        for item in KINDS[kind].make(draw, **options):
            items.append(msgspec.structs.replace(item, at=item.at + start, **said))
    if not items:
        raise ValueError(f"{text!r} has no requests")
    return Work(text.strip(), "load", tuple(sorted(items, key=lambda item: item.at)))


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Kind and arguments of one part."""
    name, _, rest = text.partition(":")
    if name not in KINDS:
        raise ValueError(f"there is no workload {text!r}: it is KIND:key=value,… and kinds are {', '.join(KINDS)}")
    kind = KINDS[name]
    known = {**dict.fromkeys(kind.needs), **kind.optional, **COMMON}
    given: dict[str, str] = {}
    for pair in re.split(r",(?=[a-z-]+=)", rest) if rest else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} in {text!r} is not key=value, as in {kind.example}")
        if key not in known:
            raise ValueError(f"{name} has no {key!r}: it has {', '.join(known)}, as in {kind.example}")
        if key in given:
            raise ValueError(f"{key} stands twice in {text!r}")
        given[key] = value
    if missing := [key for key in kind.needs if key not in given]:
        raise ValueError(f"{text!r} lacks {', '.join(missing)}: it is written {kind.example}")
    return name, {KEYS[key].argument: _value(key, value) for key, value in (known | given).items()}


def _value(key: str, text: str | None) -> Any:
    if text is None:
        return None
    try:
        return KEYS[key].parse(text)
    except ValueError:
        raise ValueError(f"{key}={text} cannot be read: {key} is {KEYS[key].form}") from None


def explained() -> Iterator[str]:
    """Lines that say what there is to write: every kind with an example, then every key."""
    yield "Workloads:"
    for kind in KINDS.values():
        more = ", ".join(key for key in kind.optional if f"{key}=" not in kind.example)
        yield from (f"  {kind.example}", f"      {kind.what}" + (f"; also {more}" if more else ""))
    yield f"Keys; {', '.join(COMMON)} are of every kind:"
    for name, key in KEYS.items():
        yield f"  {name:9} {key.what}"
    yield f"Lengths (in, out, turns) are {FORMS}."
