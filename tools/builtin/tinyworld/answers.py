"""Questions about the little world and their answers, small talk, and the honest answer to everything outside it."""

import random
from collections.abc import Callable

from tinyworld import words as w
from tinyworld.stories import choose
from tinyworld.words import article, plural

Pair = tuple[str, str]

POEMS = (
    ("The {k} sat down beneath a tree,", "and looked as far as one can see.", "The sun went down, the moon came out,",
     "and not a sound was heard about."),
    ("A {k} went out to see the day,", "and met a friend along the way.", "They laughed and sang until the night,",
     "and walked back home by candle light."),
    ("O little {k}, where do you go?", "Through summer rain and winter snow.", "I go to where the wild winds blow,",
     "and where the silver rivers flow."),
    ("I saw a {k} one summer morn,", "just when the golden day was born.", "It looked at me, I looked at it,",
     "and side by side we went to sit."),
    ("The {k} is quiet, the {k} is wise,", "it sees the world with open eyes.", "It does not hurry, does not fear,",
     "it knows that home is always near."),
)  # fmt: skip


def _split_table(text: str) -> list[Pair]:
    """Rows "question template|answer template"; inside a row's choices the separator is ";"."""
    rows = (line.split("|") for line in text.splitlines())
    return [(q.replace(";", "|"), a.replace(";", "|")) for q, a in rows]


TALK_PAIRS = _split_table(w.table("talk"))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _a(noun: str) -> str:
    return _capital(article(noun))


def talk(rng: random.Random) -> Pair:
    question, answer = rng.choice(TALK_PAIRS)
    name = rng.choice(w.GIRLS + w.BOYS)
    return choose(rng, question).replace("{x}", name), choose(rng, answer).replace("{x}", name).strip()


def what_is_animal(rng: random.Random) -> Pair:
    animal = rng.choice(w.ANIMALS)
    a = article(animal.name)
    asked = (
        f"[What is {a}?|What's {a}?|What are {plural(animal.name)}?|Tell me about {plural(animal.name)}.|Describe {a}."
    )
    asked += f"|Tell me something about the {animal.name}.|Explain what {a} is.|Do you know what {a} is?]"
    parts = [
        f"{_a(animal.name)} is {animal.what}.",
        f"It lives {animal.lives}.",
        f"It eats {animal.eats}.",
        animal.fact,
    ]
    if rng.random() < 0.4:
        parts = [parts[0], rng.choice((parts[1], parts[3]))]
    return choose(rng, asked), " ".join(parts)


def animal_fact(rng: random.Random) -> Pair:
    animal = rng.choice(w.ANIMALS)
    a, name = article(animal.name), animal.name
    kind = rng.randrange(5)
    if kind == 0:
        return choose(rng, f"[Where does {a} live?|Where do {plural(name)} live?]"), f"{_a(name)} lives {animal.lives}."
    if kind == 1:
        asked = f"[What does {a} eat?|What do {plural(name)} eat?|What does the {name} like to eat?]"
        return choose(rng, asked), f"{_a(name)} eats {animal.eats}."
    if kind == 2:
        verb = rng.choice(("fly", "swim"))
        able = animal.flies if verb == "fly" else animal.swims
        answer = f"Yes, {a} can {verb}." if able else f"No, {a} cannot {verb} well." if verb == "swim" else ""
        asked = f"[Can {a} {verb}?|Can {plural(name)} {verb}?]"
        return choose(rng, asked), (answer or f"No, {a} cannot {verb}.") + f" It lives {animal.lives}."
    if kind == 3:
        asked = f"[Tell me a fact about {plural(name)}.|Tell me one thing about the {name}.|What is special about {a}?]"
        return choose(rng, asked), animal.fact
    while (other := rng.choice(w.ANIMALS)).size == animal.size:
        pass
    small, big = sorted((animal, other), key=lambda one: one.size)
    order = rng.choice((f"{a} or {article(other.name)}", f"{article(other.name)} or {a}"))
    if rng.random() < 0.5:
        return f"Which is bigger, {order}?", f"{_a(big.name)} is bigger than {article(small.name)}."
    return f"Which is smaller, {order}?", f"{_a(small.name)} is smaller than {article(big.name)}."


def what_is_thing(rng: random.Random) -> Pair:
    entry = rng.choice([*w.PEOPLE, *w.PLACES, *w.THINGS])
    a = article(entry.name)
    asked = (
        f"[What is {a}?|What's {a}?|Tell me what {a} is.|Explain what {a} is.|Describe {a}.|Do you know what {a} is?"
    )
    more = ""
    if isinstance(entry, w.Thing):
        asked += f"|What is {a} used for?|What is {a} for?|Tell me about {plural(entry.name)}."
        more = " " + entry.fact
    elif isinstance(entry, w.Person):
        asked += f"|What does {a} do?|Who is {a}?|Tell me about {plural(entry.name)}."
    else:
        asked += f"|Tell me about the {entry.name}.|What is it like {entry.at}?"
        more = " " + rng.choice(
            ("Many stories begin there.", "I know some stories about it.", "It is a good place for a story.")
        )
    return choose(rng, asked + "]"), f"{_a(entry.name)} is {entry.what}.{more}"


