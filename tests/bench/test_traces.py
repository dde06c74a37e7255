"""Published traces in their own formats: what is read, how it is scaled, and what prompts share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from orcaserve.bench.workloads import traces
from orcaserve.bench.workloads.spec import make

SEED = 7
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
2023-11-16 18:15:48.1805900,4000,1
2024-11-16 18:15:48.1805900,1,0"""
MOONCAKE = [
    {"timestamp": 0, "input_length": 1000, "output_length": 500, "hash_ids": [0, 1]},
    {"timestamp": 2999, "input_length": 1100, "output_length": 3, "hash_ids": [0, 1, 2]},
    {"timestamp": 3000, "input_length": 700, "output_length": 9, "hash_ids": [0, 3]},
    {"timestamp": 6000, "input_length": 513, "output_length": 9, "hash_ids": [4, 5]},
]


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "a+b,c.csv"
    path.write_text(AZURE)
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "mooncake.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in MOONCAKE))
    return path


def replay(text: str) -> list[tuple[float, int, int]]:
    items = make(text, vocab=3000, seed=SEED).items
    return [(round(item.at, 6), len(item.prompt_ids), item.max_tokens) for item in items]


def test_azure_is_read_in_the_order_of_arrival(azure: Path) -> None:
    *first, last = replay(f"azure:path={azure}")
    assert first == [(0.0, 374, 44), (1.5, 4000, 1), (4.0, 396, 109)]
    assert last[0] > 3e7 and last[1:] == (1, 1), "a request generates a token at least"


def test_azure_with_zones_and_a_mark_at_the_beginning_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2024-05-10 00:00:00.009930+00:00,2162,5\r\n", encoding="utf-8-sig"
    )
    assert replay(f"azure:path={path}") == [(0.0, 2162, 5)]


def test_a_scaled_trace(azure: Path) -> None:
    found = replay(f"azure:path={azure},n=3,speed=0.5,lengths=0.25,max-in=500,max-out=20,start=1")
    assert found == [(1.0, 94, 11), (4.0, 500, 1), (9.0, 99, 20)]


@pytest.mark.parametrize("lengths", [1, 0.5, 0.1, 0.037, 0.001, 2])
def test_mooncake_shares_the_beginnings_it_shared(lengths: float, mooncake: Path) -> None:
    items = make(f"mooncake:path={mooncake},lengths={lengths},spread=0", vocab=3000, seed=SEED).items
    assert [len(item.prompt_ids) for item in items] == [max(1, round(n * lengths)) for n in (1000, 1100, 700, 513)]
    a, b, c, d = (item.prompt_ids for item in items)
    assert a == b[: len(a)]
    block = round(512 * lengths)
    assert a[:block] == c[:block]
    if lengths >= 0.037:
        assert a[block : block + 8] != c[block : block + 8] and a[:8] != d[:8]


def test_mooncake_s_arrivals_are_dealt_out_over_their_three_seconds(mooncake: Path) -> None:
    assert [row.at for row in traces.mooncake(mooncake, random.Random(SEED), 0)] == [0, 2.999, 3, 6]
    for seed in range(50):
        first, second, third, fourth = (row.at for row in traces.mooncake(mooncake, random.Random(seed)))
        assert first == 0 < second <= third < 6 and third < fourth < 9, f"seed {seed}"
    lengths = [row.input_length for row in traces.mooncake(mooncake, random.Random(SEED))]
    assert lengths == [1000, 1100, 700, 513], "in the order in which they stand"
    text = f"mooncake:path={mooncake},max-in=600,n=2,speed=3"
    assert make(text, vocab=3000, seed=SEED) == make(text, vocab=3000, seed=SEED)
    assert [item[1:] for item in replay(text)] == [(600, 500), (600, 3)]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("azure", "a,b\n1,2", "is no trace of Azure: its first line should name TIMESTAMP, ContextTokens, Generated"),
        ("azure", "", "is no trace of Azure"),
        ("azure", AZURE + "\n\0", "is no trace of Azure"),
        ("azure", AZURE + "\nnever,1,2", "line 6 is no time and two numbers of tokens"),
        ("azure", AZURE + "\n2024-11-16 18:15:48,1", "line 6 is no time and two numbers of tokens"),
        ("azure", AZURE + "\n2024-11-16 18:15:48,-5,3", "line 6 has less than no tokens"),
        ("azure", AZURE + "\n2024-11-16 18:15:48,5,-3", "line 6 has less than no tokens"),
        ("azure", AZURE.splitlines()[0], "has no requests"),
        ("mooncake", "nonsense", "is no trace of Mooncake: line 1: JSON is malformed"),
        ("mooncake", '{"timestamp": 1}', "is no trace of Mooncake: line 1: Object missing required field"),
        ("mooncake", json.dumps(MOONCAKE[0] | {"timestamp": -5}), "line 1: a timestamp before the trace begins"),
        ("mooncake", json.dumps(MOONCAKE[0] | {"hash_ids": [1]}), "line 1: there must be a hash id for every 512"),
        ("mooncake", json.dumps(MOONCAKE[0] | {"input_length": -5, "hash_ids": []}), "line 1: less than no tokens"),
        ("mooncake", json.dumps(MOONCAKE[0] | {"output_length": -1}), "line 1: less than no tokens"),
    ],
)
def test_what_is_no_trace_says_so_in_one_line(kind: str, content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(ValueError) as raised:
        make(f"{kind}:path={path}", vocab=300, seed=0)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(OSError, match="nowhere"):
        make("azure:path=/nowhere/trace.csv", vocab=300, seed=0)
