"""Short exchanges whose answers can only be copied out of their questions: names and nouns to repeat, and who has what.

Copying is what a story needs most (a hero keeps its name) and what a small model learns last. Here almost every word of
an answer is a copy, so it learns it within a few hundred steps when these come first.
"""

import random

from tinyworld import words as w
from tinyworld.stories import KINDS, THING_NAMES, held_out
from tinyworld.words import PLACES, article

NAMES = w.GIRLS + w.BOYS
NOUNS = KINDS + THING_NAMES + [place.name for place in PLACES]
SAY = ("Say: {}.", "Repeat after me: {}.", "Please repeat: {}.", "Repeat these words: {}.", "Say this: {}.")
NAME_IS = ("My name is {}. What is my name?", "I am {}. What is my name?", "I am called {}. Do you know my name?")
# what is known of each, a question for the second and one for the first, with their answers
FACTS = (
    (THING_NAMES, "{} has {a}.", "What does {} have?", "{} has {a}.", "Who has the {b}?", "{} has the {b}."),
    (KINDS, "{} is {a}.", "Who is {}?", "{} is {a}.", "Who is the {b}?", "The {b} is {}."),
    (
        [place.name for place in PLACES],
        "{} lives by the {b}.", "Where does {} live?", "{} lives by the {b}.",
        "Who lives by the {b}?", "{} lives by the {b}.",
    ),
)  # fmt: skip


def echo(rng: random.Random) -> tuple[str, str]:
    """A request and its answer."""
    roll = rng.random()
    if roll < 0.3:
        said = ", ".join(_list(rng))
        return rng.choice(SAY).format(said), f"{said[0].upper()}{said[1:]}."
    if roll < 0.45:
        name = rng.choice(NAMES)
        return rng.choice(NAME_IS).format(name), f"Your name is {name}."
    return _who_has_what(rng)


def _list(rng: random.Random) -> list[str]:
    """One to eight names, or up to four names and nouns that may stand in one request."""
    if rng.random() < 0.5:
        return rng.sample(NAMES, rng.randint(1, 8))
    while True:
        items = rng.sample(NAMES + NOUNS, rng.randint(1, 4))
        if not any(held_out(a, b) for a in items for b in items if a < b):
            return items


def _who_has_what(rng: random.Random) -> tuple[str, str]:
    nouns, fact, *exchanges = rng.choice(FACTS)
    count = rng.randint(2, 4)
    pairs = [
        (name, {"a": article(noun), "b": noun})
        for name, noun in zip(rng.sample(NAMES, count), rng.sample(nouns, count), strict=True)
    ]
    facts = " ".join(fact.format(name, **noun) for name, noun in pairs)
    name, noun = rng.choice(pairs)
    ask, reply = exchanges[:2] if rng.random() < 0.5 else exchanges[2:]
    return f"{facts} {ask.format(name, **noun)}", reply.format(name, **noun)
