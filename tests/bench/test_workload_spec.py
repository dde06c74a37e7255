"""Workloads as they are written: what they draw has the lengths and arrivals it should, and the same every time."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcaserve.bench.workloads import LOWEST_ID, Item, Work, load, save
from orcaserve.bench.workloads.kinds import KINDS
from orcaserve.bench.workloads.lengths import Lengths
from orcaserve.bench.workloads.spec import COMMON, KEYS, explained, make

SEED = 20221107  # of everything here that is about distributions
GENERATED = [name for name, kind in KINDS.items() if "path" not in kind.needs]

NUMBERS = st.integers(1, 400).map(lambda i: i / 8)
COUNTS = st.integers(1, 12)
LENGTHS = st.one_of(
    st.integers(1, 40).map(str),
    st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda of: f"{of[0]}-{of[0] + of[1]}"),
    st.tuples(st.integers(1, 90), st.integers(1, 90)).map(lambda of: f"exp{of[0]}max{of[1]}"),
)
VALUES = {"n": COUNTS, "sessions": COUNTS, "system": COUNTS, "in": LENGTHS, "out": LENGTHS, "turns": LENGTHS}


@st.composite
def a_part(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A kind and its options, in any order."""
    name = draw(st.sampled_from(GENERATED))
    more = draw(st.sampled_from([(), ("tenant",), ("start", "priority"), ("start", "tenant", "deadline")]))
    keys = draw(st.permutations([*KINDS[name].needs, *more]))
    values = VALUES | {"tenant": st.sampled_from(["a", "b.c@d"]), "priority": st.integers(-3, 3)}
    return name, {key: str(draw(values.get(key, NUMBERS))) for key in keys}


def written(*parts: tuple[str, dict[str, str]]) -> str:
    return " + ".join(f"{name}:{','.join(map('='.join, options.items()))}" for name, options in parts)


def draw(text: str, seed: int = SEED, vocab: int = 5000) -> tuple[Item, ...]:
    print(f"{text}, seed {seed}")
    return make(text, vocab=vocab, seed=seed).items


def gaps(items: tuple[Item, ...]) -> list[float]:
    return [b.at - a.at for a, b in itertools.pairwise(items)]


@given(parts=st.lists(a_part(), min_size=1, max_size=3), seed=st.integers(-(2**40), 2**40))
def test_a_text_is_what_it_says_and_always_the_same(parts: list[tuple[str, dict[str, str]]], seed: int) -> None:
    text = written(*parts)
    work = make(text, vocab=300, seed=seed)
    assert work == make(text, vocab=300, seed=seed)
    assert (work.name, work.kind) == (text, "load")
    assert [item.at for item in work.items] == sorted(item.at for item in work.items)
    assert all(LOWEST_ID <= id < 300 for item in work.items for id in item.prompt_ids)
    assert {item.tenant for item in work.items} == {options.get("tenant") for _, options in parts}
    assert {item.priority for item in work.items} == {int(options.get("priority", 0)) for _, options in parts}
    asked = {None if (within := options.get("deadline")) is None else float(within) for _, options in parts}
    assert {item.deadline for item in work.items} == asked
    assert min(item.at for item in work.items) >= min(float(options.get("start", 0)) for _, options in parts)
    if "chat" not in dict(parts):
        assert len(work.items) == sum(int(options["n"]) for _, options in parts)
    ranges = [
        (
            KEYS["out"].parse(options["out"]),
            KEYS["in"].parse(options["in"]),
            math.inf if name == "chat" else KEYS["in"].parse(options["in"]).high,
        )
        for name, options in parts
    ]
    for item in work.items:
        assert any(
            outputs.low <= item.max_tokens <= outputs.high and prompts.low <= len(item.prompt_ids) <= most
            for outputs, prompts, most in ranges
        )


