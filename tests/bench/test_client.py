"""The client against a real socket: what it counts and when, and what it says of faults."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sse_server import DONE, FakeServer, Script, steady, text, usage

from orcaserve.bench import measures
from orcaserve.bench.client import BenchError, Record, Reply, Server, asked, read, run, servers_from
from orcaserve.bench.client import send as send_replies
from orcaserve.bench.workloads import Item, Work, make


def work(*lengths: int, at: tuple[float, ...] = ()) -> Work:
    times = at or (0.0,) * len(lengths)
    return Work("test", "trace", tuple(Item(at, (7, 8, 9), n) for at, n in zip(times, lengths, strict=True)))


def send(server: FakeServer, work: Work, concurrency: int | None = None) -> list[Record]:
    return asyncio.run(run(Server("fake", server.url, "fake", concurrency=concurrency), work))


def one(answer: Any, length: int = 6) -> Record:
    with FakeServer(answer) as server:
        [record] = send(server, work(length))
    return record


def test_it_asks_for_exactly_what_the_work_says() -> None:
    with FakeServer(steady()) as server:
        items = make("trace", vocab=500, seed=3, round=0, requests=4).items
        records = send(server, Work("trace", "trace", items))
    sent = {json.dumps(body.pop("prompt")): body for body in server.bodies}
    for item, record in zip(items, records, strict=True):
        assert sent[json.dumps(item.prompt_ids)] == {
            "model": "fake",
            "max_tokens": item.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        assert (record.output_tokens, record.prompt_tokens) == (item.max_tokens, len(item.prompt_ids))
        assert (record.seen_prompt_tokens, record.counted, record.error) == (len(item.prompt_ids), "chunks", None)


def test_times_are_what_the_server_made_them() -> None:
    with FakeServer(steady(step=0.02, first=0.1)) as server:
        records = send(server, work(*[11] * 4))
    for record in records:
        assert record.due <= record.sent <= record.first - 0.1
        assert record.last - record.sent >= 0.1 + 10 * 0.02
        assert list(record.token_times) == sorted(record.token_times)
    # The delays dictate 200 tokens/s; a client that reads late bends that either way.
    assert 20 < (measures.decode_rate(records) or 0) < 2000
    assert measures.wall(records) >= 0.3


def test_arrivals_wait_for_nobody() -> None:
    with FakeServer(steady(first=0.5, step=0.01)) as server:
        records = send(server, work(9, 9, 9, at=(0.0, 0.05, 0.1)))
    assert server.most == 3
    for record, due in zip(records, (0.0, 0.05, 0.1), strict=True):
        assert record.due == due <= record.sent < record.first
    assert records[2].sent < records[0].last


def test_refusals_have_an_end_and_headers_are_passed_on() -> None:
    with FakeServer(lambda body: (429, {"error": {"message": "full"}})) as server:
        replies = [Reply(Item(0.0, (7,), 3)), Reply(Item(0.05, (7,), 3))]
        asyncio.run(send_replies(Server("fake", server.url, "fake"), replies, headers={"x-slo-ttft-ms": "250"}))
    assert all("\r\nx-slo-ttft-ms: 250\r\n" in head for head in server.heads)
    for record in (reply.record() for reply in replies):
        assert record.error_kind == "HTTP 429"
        assert record.ended is not None and record.retry_after is None
        assert record.due <= record.sent < record.ended


def test_a_limit_holds_requests_back_and_their_time_runs() -> None:
    with FakeServer(steady(step=0.02)) as server:
        records = send(server, work(*[3] * 6), concurrency=2)
    assert server.most == 2
    assert all(record.due == 0 for record in records)
    assert records[5].sent >= records[0].last, "the last two go when four have ended"


def test_sixty_four_at_once() -> None:
    with FakeServer(steady(first=1.0)) as server:
        records = send(server, work(*[2] * 64))
    assert server.most == 64
    assert [record.output_tokens for record in records] == [2] * 64


def test_token_ids_tell_how_many_tokens_a_chunk_has() -> None:
    def answer(body: dict[str, Any]) -> Script:
        chunks = [text("", token_ids=[5]), text("ab", token_ids=[5, 6, 7]), text("", token_ids=[8, 9])]
        return [*((0.02, chunk) for chunk in chunks), (0, usage(body)), (0, DONE)]

    record = one(answer)
    assert (record.counted, record.output_tokens) == ("ids", 6)
    a, b, c, d, e, f = record.token_times
    assert a < b == c == d < e == f


def test_several_tokens_in_a_chunk_without_ids_are_spread() -> None:
    def answer(body: dict[str, Any]) -> Script:
        chunks = [text("a"), text("bcd"), text("ef", finish_reason=None), text("", finish_reason="length")]
        return [*((0.02, chunk) for chunk in chunks), (0, usage(body)), (0, DONE)]

    record = one(answer)
    assert (record.counted, record.output_tokens) == ("usage", 6)
    assert len(set(record.token_times)) == 3, "the empty chunk at the end is no token"


def test_text_that_is_held_back_to_the_end_is_counted() -> None:
    def answer(body: dict[str, Any]) -> Script:
        return [*[(0.0, text(""))] * 3, (0.0, text("", finish_reason="length")), (0, usage(body)), (0, DONE)]

    record = one(answer)
    assert (record.counted, record.output_tokens, record.error) == ("usage", 6, None)


def test_what_the_server_already_knew_is_recorded() -> None:
    def answer(body: dict[str, Any]) -> Script:
        counts = {"completion_tokens": 1, "prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        return [(0, text("x")), (0, {"choices": [], "usage": counts}), (0, DONE)]

    record = one(answer, 1)
    assert (record.cached_tokens, record.seen_prompt_tokens, record.counted) == (2, 3, "chunks")


def test_without_usage_a_chunk_is_a_token() -> None:
    def answer(body: dict[str, Any]) -> Script:
        return [*[(0.0, text("x"))] * 6, (0, DONE)]

    assert (one(answer).counted, one(answer).output_tokens) == ("guess", 6)


def test_too_few_tokens_are_told_as_they_are() -> None:
    def answer(body: dict[str, Any]) -> Script:
        return [*[(0.0, text("x"))] * 4, (0, usage(body, 4)), (0, DONE)]

    record = one(answer)
    assert (record.output_tokens, record.max_tokens, record.error) == (4, 6, None)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"error": {"message": "token id 9 is\nout of range"}}), "HTTP 400: token id 9 is out of range (if"),
        ((404, {"error": "no such model"}), "HTTP 404: no such model (if the model's name is wrong, give URL#MODEL)"),
        ((422, {"detail": "prompt must be a string"}), "HTTP 422: prompt must be a string (its completions may not"),
        ((429, {"message": "full"}), "HTTP 429: full (its queue is full; bench compare takes --concurrency"),
        ((503, ["loading"]), "HTTP 503: ['loading'] (wait until the server is ready)"),
        ((500, {"error": {"message": "x" * 999}}), f"HTTP 500: {'x' * 290}… (the server's own log may say more)"),
        ([(0, text("x")), (0, {"error": {"message": "it\nbroke"}})], "the server gave up after 1 tokens: it broke"),
        ([(0, text("x")), (0, {"error": "it broke"})], "the server gave up after 1 tokens: it broke"),
        ([(0, text("x")), (0, None)], "the server cut the connection"),
        ([(0, b"data: {nonsense\n\n")], "the server sent an event that is no completion"),
        ([(0, DONE)], "the stream ended without a token"),
        ([], "the stream ended without a token"),
    ],
)
def test_faults_are_one_line_and_the_others_go_on(answer: Any, message: str) -> None:
    good = steady()
    with FakeServer(lambda body: answer if body["max_tokens"] == 9 else good(body)) as server:
        bad, *others = send(server, work(9, 3, 3))
    assert bad.error is not None and bad.error.startswith(message), bad.error
    assert "\n" not in bad.error
    assert [(other.output_tokens, other.error) for other in others] == [(3, None)] * 2


def test_nobody_there_is_one_line() -> None:
    [record] = asyncio.run(run(Server("gone", "http://127.0.0.1:9", "m"), work(3)))
    assert record.error == "nobody answers at http://127.0.0.1:9; is the server running there?"
    with pytest.raises(BenchError, match="gone: nobody answers"):
        asyncio.run(asked(Server("gone", "http://127.0.0.1:9")))


def test_the_model_is_asked_for_unless_it_is_named() -> None:
    with FakeServer(steady(), models={"data": [{"id": "first"}, {"id": "second"}]}) as server:
        assert asyncio.run(asked(Server("x", server.url))).model == "first"
        assert asyncio.run(asked(Server("x", server.url, "mine"))).model == "mine"
    with FakeServer(steady(), models={"models": []}) as server:
        with pytest.raises(BenchError, match=r"lists no model at /v1/models.*#MODEL"):
            asyncio.run(asked(Server("x", server.url)))
        assert asyncio.run(asked(Server("x", server.url, "mine"))).model == "mine"


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 4000), max_size=12),
    end=st.sampled_from([b"\n", b"\r\n"]),
    has_ids=st.booleans(),
)
def test_how_the_bytes_are_cut_does_not_matter(counts: list[int], cuts: list[int], end: bytes, has_ids: bool) -> None:
    item = Item(0.0, (1, 2), sum(counts))
    events = [text("é" * count, **({"token_ids": [7] * count} if has_ids else {})) for count in counts]
    events.append(usage({"prompt": [1, 2]}, sum(counts)))
    lines = [b": a comment", b"event: message"]
    lines += [b"data: " + json.dumps(event, ensure_ascii=False).encode() for event in events]
    stream = b"".join(line + end + end for line in [*lines, b"data: [DONE]"])
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in itertools.pairwise(places)]
    record = read(item, 0.5, [(1.0, piece) for piece in pieces])
    assert record == read(item, 0.5, [(1.0, stream)])
    assert record == read(item, 0.5, [(1.0, stream.rstrip())]), "the last line may lack its end"
    assert record.output_tokens == sum(counts)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=30), st.integers(1, 200))
def test_spread_times_are_times_of_chunks_from_the_first_to_the_last(ticks: list[int], count: int) -> None:
    arrived = [(float(tick), b"data: " + json.dumps(text("x")).encode() + b"\n\n") for tick in sorted(ticks)]
    closing = b"data: " + json.dumps(usage({"prompt": [1], "max_tokens": count})).encode() + b"\n\n"
    record = read(Item(0.0, (1,), count), 0.0, [*arrived, (2e6, closing)])
    assert record.output_tokens == count
    assert set(record.token_times) <= set(map(float, ticks))
    assert list(record.token_times) == sorted(record.token_times)
    assert record.first == min(ticks)
    assert count == 1 or record.last == max(ticks)


def test_servers_as_they_are_written() -> None:
    texts = ["ours=http://127.0.0.1:8000", "vllm=http://h:1/v1/", "llama.cpp=https://h/api/v1#org/m-1#x"]
    assert servers_from(texts, ["vllm=16"]) == (
        Server("ours", "http://127.0.0.1:8000"),
        Server("vllm", "http://h:1", concurrency=16),
        Server("llama.cpp", "https://h/api", "org/m-1#x"),
    )


@pytest.mark.parametrize(
    ("texts", "limits", "message"),
    [
        (["http://127.0.0.1:8000"], [], "NAME=URL"),
        (["ours=127.0.0.1:8000"], [], "NAME=URL"),
        (["[red]=http://h"], [], "NAME=URL"),
        (["a=http://h", "a=http://i"], [], "two servers"),
        (["a=http://h", "b=http://h/v1/"], [], "prefix cache"),
        (["a=http://h:99999999"], [], "not a URL"),
        (["a=http://h"], ["b=16"], "NAME=16"),
        (["a=http://h"], ["a=0"], "NAME=16"),
        (["a=http://h"], ["a"], "NAME=16"),
    ],
)
def test_what_names_no_server_is_refused(texts: list[str], limits: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        servers_from(texts, limits)
