"""Tells a story of the little world: a hero, a friend, a place, a thing and a plot, written out as English text."""

import random
import re
import zlib
from dataclasses import dataclass, field, replace

from tinyworld.words import ANIMALS, BOYS, GIRLS, PEOPLE, PLACES, THINGS, Place, article, table

SEA = ["whale", "dolphin", "seal", "shark", "octopus", "crab", "fish", "salmon", "mermaid"]
WATER = ["lake", "river", "pond", "sea", "ocean", "beach", "island", "harbor", "lighthouse", "waterfall"]
LIGHTS = ["lantern", "lamp", "candle"]
GENDER = {person.name: person.gender for person in PEOPLE}
KINDS = [animal.name for animal in ANIMALS] + [person.name for person in PEOPLE]
LAND_KINDS = [kind for kind in KINDS if kind not in SEA]
PLACE = {place.name: place for place in PLACES}
THING_NAMES = [thing.name for thing in THINGS]
PRONOUNS = {"f": ("she", "her", "her", "herself"), "m": ("he", "him", "his", "himself")}
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True)
class Plot:
    name: str
    moods: tuple[str, ...]
    traits: tuple[str, ...]
    lesson: str
    lines: tuple[str, ...]
    sequel: tuple[str, ...]

    @property
    def uses_thing(self) -> bool:
        return any("{at}" in line or "{t}" in line for line in self.lines)


def _plots(name: str) -> list[Plot]:
    """The plots of a table, each a block of lines in which cause leads to effect and effect to an ending.

    "@" opens a plot: name; moods; traits of the hero that fit it; its lesson. A line "?" may be left out, a line ">"
    belongs to the sequel, [a|b] is a choice. Fields: n k he him his (hero), f fk fhe fhim fhis (friend), t at (thing),
    p at_p to_p (place).
    """
    plots = []
    for block in table(name).split("\n\n"):
        head, *lines = block.splitlines()
        title, moods, traits, lesson = (part.strip() for part in head.removeprefix("@").split(";"))
        body = tuple(line for line in lines if line[0] != ">")
        sequel = tuple(line[1:] for line in lines if line[0] == ">")
        plots.append(Plot(title, tuple(moods.split()), tuple(traits.split()), lesson, body, sequel))
    return plots


ALL_PLOTS = _plots("plots")
ALL_SHORT_PLOTS = _plots("short_plots")
TRAITS = sorted({trait for plot in ALL_PLOTS + ALL_SHORT_PLOTS for trait in plot.traits})
MOODS = sorted({mood for plot in ALL_PLOTS for mood in plot.moods})


@dataclass(frozen=True)
class Character:
    name: str
    kind: str
    gender: str


@dataclass(frozen=True)
class Wish:
    """What a request asks for; None where it leaves the choice to the teller."""

    kinds: tuple[str, ...] = ()
    place: str | None = None
    thing: str | None = None
    trait: str | None = None
    mood: str | None = None
    name: str | None = None
    length: str = "medium"  # short, medium or long


@dataclass(frozen=True)
class Story:
    text: str
    wish: Wish
    hero: Character
    friend: Character
    place: Place
    thing: str
    trait: str
    plot: Plot
    fields: dict[str, str] = field(repr=False)


def held_out(*nouns: str | None) -> bool:
    """Whether a combination of nouns is kept out of the training text, to test with; about one in sixteen is."""
    named = sorted(noun for noun in nouns if noun)
    return len(named) > 1 and zlib.crc32(" ".join(named).encode()) % 16 == 0


def choose(rng: random.Random, template: str) -> str:
    """The template with each [a|b|c], innermost first, replaced by one of its choices."""
    while match := _CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    return template


def fill(rng: random.Random, template: str, fields: dict[str, str]) -> str:
    text = choose(rng, template).format_map(fields)
    return re.sub(r"\b([Aa]) (?=[aeio]|honest\b|u[^n])", r"\1n ", text)


def character(rng: random.Random, kind: str, *, gender: str | None = None, name: str | None = None) -> Character:
    own = GENDER.get(kind, "*")
    if name is not None:
        gender = "f" if name in GIRLS else "m"
    elif own != "*":
        gender = own
    elif gender is None:
        gender = rng.choice("fm")
    return Character(name or rng.choice(GIRLS if gender == "f" else BOYS), kind, gender)


def _pick_plot(rng: random.Random, wish: Wish) -> Plot:
    plots = ALL_SHORT_PLOTS if wish.length == "short" else ALL_PLOTS
    for keep in (
        lambda plot: wish.thing is None or plot.uses_thing,
        lambda plot: wish.mood is None or wish.mood in plot.moods,
        lambda plot: len(wish.kinds) < 2 or plot.name != "baby bird",
        lambda plot: wish.place in (None, *WATER) or plot.name != "moon",
        lambda plot: wish.trait is None or wish.trait in plot.traits,
    ):
        plots = [plot for plot in plots if keep(plot)] or plots
    return rng.choice(plots)