def what_is_idea(rng: random.Random) -> Pair:
    name, what, more = rng.choice(w.IDEAS)
    bare = name.removeprefix("a ").removeprefix("an ")
    asked = f"[What is {name}?|What's {name}?|Tell me about {bare}.|Explain {name}.|Describe {name}."
    asked += f"|Tell me what {name} is."
    return choose(
        rng, asked + f"|What do you know about {bare}?|Do you know what {name} is?]"
    ), f"{_capital(what)}. {more}"


def opposite(rng: random.Random) -> Pair:
    pair = rng.choice(w.OPPOSITE_PAIRS)
    one, _ = rng.sample(pair, 2)
    asked = f"[What is the opposite of {one}?|Opposite of {one}?|Tell me the opposite of {one}."
    asked += f"|The opposite of {one} is what?]"
    firsts = [b for a, b in w.OPPOSITE_PAIRS if a == one] + [a for a, b in w.OPPOSITE_PAIRS if b == one]
    return choose(rng, asked), f"The opposite of {one} is {firsts[0]}."


def color(rng: random.Random) -> Pair:
    noun, shade = rng.choice(w.COLOR_PAIRS)
    noun = noun.replace("_", " ")
    subject = f"the {noun}" if noun in ("sky", "sun", "grass", "sea", "night", "snow") else article(noun)
    if noun in ("coal", "milk", "fire", "gold", "snow", "grass", "chocolate"):
        subject = noun
    asked = f"[What color is {subject}?|Which color does {subject} have?|What is the color of {subject}?]"
    return choose(rng, asked), f"{_capital(subject)} is {shade}."


def sound(rng: random.Random) -> Pair:
    noun, verb = rng.choice(w.SOUND_PAIRS)
    verb = next(v for n, v in w.SOUND_PAIRS if n == noun)
    asked = f"[What sound does {article(noun)} make?|What does {article(noun)} say?|Which sound does the {noun} make?]"
    return choose(rng, asked), f"{_a(noun)} {verb}."


def calendar(rng: random.Random) -> Pair:
    names, unit = rng.choice(((w.DAYS, "day"), (w.MONTHS, "month"), (w.SEASONS, "season")))
    i = rng.randrange(len(names))
    if rng.random() < 0.5:
        asked = f"[What {unit} comes after {names[i]}?|Which {unit} is after {names[i]}?|What comes after {names[i]}?]"
        return choose(rng, asked), f"{_capital(names[(i + 1) % len(names)])} comes after {names[i]}."
    asked = f"[What {unit} comes before {names[i]}?|Which {unit} is before {names[i]}?|What comes before {names[i]}?]"
    return choose(rng, asked), f"{_capital(names[i - 1])} comes before {names[i]}."


def arithmetic(rng: random.Random) -> Pair:
    kind = rng.randrange(4)
    if kind == 0:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        sign, word, result = "*", "times", a * b
    elif kind == 1:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        a, b = max(a, b), min(a, b)
        sign, word, result = "-", "minus", a - b
    else:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        sign, word, result = "+", "plus", a + b
    style = rng.randrange(3)
    if style == 0 and max(a, b, result) <= 20:
        x, y, z, op = w.NUMBERS[a], w.NUMBERS[b], w.NUMBERS[result], word
    else:
        x, y, z, op = str(a), str(b), str(result), word if style == 1 else sign
    asked = f"[What is {x} {op} {y}?|What's {x} {op} {y}?|{x} {op} {y}|{x} {op} {y} =|How much is {x} {op} {y}?"
    asked += f"|{_capital(x)} {op} {y}?|Calculate {x} {op} {y}.]"
    equals = "is" if op == word else "="
    return choose(rng, asked), f"{_capital(x)} {op} {y} {equals} {z}."


def hard_arithmetic(rng: random.Random) -> Pair:
    """Numbers that are too large for the model: it says so."""
    a, b = (rng.randint(21, 10 ** rng.randint(2, 5)) for _ in range(2))
    op = rng.choice(("+", "-", "*", "/", "plus", "minus", "times", "divided by"))
    asked = f"[What is {a} {op} {b}?|{a} {op} {b}|Calculate {a} {op} {b}.|How much is {a} {op} {b}?|{a} {op} {b} = ?"
    asked += f"|What is the square root of {a}?]"
    return choose(
        rng, asked
    ), "These numbers are too big for me. I can only do sums with small numbers, like two plus three."


