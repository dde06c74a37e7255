"""The rows R1, R2, R3, R11 and R13 at their short scale, and that their judges find what they are there to find."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
from api.api_world import Server, make_model

from torture import r01_crowd, r11_drain, r13_soak
from torture.asking import Ask, Choice, Reply, faults
from torture.rows import Setup
from torture.shrink import shrink
from torture.slopes import ends, slope


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return Setup("short", seed, tmp_path, sizes={"shrinks": 0, "requests": 90, "solos": 24})


def test_a_crowd_leaves_nothing_and_gets_what_each_gets_alone(setup: Setup) -> None:
    for outcome in r01_crowd.torture(setup):
        print(outcome.line())
        assert outcome.is_met, (outcome.figure, outcome.trace)


def test_a_drain_ends_every_stream(setup: Setup) -> None:
    [outcome] = r11_drain.torture(setup)
    print(outcome.line())
    assert outcome.is_met, (outcome.figure, outcome.trace)


def test_a_soak_has_right_answers_whoever_is_killed(setup: Setup) -> None:
    few = {"kinds": 12, "probe": 1, "seconds": 5, "kill_every": 3}
    [outcome] = r13_soak.torture(dataclasses.replace(setup, sizes=few))
    print(outcome.line())
    assert outcome.is_met, (outcome.figure, outcome.trace)
    kinds = {json.loads(line)["kind"] for line in (setup.folder / "soak.jsonl").read_text().splitlines()}
    assert kinds == {"memory", "killed"}


def test_a_server_of_any_make_is_asked_by_its_url(setup: Setup, tmp_path: Path) -> None:
    """Of this project's frontend, over an engine of n-grams, all of it can be asked, even its end."""
    with Server(make_model(tmp_path / "model")).ready() as server:
        sizes = {"pid": server.process.pid, "requests": 40, "solos": 10, "warm": 16, "lead": 1}
        asked = dataclasses.replace(setup, url=server.url, sizes=sizes)
        outcomes = [*r01_crowd.torture(asked), *r11_drain.torture(asked)]
        assert server.process.wait(60) == 0
    for outcome in outcomes:
        print(outcome.line())
        assert outcome.is_met, (outcome.figure, outcome.trace)
    assert [outcome.row.name for outcome in outcomes] == ["R1", "R2", "R3", "R11"]
    [unasked] = r11_drain.torture(dataclasses.replace(asked, sizes={}))
    assert unasked.is_met is None, "who gives no process id does not want the server ended"


# -- the judges ------------------------------------------------------------------------------------------------------


ASK = Ask(0, "completions", {"prompt": "x", "max_tokens": 3, "n": 1, "stream": True})
CHUNKS = [
    {"choices": [{"index": 0, "text": "a", "token_ids": [1], "finish_reason": None}]},
    {"choices": [{"index": 0, "text": "b", "token_ids": [2], "finish_reason": None}]},
    {"choices": [{"index": 0, "text": "c", "token_ids": [3], "finish_reason": "length"}]},
    {"choices": [], "usage": {"completion_tokens": 3}},
]


def taken(*chunks: dict) -> Reply:
    """A stream of these that came to its end."""
    reply = Reply(status=200)
    for chunk in chunks:
        reply.take(chunk)
    reply.is_whole = reply.error is None
    return reply


def test_a_right_stream_is_right() -> None:
    right = taken(*CHUNKS)
    assert faults(ASK, right) == []
    assert right.differs(right) is None
    assert taken(*CHUNKS[:1]).differs(right) is None


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([*CHUNKS[:1], *CHUNKS], "4 of 3 tokens"),
        ([*CHUNKS[1:]], "2 of 3 tokens"),
        ([*CHUNKS[:3], CHUNKS[2], CHUNKS[3]], "goes on after its finish"),
        ([*CHUNKS[:2], CHUNKS[3]], "finished by None"),
        ([CHUNKS[3]], "choices []"),
        ([*CHUNKS[:3], {"choices": [], "usage": {"completion_tokens": 2}}], "usage says 2"),
        ([*CHUNKS[:2], {"error": {"code": "internal_error"}}], "internal_error"),
    ],
    ids=["repeated", "lost", "two finishes", "no finish", "no choice", "usage", "error"],
)
def test_what_no_server_may_do_is_seen(chunks: list[dict], said: str) -> None:
    assert said in "; ".join(faults(ASK, taken(*chunks)))


@pytest.mark.parametrize(
    "other",
    [
        Choice("abc", [1, 2, 4], finish="length"),
        Choice("abd", [1, 2, 3], finish="length"),
        Choice("abc", [1, 2, 3], finish="stop"),
        Choice("abc", [1, 2, 3], [-1.0], finish="length"),
    ],
    ids=["ids", "text", "finish", "log-probabilities"],
)
def test_what_differs_is_seen(other: Choice) -> None:
    whole = taken(*CHUNKS)
    assert Reply(200, choices={0: other}, is_whole=True).differs(whole)
    assert Reply(200, choices={0: Choice("ac", [1, 3])}).differs(whole), "a token was lost before the client left"


@pytest.mark.parametrize("culprits", [{3}, {3, 77}, {0, 1, 2}])
def test_shrinking_leaves_what_fails(culprits: set[int]) -> None:
    assert set(shrink(range(100), culprits.issubset, 200)) == culprits
    assert culprits <= set(shrink(range(100), culprits.issubset, 3)), "fewer tries leave more, never too little"


def test_growth_is_seen_through_lives() -> None:
    lives = [[(x, level + 0.5 * x) for x in range(begin, begin + 50)] for begin, level in ((0, 900), (60, 100))]
    assert slope(lives) == pytest.approx(0.5)
    assert slope([[(x, y - 0.5 * x) for x, y in life] for life in lives]) == pytest.approx(0)
    assert slope([[(1, 2)], []]) is None
    assert ends([(x, x // 50) for x in range(200)]) == (0, 3)
