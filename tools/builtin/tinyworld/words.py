"""The nouns, names and facts of the little world that the built-in model knows, read from the tables beside this file.

The tables are text, one entry a line and fields split by "|": hundreds of rows read best that way. Their columns are
the fields of the classes below.
"""

from dataclasses import dataclass
from pathlib import Path

_TABLES = Path(__file__).with_name("tables")


def table(name: str) -> str:
    """The text of a table."""
    return (_TABLES / f"{name}.txt").read_text(encoding="ascii").strip()


def _lists() -> dict[str, list[str]]:
    """The sections of the table of lists: "# NAME", then items split by "|"."""
    sections = (section.split("\n", 1) for section in table("lists").removeprefix("# ").split("\n\n# "))
    return {name: [item.strip() for line in body.splitlines() for item in line.split("|")] for name, body in sections}


LISTS = _lists()
GIRLS = LISTS["GIRLS"]
BOYS = LISTS["BOYS"]
COLORS = LISTS["COLORS"]
FRUITS = LISTS["FRUITS"]
VEGETABLES = LISTS["VEGETABLES"]
TREES = LISTS["TREES"]
DAYS = LISTS["DAYS"]
MONTHS = LISTS["MONTHS"]
SEASONS = LISTS["SEASONS"]
NUMBERS = LISTS["NUMBERS"]
INSTRUMENTS = LISTS["INSTRUMENTS"]
PLANETS = LISTS["PLANETS"]
UNKNOWN_TOPICS = LISTS["UNKNOWN TOPICS"]  # they stand for all that is outside the little world


@dataclass(frozen=True)
class Animal:
    name: str
    what: str
    lives: str
    eats: str
    fact: str
    flies: bool
    swims: bool
    size: int


@dataclass(frozen=True)
class Person:
    name: str
    gender: str  # f, m or * for either
    what: str


@dataclass(frozen=True)
class Place:
    name: str
    at: str
    to: str
    what: str
    view: str


@dataclass(frozen=True)
class Thing:
    name: str
    what: str
    fact: str


def _rows(name: str) -> list[list[str]]:
    return [line.split("|") for line in table(name).splitlines()]


def _pairs(name: str) -> list[tuple[str, str]]:
    return [(a, b) for a, b in (pair.split() for pair in LISTS[name])]


ANIMALS = [
    Animal(name, what, lives, eats, fact, "f" in can, "s" in can, int(size))
    for name, what, lives, eats, fact, can, size in _rows("animals")
]
PEOPLE = [Person(*row) for row in _rows("people")]
PLACES = [Place(*row) for row in _rows("places")]
THINGS = [Thing(*row) for row in _rows("things")]
IDEAS = _rows("ideas")  # name, the sentence that explains it, one sentence more
OPPOSITE_PAIRS = _pairs("OPPOSITES")
COLOR_PAIRS = _pairs("COLORS OF")
SOUND_PAIRS = _pairs("SOUNDS OF")


def article(noun: str) -> str:
    """The noun with its "a" or "an"."""
    return ("an " if noun[0] in "aeiou" and not noun.startswith(("uni", "eu")) else "a ") + noun


def plural(noun: str) -> str:
    """The plural of an animal's, a person's or a thing's name."""
    irregular = {
        "mouse": "mice", "deer": "deer", "moose": "moose", "sheep": "sheep", "fish": "fish", "salmon": "salmon",
        "goose": "geese", "wolf": "wolves", "octopus": "octopuses", "fisherman": "fishermen", "snowman": "snowmen",
        "elf": "elves", "scarf": "scarves",
    }  # fmt: skip
    if noun in irregular:
        return irregular[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