def _fields(hero: Character, friend: Character, place: Place, thing: str, trait: str) -> dict[str, str]:
    fields = {"n": hero.name, "k": hero.kind, "f": friend.name, "fk": friend.kind, "a_fk": article(friend.kind)}
    fields |= {"t": thing, "at": article(thing), "a_t": article(thing if thing in LIGHTS else "lantern")}
    fields |= {
        "p": "the " + place.name,
        "at_a": place.at,
        "at_p": re.sub(r"\b(a|an)\b", "the", place.at),
        "to_p": place.to,
        "view": place.view,
        "trait": trait,
    }
    for prefix, who in (("", hero), ("f", friend)):
        for key, word in zip(("he", "him", "his", "himself"), PRONOUNS[who.gender], strict=True):
            fields[prefix + key] = word
            fields[(prefix + key).title() if not prefix else "F" + key.title()] = word.capitalize()
    return fields


OPENINGS = (
    "Once upon a time, there was a {trait} {k} named {n}. {He} lived {at_a}.",
    "Once upon a time, a {trait} {k} named {n} lived {at_a}.",
    "Once there was a {trait} {k} who lived {at_a}. {His} name was {n}.",
    "{n} was a {trait} {k} who lived {at_a}.",
    "Long ago, a {trait} {k} called {n} lived {at_a}.",
    "There once was a {trait} {k} named {n}, and {he} lived {at_a}.",
)
PLAIN = ("They were friends for the rest of their lives.", "And they lived happily ever after.", "And that is the end.")
MORALS = ("{n} had learned that {lesson}.", "So {n} learned that {lesson}.", "And everyone knew now that {lesson}.")
SLEEP = (
    "Then {n} closed {his} eyes and fell asleep. Good night.",
    "That night, {n} slept deeply and dreamed of {p}. Good night.",
    "Soon the moon was high, and {n} was fast asleep.",
)


def tell(rng: random.Random, wish: Wish) -> Story:
    """A story that keeps to the wish; its text is one paragraph of about 50 to 160 words."""
    while True:
        story = _tell(rng, wish)
        if len(story.text.split()) <= 160 and (wish.thing is None or f" {wish.thing}" in story.text):
            return story


def _tell(rng: random.Random, wish: Wish) -> Story:
    plot = _pick_plot(rng, wish)
    hero_kind = wish.kinds[0] if wish.kinds else rng.choice(LAND_KINDS)
    hero = character(rng, hero_kind, name=wish.name)
    other = "f" if hero.gender == "m" else "m"
    others = [kind for kind in LAND_KINDS if kind != hero_kind and GENDER.get(kind, other) in ("*", other)]
    friend_kind = wish.kinds[1] if len(wish.kinds) > 1 else "bird" if plot.name == "baby bird" else rng.choice(others)
    friend = character(rng, friend_kind, gender=other)
    while friend.name == hero.name:
        friend = character(rng, friend_kind, gender=other)
    place = PLACE[wish.place or rng.choice(WATER if hero_kind in SEA or plot.name == "moon" else list(PLACE))]
    thing = wish.thing or rng.choice(THING_NAMES)
    trait = wish.trait or rng.choice(plot.traits)
    fields = _fields(hero, friend, place, thing, trait) | {"lesson": plot.lesson}
    keep = {"short": 0.2, "medium": 0.5, "long": 1.0}[wish.length]
    lines = [rng.choice(OPENINGS)]
    if rng.random() < keep:
        lines.append("{view}")
    lines += [line.removeprefix("?") for line in plot.lines if line[0] != "?" or rng.random() < keep]
    if wish.mood == "bedtime":
        lines.append(rng.choice(SLEEP))
    elif rng.random() < 0.35 + keep / 2:
        lines.append(rng.choice(MORALS))
    elif plot.name not in ("goodbye", "baby bird", "star") and rng.random() < 0.5:
        lines.append(rng.choice(PLAIN))
    text = " ".join(fill(rng, line, fields) for line in lines)
    return Story(text, wish, hero, friend, place, thing, trait, plot, fields)


SEQUELS = (
    "The next day, {n} and {f} met again {at_p}, and {f} brought a cake.",
    "A week later, {n} told everyone {at_p} what had happened, and everyone wanted to hear it again.",
    "After that, {n} and {f} met every day. One day, they made a long journey together and came home safe and happy.",
    "{n} went home and slept for a long time. In the morning, {f} stood at the door, and they went {to_p} together.",
)


def sequel(rng: random.Random, story: Story, *, first: bool = True) -> str:
    """What happened next: one or two sentences; the plot's own sequel comes first."""
    lines = (list(story.plot.sequel) if first else []) or [rng.choice(SEQUELS)]
    return " ".join(fill(rng, line, story.fields) for line in lines)


def shuffle_wish(rng: random.Random, *, kinds: int | None = None) -> Wish:
    """A random wish that is not held out of the training text."""
    while True:
        count = rng.choice((0, 1, 1, 1, 2)) if kinds is None else kinds
        wish = Wish(
            kinds=tuple(rng.sample(KINDS, count)),
            place=rng.choice(PLACES).name if rng.random() < 0.45 else None,
            thing=rng.choice(THING_NAMES) if rng.random() < (0.3 if count < 2 else 0.1) else None,
            length=rng.choices(("short", "medium", "long"), (3, 5, 2))[0],
        )
        if rng.random() < 0.25 and count:
            wish = replace(wish, trait=rng.choice(TRAITS))
        if rng.random() < 0.2:
            wish = replace(wish, mood=rng.choice(MOODS))
        if rng.random() < 0.12 and count and GENDER.get(wish.kinds[0], "*") == "*":
            wish = replace(wish, name=rng.choice(GIRLS + BOYS))
        if not held_out(*wish.kinds, wish.place, wish.thing):
            return wish
