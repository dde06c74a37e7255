"""Workloads are pure functions of a name, a seed and a round, with the lengths and arrivals that they promise."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcaserve.bench.workloads import LOWEST_ID, load, make, names, save

NAMES = st.one_of(
    st.integers(1, 40).map(lambda batch: f"decode-{batch}"),
    st.just("trace"),
    st.floats(0.01, 1e3).map(lambda rate: f"poisson-{rate:f}"),
)
SEEDS = st.integers(-(2**40), 2**40)


@given(name=NAMES, seed=SEEDS, round=st.integers(0, 9), requests=st.integers(1, 12), vocab=st.integers(200, 10**6))
def test_a_work_holds_what_its_name_says(name: str, seed: int, round: int, requests: int, vocab: int) -> None:
    work = make(name, vocab=vocab, seed=seed, round=round, requests=requests)
    assert work == make(name, vocab=vocab, seed=seed, round=round, requests=requests)
    assert work.name == name and name.startswith(work.kind)
    assert all(LOWEST_ID <= id < vocab for item in work.items for id in item.prompt_ids)
    arrivals = [item.at for item in work.items]
    assert arrivals == sorted(arrivals)
    if work.kind == "decode":
        assert len(work.items) == int(name.removeprefix("decode-"))
        assert {(len(item.prompt_ids), item.max_tokens) for item in work.items} == {(32, 128)}
    else:
        assert len(work.items) == requests
        assert all(32 <= len(item.prompt_ids) <= 512 and 1 <= item.max_tokens <= 128 for item in work.items)
    assert (arrivals[0] > 0) == (work.kind == "poisson")
    assert work.kind == "poisson" or not any(arrivals)


@given(name=NAMES, seed=SEEDS)
def test_rounds_differ_in_their_token_ids_alone(name: str, seed: int) -> None:
    first, second = (make(name, vocab=151936, seed=seed, round=round, requests=5) for round in (1, 2))
    for a, b in zip(first.items, second.items, strict=True):
        assert (a.at, len(a.prompt_ids), a.max_tokens) == (b.at, len(b.prompt_ids), b.max_tokens)
        assert a.prompt_ids[:16] != b.prompt_ids[:16], "a prefix cache must find nothing from the round before"


@given(name=NAMES, seed=SEEDS)
def test_what_is_saved_is_loaded(name: str, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    work = make(name, vocab=300, seed=seed, round=0, requests=3)
    path = tmp_path_factory.mktemp("work") / "work.jsonl"
    save(work, path)
    assert load(path) == work


def test_arrivals_come_at_their_rate() -> None:
    items = make("poisson-1.26", vocab=200, seed=1, round=0, requests=4000).items
    assert items[-1].at == pytest.approx(4000 / 1.26, rel=0.08)
    gaps = [b.at - a.at for a, b in itertools.pairwise(items)]
    assert statistics.stdev(gaps) == pytest.approx(1 / 1.26, rel=0.08), "exponential: as wide as its mean"
    assert statistics.mean(len(item.prompt_ids) for item in items) == pytest.approx(272, rel=0.05)
    assert statistics.mean(item.max_tokens for item in items) == pytest.approx(64.5, rel=0.05)


def test_names() -> None:
    assert names(["decode", "trace", " poisson"], [0.63, 1.26]) == [
        *("decode-1", "decode-4", "decode-16", "trace"),
        *("poisson-0.63", "poisson-1.26"),
    ]
    assert names(["decode-4", "decode"], []) == ["decode-4", "decode-1", "decode-16"]


@pytest.mark.parametrize("name", ["", "decode-", "decode-0", "decode-x", "trace-2", "poisson-0", "poisson--1", "chat"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="works are decode, trace and poisson"):
        names([name], [])
    with pytest.raises(ValueError, match="there is no work"):
        make(name, vocab=300, seed=0, round=0)


def test_another_process_makes_the_same() -> None:
    code = "from orcaserve.bench.workloads import make; print(make('trace', vocab=999, seed=5, round=2, requests=2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(make("trace", vocab=999, seed=5, round=2, requests=2))
