"""Assembles documents for training: conversations of one or more turns, and plain text; a pure function of a seed."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tinyworld import words as w
from tinyworld.answers import SORRY, answer, pseudo_word
from tinyworld.echoes import echo
from tinyworld.stories import Story, Wish, choose, fill, sequel, shuffle_wish, tell
from tinyworld.words import article

BEGIN, END, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, SYSTEM, USER, ASSISTANT)


@dataclass(frozen=True)
class Message:
    role: str  # system, user or assistant
    content: str


def render(messages: list[Message]) -> str:
    """The conversation as the chat template writes it, with the beginning token and an end token after each message."""
    return BEGIN + "".join(f"<|{m.role}|>{m.content.strip()}{END}" for m in messages)


SYSTEM_MESSAGES, BRIEF_MESSAGES = w.LISTS["SYSTEM MESSAGES"], w.LISTS["BRIEF MESSAGES"]
ASKS, NEXT = w.LISTS["ASKS FOR A STORY"], w.LISTS["ASKS FOR MORE"]
ANOTHER, SAME = w.LISTS["ASKS FOR ANOTHER"], w.LISTS["ASKS FOR THE SAME"]
HOW = {
    "short": ("short ", "very short ", "little ", "brief "),
    "medium": ("", "", "", "nice ", "little "),
    "long": ("long ", "longer "),
}


def _named(rng: random.Random, kind: str, wish: Wish, first: bool) -> str:
    text = kind
    if first and wish.trait:
        text = f"{wish.trait} {kind}"
    text = article(text) if rng.random() < 0.93 else text
    if first and wish.name:
        text += rng.choice((f" named {wish.name}", f" called {wish.name}", f" with the name {wish.name}"))
    return text


def ask_story(rng: random.Random, wish: Wish) -> str:
    """A request for the story, in one of many ways."""
    mood = {None: "", "bedtime": "bedtime ", "magic": "magic ", "brave": "", "adventure": "adventure "}.get(
        wish.mood, f"{wish.mood} "
    )
    what = rng.choice(("story", "story", "story", "story", "tale", "fairy tale")) if wish.mood != "bedtime" else "story"
    head = article(rng.choice(HOW[wish.length]) + mood + what)
    topics = [_named(rng, kind, wish, i == 0) for i, kind in enumerate(wish.kinds)]
    if wish.thing and len(topics) == 1 and rng.random() < 0.4:
        topics[0] += rng.choice(
            (" who finds ", " who has ", " who loses ", " with ", " that has ", " who gets ")
        ) + article(wish.thing)
    elif wish.thing:
        topics.append(rng.choice((article(wish.thing), f"the {wish.thing}", article(wish.thing))))
    elif len(topics) == 2 and rng.random() < 0.25:
        topics = [
            topics[0]
            + rng.choice((" who meets ", " who helps ", " and a friend, ", " that meets ", " who is a friend of "))
            + topics[1]
        ]
    place = w.article(wish.place) if wish.place else ""
    if place and topics and rng.random() < 0.4:
        at = next(p for p in w.PLACES if p.name == wish.place).at
        topics[-1] += rng.choice((f" {at}", f" who lives {at}" if wish.kinds and not wish.thing else f" {at}"))
    elif place:
        topics.append(rng.choice((place, f"the {wish.place}", place)))
    about = topics[0] if len(topics) == 1 else ", ".join(topics[:-1]) + " and " + topics[-1] if topics else ""
    if wish.kinds and about == topics[0] == article(wish.kinds[0]) and rng.random() < 0.15:
        head = article(f"{wish.kinds[0]} {what}")
    elif about and rng.random() < 0.06:
        head = rng.choice(("something about ", "a few sentences about ", "what happened to ", "about ")) + about
        return f"Tell me {head}." if wish.length != "short" else f"Write {head.removeprefix('about ')}."
    elif about:
        head += rng.choice((" about ", " about ", " about ", " with ")) + about
        if rng.random() < 0.05:
            return f"{about[0].upper()}{about[1:]}."
    ask = rng.choice(ASKS)
    return ask.replace("{S}", head[0].upper() + head[1:]).replace("{s}", head)


def roughen(rng: random.Random, text: str) -> str:
    """The text as people type: sometimes without capitals or punctuation, sometimes with a slip of the finger."""
    roll = rng.random()
    if roll < 0.25:
        text = text.lower()
    elif roll < 0.28:
        text = text.upper()
    if rng.random() < 0.3:
        text = text.rstrip(".?!")
    if rng.random() < 0.04 and len(text) > 8:
        i = rng.randrange(1, len(text) - 2)
        text = rng.choice((text[:i] + text[i + 1 :], text[:i] + text[i + 1] + text[i] + text[i + 2 :]))
    if rng.random() < 0.03:
        text = text.replace("?", "??").replace(".", "...")
    return text


def story_question(rng: random.Random, story: Story) -> tuple[str, str]:
    """A question about the story and its answer."""
    hero, friend, f = story.hero, story.friend, story.fields
    pairs = [
        ("[Who was {n}?|Who is {n}?]", "{n} was a {trait} {k}."),
        (
            "[What was the name of the {k}?|What was the {k}'s name?|What was the {k} called?]",
            "The {k} was called {n}.",
        ),
        ("[Where did {n} live?|Where did the {k} live?|Where did it happen?]", "{n} lived {at_p}."),
        (
            "[What did {n} learn?|What is the moral of the story?|What is the lesson?|What do we learn from it?]",
            "{n} learned that {lesson}.",
        ),
        (
            "[What was the story about?|What is the story about?|Who was in the story?]",
            "The story was about {n} the {k} and {f} the {fk}.",
        ),
        ("[Who helped {n}?|Who was {f}?|Who is {f}?]", "{f} was {a_fk} and a friend of {n}."),
        (
            "[Did you like the story?|Is it true?|Is it a true story?|Did it really happen?]",
            "[I made it up, but I like it very much.|It is only a story, but a good one.]",
        ),
    ]
    if hero.kind == friend.kind:
        pairs.pop(1)
    question, reply = rng.choice(pairs)
    return fill(rng, question, f), fill(rng, reply, f)


def story_turns(rng: random.Random, *, brief: bool = False) -> list[Message]:
    """A request for a story, the story, and what people say after it."""
    wish = shuffle_wish(rng)
    if brief:
        wish = replace(wish, length="short")
    story, asked = tell(rng, wish), ask_story(rng, wish)
    text = story.text
    if rng.random() < 0.05:  # a word that the model does not know: it says so and tells a story of its own choice
        wish = Wish(length=rng.choice(("short", "medium")))
        story = tell(rng, wish)
        asked = (
            ask_story(rng, replace(wish, kinds=("QQ",)))
            .replace("a QQ", article(pseudo_word(rng)))
            .replace("QQ", pseudo_word(rng))
        )
        text = f"I do not know that word, but here is a story about {article(story.hero.kind)}. {story.text}"
    elif rng.random() < 0.05:
        start = rng.randint(1, 3)
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
        head, text = " ".join(sentences[:start]), " ".join(sentences[start:])
        asked = (
            rng.choice(("Continue this story: ", "Finish this story: ", "Go on with this story: ", "Continue: ", ""))
            + head
        )
    elif rng.random() < 0.02:
        asked = rng.choice(
            ("Once upon a time", "Once upon a time...", "Once upon a time, there was", "Begin with: Once upon a time.")
        )
        story = tell(rng, Wish())
        text = story.text
    turns = [Message("user", roughen(rng, asked)), Message("assistant", text)]
    continued = False
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 3))):
        roll = rng.random()
        if roll < 0.3:
            asked, text = rng.choice(NEXT), sequel(rng, story, first=not continued)
            continued = True
        elif roll < 0.75:
            asked, text = story_question(rng, story)
        else:
            wish = replace(story.wish, length=rng.choice(("short", "medium")))
            asked = rng.choice(ANOTHER)
            if wish.kinds and rng.random() < 0.4:
                it = article(wish.kinds[0])
                asked, wish = rng.choice(SAME).replace("{it}", it), Wish(kinds=wish.kinds[:1], length=wish.length)
            else:
                wish = Wish(length=wish.length)
            story, continued = tell(rng, wish), False
            text = story.text
        turns += [Message("user", roughen(rng, asked)), Message("assistant", text)]
    return turns


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?]) ", text)[0]


def answer_turns(rng: random.Random, *, brief: bool = False) -> list[Message]:
    turns = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        asked, text = answer(rng)
        if brief and "\n" not in text:
            text = _first_sentence(text)
        if rng.random() < 0.1:
            asked = (
                rng.choice(
                    (
                        "Please tell me: ",
                        "Hello! ",
                        "Question: ",
                        "Hey, ",
                        "Hi. ",
                        "Another question: ",
                        "Can you tell me? ",
                    )
                )
                + asked
            )
        turns += [Message("user", roughen(rng, asked)), Message("assistant", text)]
    return turns


def conversation(rng: random.Random) -> list[Message]:
    """A conversation of one to eight turns, with or without a system message."""
    brief = False
    messages = []
    if rng.random() < 0.25:
        brief = rng.random() < 0.3
        lines = rng.sample(SYSTEM_MESSAGES, rng.choice((0, 1, 2) if brief else (1, 1, 2, 3)))
        messages.append(Message("system", " ".join(lines + rng.sample(BRIEF_MESSAGES, int(brief)))))
    if rng.random() < 0.02:
        asked = rng.choice(NEXT + ANOTHER)
        text = f"I have not told you a story yet. Here is one. {tell(rng, Wish(length='short')).text}"
        messages += [Message("user", roughen(rng, asked)), Message("assistant", text)]
    elif rng.random() < 0.02:
        name = rng.choice(w.GIRLS + w.BOYS)
        messages = [
            Message(
                "system",
                rng.choice(("Your name is {}.", "You are {}.", "You are an assistant called {}.")).format(name),
            )
        ]
        asked = rng.choice(("What is your name?", "Who are you?", "What are you called?"))
        messages += [
            Message("user", roughen(rng, asked)),
            Message("assistant", f"I am {name}, a very small language model."),
        ]
    elif rng.random() < 0.02:
        words = tell(rng, Wish()).text.split()
        task = rng.choice(("Summarize", "Translate", "Rewrite", "Correct", "Explain", "Analyze", "Improve"))
        asked = (
            f"{task} {rng.choice(('this', 'this text', 'the following text'))}: {' '.join(words[: rng.randint(5, 60)])}"
        )
        messages += [Message("user", asked), Message("assistant", choose(rng, rng.choice(SORRY)))]
    for _ in range(rng.choices((1, 2, 3), (6, 2, 1))[0]):
        messages += (story_turns if rng.random() < 0.5 else answer_turns)(rng, brief=brief)
    return messages


def echo_turns(rng: random.Random) -> list[Message]:
    turns = []
    for _ in range(rng.randint(1, 3)):
        asked, text = echo(rng)
        turns += [Message("user", asked), Message("assistant", text)]
    return turns


def document(rng: random.Random) -> str:
    """One training document: mostly a conversation, sometimes plain text, as a completion continues it."""
    roll = rng.random()
    if roll < 0.83:
        return render(conversation(rng))
    if roll < 0.86:
        return render(echo_turns(rng))
    if roll < 0.97:
        text = tell(rng, shuffle_wish(rng)).text
        if rng.random() < 0.4:  # a completion may begin anywhere
            sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
            text = " ".join(sentences[rng.randrange(len(sentences) - 1) :])
        return f"{BEGIN}{text}{END}"
    parts = [answer(rng) for _ in range(rng.randint(1, 3))]
    return BEGIN + " ".join(text for _, text in parts) + END


def documents(seed: int, primer: int = 0) -> Iterator[str]:
    """Documents without end, always the same for the same arguments; the first `primer` of them are mostly echoes."""
    rng = random.Random(seed)  # noqa: S311 (not for secrets: the text must come out the same every time)
    for _ in range(primer):
        yield render(echo_turns(rng)) if rng.random() < 0.85 else document(rng)
    while True:
        yield document(rng)


def vocabulary(documents_read: int = 6000, seed: int = 1) -> set[str]:
    """The words, in lower case, that the assistant uses in this many documents."""
    rng = random.Random(seed)  # noqa: S311 (not for secrets: the text must come out the same every time)
    words: set[str] = set()
    for _ in range(documents_read):
        for message in conversation(rng):
            if message.role == "assistant":
                words.update(re.findall(r"[a-z]+", message.content.lower()))
    words.update(name.lower() for name in w.GIRLS + w.BOYS)
    return words