def count(rng: random.Random) -> Pair:
    n = rng.randint(3, 20)
    digits = rng.random() < 0.5
    name = str(n) if digits else w.NUMBERS[n]
    numbers = [str(i) if digits else w.NUMBERS[i] for i in range(1, n + 1)]
    if rng.random() < 0.25:
        asked = f"[Count backwards from {name}.|Count down from {name}.|Count from {name} to {numbers[0]}.]"
        numbers.reverse()
    else:
        asked = (
            f"[Count to {name}.|Count from {numbers[0]} to {name}.|Can you count to {name}?|Please count to {name}.]"
        )
    return choose(rng, asked), _capital(", ".join(numbers)) + "."


def listing(rng: random.Random) -> Pair:
    pool, noun = rng.choice((
        ([plural(a.name) for a in w.ANIMALS], "animals"), (w.COLORS, "colors"), (w.FRUITS, "kinds of fruit"),
        (w.VEGETABLES, "vegetables"), (w.FRUITS, "fruits"), (w.TREES, "trees"), (w.DAYS, "days"), (w.MONTHS, "months"),
        ([plural(a.name) for a in w.ANIMALS if a.flies], "animals that can fly"),
        ([plural(a.name) for a in w.ANIMALS if a.lives == "on the farm"], "farm animals"),
        ([plural(a.name) for a in w.ANIMALS if a.size >= 8], "big animals"), (w.PLANETS, "planets"),
        (w.INSTRUMENTS, "musical instruments"), ([t.name for t in w.THINGS], "things"),
        ([article(p.name) for p in w.PEOPLE if " person who" in p.what], "jobs"),
    ))  # fmt: skip
    n = min(rng.randint(2, 7), len(pool))
    name = rng.choice((str(n), w.NUMBERS[n]))
    chosen = rng.sample(pool, n)
    if rng.random() < 0.25:
        lines = "\n".join(f"{i}. {_capital(item)}" for i, item in enumerate(chosen, 1))
        ask = (
            f"[List {name} {noun}, one per line.|Make a numbered list of {name} {noun}.|Write a list of {name} {noun}.]"
        )
        return choose(rng, ask), lines
    asked = f"[Name {name} {noun}.|List {name} {noun}.|Tell me {name} {noun}.|Give me {name} {noun}."
    asked += f"|Can you name {name} {noun}?]"
    return choose(rng, asked), _capital(", ".join(chosen[:-1])) + f" and {chosen[-1]}."


def poem(rng: random.Random) -> Pair:
    kind = rng.choice(w.ANIMALS).name
    lines = [line.format(k=kind) for line in rng.choice(POEMS)]
    about = rng.choice(("", f" about {article(kind)}", f" about {article(kind)}"))
    asked = f"[Write a poem{about}.|Write me a [short |little ]poem{about}.|Can you write a poem{about}?"
    asked += f"|A poem{about}, please."
    lines[0] = _capital(lines[0])
    return choose(rng, asked + f"|Tell me a poem{about}.|Write a haiku{about}.]"), "\n".join(lines)


def pseudo_word(rng: random.Random) -> str:
    """A word that does not exist, so that the model meets words it cannot know."""
    onsets, vowels, ends = (
        "b c d f g h j k l m n p r s t v w z bl br ch cr dr fl gr pl sh st th tr",
        "aeiou",
        "n r l s t x ng rk ",
    )
    count = rng.randint(1, 4)
    return "".join(rng.choice(onsets.split()) + rng.choice(vowels) for _ in range(count)) + rng.choice(ends.split(" "))


SORRY = w.table("sorry").splitlines()
ASKS_FOR_THE_UNKNOWN = w.table("unknown").splitlines()


def unknown_topic(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.4:
        return rng.choice(w.UNKNOWN_TOPICS)
    made_up = " ".join(pseudo_word(rng) for _ in range(rng.randint(1, 3)))
    return rng.choice((made_up, made_up, "the " + made_up, article(made_up), made_up.title()))


def unknown(rng: random.Random) -> Pair:
    x = unknown_topic(rng)
    asked = rng.choice(ASKS_FOR_THE_UNKNOWN).replace("{x}", x).replace("{y}", unknown_topic(rng))
    return choose(rng, asked), choose(rng, rng.choice(SORRY))


KINDS_OF_ANSWERS: list[tuple[int, Callable[[random.Random], Pair]]] = [  # how often, out of a hundred or so
    (16, talk), (10, what_is_animal), (8, animal_fact), (8, what_is_thing), (6, what_is_idea), (4, opposite),
    (3, color), (2, sound), (3, calendar), (9, arithmetic), (1, hard_arithmetic), (3, count), (5, listing), (2, poem),
    (10, unknown),
]  # fmt: skip


def answer(rng: random.Random) -> Pair:
    """A question and its answer."""
    weights, makers = zip(*KINDS_OF_ANSWERS, strict=True)
    return rng.choices(makers, weights)[0](rng)