@given(parts=st.lists(a_part(), min_size=1, max_size=2), seed=st.integers(0, 2**40), ids=st.booleans())
def test_what_is_saved_is_played_again(
    parts: list[tuple[str, dict[str, str]]], seed: int, ids: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    work = make(written(*parts), vocab=300, seed=seed)
    path = tmp_path_factory.mktemp("a folder, with commas + more") / "work.jsonl"
    save(work, path, ids=ids)
    again = make(f"saved:path={path}", vocab=300, seed=seed)
    if ids:
        assert load(path) == work and again.items == work.items
    for a, b in zip(work.items, again.items, strict=True):
        assert msgspec.structs.replace(a, prompt_ids=()) == msgspec.structs.replace(b, prompt_ids=())
        assert len(a.prompt_ids) == len(b.prompt_ids)
    first = make(f"saved:path={path},n=1,speed=2,tenant=me,start=3", vocab=300, seed=seed).items
    assert [(item.at, item.tenant) for item in first] == [(work.items[0].at / 2 + 3, "me")]


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.round-1.jsonl"
    path.write_text('{"name":"trace","kind":"trace"}\n{"at":0.0,"prompt_ids":[101,102],"max_tokens":5}\n')
    assert load(path) == Work("trace", "trace", (Item(0.0, (101, 102), 5),))
    save(load(path), tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


def test_the_paper_s_requests() -> None:
    items = draw("poisson:rate=1.26,in=32-512,out=1-128,n=4000")
    assert statistics.mean(gaps(items)) == pytest.approx(1 / 1.26, rel=0.05)
    assert statistics.stdev(gaps(items)) == pytest.approx(1 / 1.26, rel=0.08), "exponential: as wide as its mean"
    assert statistics.mean(len(item.prompt_ids) for item in items) == pytest.approx(272, rel=0.03)
    assert statistics.mean(item.max_tokens for item in items) == pytest.approx(64.5, rel=0.03)
    alike = draw("poisson:rate=1,in=32,out=32,n=9")
    assert {(len(item.prompt_ids), item.max_tokens) for item in alike} == {(32, 32)}


@pytest.mark.parametrize("limit", [32, 128, 512, 1536])
def test_a_burst_with_lengths_of_high_variance(limit: int) -> None:
    items = draw(f"burst:in=512,out=exp128max{limit},n=4000")
    assert {(item.at, len(item.prompt_ids)) for item in items} == {(0.0, 512)}
    lengths = [item.max_tokens for item in items]
    assert min(lengths) >= 1 and max(lengths) <= limit
    # of an exponential distribution under a condition: mean - limit / (e^(limit / mean) - 1)
    expected = 128 - limit / math.expm1(limit / 128)
    assert statistics.mean(lengths) == pytest.approx(expected, rel=0.06)
    if limit == 1536:
        assert statistics.stdev(lengths) == pytest.approx(128, rel=0.06)


@pytest.mark.parametrize("cv", [0.25, 1.0, 1.41, 4.0])
def test_gamma_arrivals_have_their_rate_and_variation(cv: float) -> None:
    found = gaps(draw(f"gamma:rate=5,cv={cv},in=1,out=1,n=20000"))
    assert statistics.mean(found) == pytest.approx(1 / 5, rel=0.03 * max(1, cv))
    assert statistics.stdev(found) / statistics.mean(found) == pytest.approx(cv, rel=0.05 * max(1, cv))


def test_on_and_off() -> None:
    items = draw("onoff:rate=20,on=3,off=27,in=1,out=1,n=6000")
    assert all(item.at % 30 <= 3 for item in items), "nobody comes in the pauses"
    assert items[-1].at == pytest.approx(6000 / (20 * 3 / 30), rel=0.05)
    assert statistics.stdev(gaps(items)) > 3 * statistics.mean(gaps(items)), "bursts"


def test_another_rate_leaves_lengths_and_changes_ids() -> None:
    slow, fast = (draw(f"poisson:rate={rate},in=32-512,out=1-128,n=40") for rate in (1, 4))
    for a, b in zip(slow, fast, strict=True):
        assert (a.at, len(a.prompt_ids), a.max_tokens) == (pytest.approx(b.at * 4), len(b.prompt_ids), b.max_tokens)
        assert a.prompt_ids[:16] != b.prompt_ids[:16]
    other = draw("poisson:rate=1,in=32-512,out=1-128,n=40", seed=SEED + 1)
    assert [item.at for item in other] != [item.at for item in slow]


def test_chats_repeat_what_was_said() -> None:
    text = "chat:sessions=30,rate=1,turns=2-5,think=8,system=50,in=10-20,out=5-9"
    items = draw(text)
    shared = items[0].prompt_ids[:50]
    assert all(item.prompt_ids[:50] == shared for item in items)
    chats: list[list[Item]] = []
    for item in items:
        for chat in chats:
            if item.prompt_ids[: len(chat[-1].prompt_ids)] == chat[-1].prompt_ids:
                said = len(item.prompt_ids) - len(chat[-1].prompt_ids) - chat[-1].max_tokens
                assert 10 <= said <= 20 and item.at > chat[-1].at
                chat.append(item)
                break
        else:
            assert 60 <= len(item.prompt_ids) <= 70
            chats.append([item])
    assert len(chats) == 30 and all(2 <= len(chat) <= 5 for chat in chats)
    pauses = [gap for chat in chats for gap in gaps(tuple(chat))]
    assert statistics.mean(pauses) == pytest.approx(8, rel=0.25)
    assert make(text, vocab=5000, seed=SEED).shares_prompts
    assert not make("burst:in=32,out=1,n=30", vocab=5000, seed=SEED).shares_prompts


def test_tenants_come_each_at_their_own_rate() -> None:
    items = draw(
        "poisson:rate=10,in=5,out=1,n=500,tenant=small + poisson:rate=1,in=50,out=9,n=50,tenant=big,start=10"
        " + burst:in=7,out=7,n=3"
    )
    small, big = ([item for item in items if item.tenant == name] for name in ("small", "big"))
    assert {len(item.prompt_ids) for item in small} == {5} and {len(item.prompt_ids) for item in big} == {50}
    assert small[-1].at == pytest.approx(50, rel=0.2) and big[-1].at == pytest.approx(60, rel=0.5)
    assert big[0].at >= 10 and [item.tenant for item in items[:3]] == [None] * 3
    twice = draw("poisson:rate=1,in=5-50,out=1,n=5,tenant=a + poisson:rate=1,in=5-50,out=1,n=5,tenant=a")
    assert len({item.at for item in twice}) == 10, "equal parts draw apart"


@given(st.text(max_size=12))
def test_lengths_are_read_as_they_print(text: str) -> None:
    try:
        lengths = Lengths.of(text)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert Lengths.of(str(lengths)) == lengths


@given(LENGTHS)
def test_lengths_print_as_they_are_read(text: str) -> None:
    low, _, high = text.partition("-")
    assert str(Lengths.of(text)) == (low if low == high else text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no workload '': it is KIND:key=value,… and kinds are burst, poisson, gamma, onoff, chat, azure"),
        ("dance:n=1", "there is no workload 'dance:n=1'"),
        ("poisson", "'poisson' lacks rate, in, out, n: it is written poisson:rate=2,in=32-512,out=1-128,n=100"),
        ("poisson:", "'poisson:' lacks rate"),
        ("poisson:rate=2,in=1,out=1", "'poisson:rate=2,in=1,out=1' lacks n: it is written poisson:"),
        ("poisson:2,in=1", "'2' in 'poisson:2,in=1' is not key=value, as in poisson:"),
        (
            "poisson:rate=2,cv=1",
            "poisson has no 'cv': it has rate, in, out, n, tenant, priority, deadline, start, as in poisson:",
        ),
        ("burst:in=1,in=2", "in stands twice in 'burst:in=1,in=2'"),
        ("burst:in=5-3,out=1,n=1", "in=5-3 cannot be read: in is 128 (always), 32-512 (uniform) or exp128max512"),
        ("burst:in=0,out=1,n=1", "in=0 cannot be read"),
        ("burst:in=exp0max9,out=1,n=1", "in=exp0max9 cannot be read"),
        ("burst:in=1,out=1,n=0", "n=0 cannot be read: n is a whole number from 1"),
        ("burst:in=1,out=1,n=1.5", "n=1.5 cannot be read"),
        ("burst:in=1,out=1,n=", "n= cannot be read"),
        ("burst:in=1,out=1,n=²", "n=² cannot be read"),
        ("poisson:rate=0,in=1,out=1,n=1", "rate=0 cannot be read: rate is a number above 0"),
        ("poisson:rate=nan,in=1,out=1,n=1", "rate=nan cannot be read"),
        ("poisson:rate=-1,in=1,out=1,n=1", "rate=-1 cannot be read"),
        ("burst:in=1,out=1,n=1,start=-1", "start=-1 cannot be read: start is a number from 0"),
        ("burst:in=1,out=1,n=1,tenant=a b", "tenant=a b cannot be read: tenant is a name"),
        ("burst:in=1,out=1,n=1 + dance:n=1", "there is no workload 'dance:n=1'"),
        ("burst:in=1,out=1,n=1 + ", "n=1 + cannot be read"),
        ("azure:n=1", "'azure:n=1' lacks path"),
    ],
)
def test_what_is_no_workload_says_so_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        make(text, vocab=300, seed=0)
    assert str(raised.value).startswith(message), raised.value
    assert "\n" not in str(raised.value)


@given(st.text(st.sampled_from("abcdefgnoiprstu:=,.+- 0123456789²"), max_size=30), st.sampled_from(GENERATED))
def test_whatever_is_written_is_read_or_refused(text: str, kind: str) -> None:
    for whole in (text, f"{kind}:{text}", f"{KINDS[kind].example},{text}"):
        try:
            make(whole, vocab=300, seed=0)
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    "lines",
    ["", "nonsense", '{"name":"x","kind":"load"}\n{"at":1}', '{"name":"x","kind":"load"}\n{"at":-1,"max_tokens":1}'],
)
def test_what_is_no_saved_workload_says_so(lines: str, tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match="is no saved workload: after 0 requests, "):
        make(f"saved:path={path}", vocab=300, seed=0)
    path.write_text('{"name":"x","kind":"load"}\n')
    with pytest.raises(ValueError, match="has no requests"):
        make(f"saved:path={path}", vocab=300, seed=0)


def test_every_kind_and_key_is_explained() -> None:
    assert set(KEYS) == {key for kind in KINDS.values() for key in (*kind.needs, *kind.optional)} | set(COMMON)
    help = "\n".join(explained())
    assert all(f"\n  {key} " in help for key in KEYS)
    for name, kind in KINDS.items():
        assert kind.example.startswith(f"{name}:") and kind.example in help
        if name in GENERATED:
            assert make(kind.example, vocab=300, seed=0).items


def test_another_process_draws_the_same() -> None:
    text = "chat:sessions=2,rate=1,turns=2,think=1,system=4,in=3,out=2 + gamma:rate=1,cv=2,in=1-9,out=1,n=3"
    code = f"from orcaserve.bench.workloads.spec import make; print(make({text!r}, vocab=999, seed=5))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(make(text, vocab=999, seed=5))
