"""Who is refused, when and how it is said: queue, shares, rates, deadlines, keys as tenants; and who is not harmed."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_world import Server, events

# 64 choices take all places of an iteration for as long as they last.
CROWD = {"prompt": "The", "max_tokens": 400, "ignore_eos": True, "seed": 1, "n": 64, "stream": True}
SLOW = ("--step-seconds", "0.02", "--blocks", "2048")
SMALL = {"prompt": [5, 6, 7], "max_tokens": 2}


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def metric(client: httpx.Client, name: str, reason: str | None = None) -> float:
    start = f"vllm:{name}{{"
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(start)]
    return sum(float(line.split()[-1]) for line in lines if reason is None or f'reason="{reason}"' in line)


@contextmanager
def crowded(client: httpx.Client, n: int = 64) -> Iterator[None]:
    """While all places are taken: whoever comes has to wait."""
    with client.stream("POST", "/v1/completions", json={**CROWD, "n": n}) as response:
        assert response.status_code == 200
        parts = response.iter_raw()  # kept, since its end is the connection's
        next(parts)
        # Those of the crowd that have not begun wait, too, and whoever comes might be refused for it.
        wait_for(lambda: metric(client, "num_requests_running") >= n)
        yield


class Asking:
    """A request that is answered some time. Owner of its thread."""

    def __init__(self, server: Server, body: dict[str, Any], **headers: str) -> None:
        self._ask = lambda: httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
        self._answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._answer = self._ask()

    def answer(self) -> httpx.Response:
        self._thread.join(60)
        assert self._answer is not None
        return self._answer


def refused(response: httpx.Response, code: str) -> httpx.Response:
    assert response.status_code == 429, response.text
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", code)
    seconds, milliseconds = int(response.headers["retry-after"]), int(response.headers["retry-after-ms"])
    assert 1000 * (seconds - 1) < milliseconds <= 1000 * seconds
    assert response.headers["x-should-retry"] == "true"
    return response


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_full_queue_is_told_before_the_body_is_read_and_the_connection_is_left_usable(model_dir: Path) -> None:
    limits = {"max_queue_requests": 2}
    with Server(model_dir, *SLOW, limits=limits).ready() as server, server.client() as client:
        with crowded(client):
            waiting = [Asking(server, SMALL) for _ in range(2)]
            wait_for(lambda: metric(client, "num_requests_waiting") == 2)
            refused(client.post("/v1/completions", json=SMALL), "queue_full")
            refused(client.post("/v1/chat/completions", content=b"no JSON at all"), "queue_full")
            assert client.get("/version").status_code == 200
            assert client.post("/tokenize", json={"prompt": "x"}).status_code == 200
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as raw:
                body = b"x" * 200_000
                length = f"content-length: {len(body)}"
                head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n{length}\r\n\r\n".encode()
                raw.sendall(head)
                assert b" 429 " in read_response(raw), "not a byte of the body has been sent"
                raw.sendall(body + b"GET /version HTTP/1.1\r\nhost: localhost\r\n\r\n")
                answer = read_response(raw)
                assert b" 200 " in answer.splitlines()[0]
                assert b'"version"' in answer
                raw.sendall(head.replace(b"\r\nhost", b"\r\nexpect: 100-continue\r\nhost"))
                answer = read_response(raw)
                assert b" 429 " in answer.splitlines()[0]
                assert b"connection: close" in answer
                assert raw.recv(100) == b""
            with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as raw:
                raw.sendall(head.replace(str(len(body)).encode(), str(1 << 40).encode()))
                assert b" 413 " in read_response(raw).splitlines()[0]
            assert metric(client, "admission_rejections_total", "queue_full") == 4
        assert [one.answer().status_code for one in waiting] == [200, 200]
        wait_for(lambda: metric(client, "num_requests_waiting") == metric(client, "num_requests_running") == 0)
        assert client.post("/v1/completions", json=SMALL).status_code == 200


def read_response(raw: socket.socket) -> bytes:
    """One whole response, by its content-length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += raw.recv(4096)
    head, _, rest = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(rest) < length:
        rest += raw.recv(4096)
    assert len(rest) == length
    return head + b"\r\n\r\n" + rest


def test_a_prompt_that_cannot_fit_is_told_before_it_is_tokenised(model_dir: Path) -> None:
    limits = {"max_queue_tokens": 100}
    with Server(model_dir, *SLOW, limits=limits).ready() as server, server.client() as client:
        with crowded(client):
            waiting = Asking(server, {**SMALL, "prompt": [5] * 60})
            wait_for(lambda: metric(client, "num_requests_waiting") == 1)
            for prompt in ([5] * 41, [[5] * 20, [6] * 21], "word " * 90):
                refused(client.post("/v1/completions", json={**SMALL, "prompt": prompt}), "queue_full")
            refused(client.post("/v1/completions", json={**SMALL, "prompt": [5] * 21, "n": 2}), "queue_full")
            far = client.post("/v1/completions", json={**SMALL, "prompt": [5] * 600})
            assert (far.status_code, far.json()["error"]["code"]) == (400, "context_length_exceeded"), "for good"
            cut = Asking(server, {**SMALL, "prompt": [5] * 41, "truncate_prompt_tokens": 40})
            wait_for(lambda: metric(client, "num_requests_waiting") == 2)
        assert waiting.answer().status_code == cut.answer().status_code == 200


def test_streams_in_progress_do_not_notice(model_dir: Path) -> None:
    limits = {"max_queue_requests": 1}
    body = {"prompt": "The fox", "max_tokens": 200, "ignore_eos": True, "seed": 3}
    step = ("--step-seconds", "0.005", "--blocks", "2048")
    with Server(model_dir, *step, limits=limits).ready() as server, server.client() as client:
        alone = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            with crowded(client, n=63):
                wait_for(lambda: metric(client, "num_requests_running") == 64)
                waiting = Asking(server, SMALL)
                wait_for(lambda: metric(client, "num_requests_waiting") == 1)
                for _ in range(75):
                    assert client.post("/v1/completions", json=SMALL).status_code == 429

            class Rest:
                def iter_lines(self) -> list[str]:
                    return [first, *lines]

            text = "".join(chunk["choices"][0]["text"] for chunk in events(Rest()))
        assert text == alone
        assert waiting.answer().status_code == 200


def test_a_key_is_a_tenant_that_nobody_can_forge(model_dir: Path) -> None:
    http = {"api_keys": ["alice=secret-a", "bob=secret-b", "secret-c="]}
    limits = {"max_queue_requests": 4}
    server = Server(model_dir, *SLOW, http=http, limits=limits).ready()
    with server, server.client(headers=bearer("secret-b")) as bob, server.client(headers=bearer("secret-a")) as alice:
        assert alice.get("/version", headers=bearer("alice=secret-a")).status_code == 401, "the name is no key"
        assert alice.get("/version", headers=bearer("secret-c=")).status_code == 200
        with crowded(bob):
            waiting = [Asking(server, {**SMALL, "user": f"user {n}"}, **bearer("secret-a")) for n in range(2)]
            wait_for(lambda: metric(bob, "num_requests_waiting") == 2)
            refused(alice.post("/v1/completions", json={**SMALL, "user": "bob"}), "tenant_queue_full")
            # A body is not needed to know it.
            refused(alice.post("/v1/completions", content=b"no JSON"), "tenant_queue_full")
            waiting.append(Asking(server, {**SMALL, "user": "alice"}, **bearer("secret-b")))
            wait_for(lambda: metric(bob, "num_requests_waiting") == 3)
            assert metric(bob, "admission_rejections_total", "tenant_queue_full") == 2
        assert [one.answer().status_code for one in waiting] == [200] * 3


def test_without_keys_the_user_is_the_tenant_and_one_key_is_no_tenant_among_others(model_dir: Path) -> None:
    limits = {"max_queue_requests": 4}
    with Server(model_dir, *SLOW, limits=limits).ready() as server, server.client() as client:
        with crowded(client):
            waiting = [Asking(server, {**SMALL, "user": "a"}) for _ in range(2)]
            wait_for(lambda: metric(client, "num_requests_waiting") == 2)
            refused(client.post("/v1/completions", json={**SMALL, "user": "a"}), "tenant_queue_full")
            waiting += [Asking(server, SMALL) for _ in range(2)]
            wait_for(lambda: metric(client, "num_requests_waiting") == 4)
            refused(client.post("/v1/completions", json={**SMALL, "user": "b"}), "queue_full")
        assert [one.answer().status_code for one in waiting] == [200] * 4
    with Server(model_dir, *SLOW, http={"api_keys": ["k"]}, limits=limits).ready() as server:
        with server.client(headers=bearer("k")) as client, crowded(client):
            waiting = [Asking(server, SMALL, **bearer("k")) for _ in range(4)]
            wait_for(lambda: metric(client, "num_requests_waiting") == 4)
            refused(client.post("/v1/completions", json=SMALL), "queue_full")
        assert [one.answer().status_code for one in waiting] == [200] * 4


def test_keys_share_no_prefixes(model_dir: Path) -> None:
    http = {"api_keys": ["one", "two", "team=three", "team=four"]}
    with Server(model_dir, http=http).ready() as server, server.client() as client:

        def cached(key: str, **fields: Any) -> int:
            body = {"prompt": list(range(2, 66)), "max_tokens": 1, **fields}
            answer = client.post("/v1/completions", json=body, headers=bearer(key)).json()
            return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert [cached("one"), cached("one"), cached("two"), cached("two")] == [0, 48, 0, 48]
        assert [cached("three"), cached("four")] == [0, 48], "two keys of one tenant"
        assert [cached(key, cache_salt="s") for key in ("one", "two", "one")] == [0, 0, 48]


def test_the_sdk_waits_for_as_long_as_a_rate_says(model_dir: Path) -> None:
    limits = {"tenant_requests_per_minute": 60}
    with Server(model_dir, limits=limits).ready() as server, server.client() as client:
        answers = (client.post("/v1/completions", json={**SMALL, "user": "a"}) for _ in range(600))
        answer = next(answer for answer in answers if answer.status_code != 200)
        assert int(refused(answer, "rate_limit_exceeded").headers["retry-after-ms"]) <= 1000
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as sdk:
            assert sdk.completions.create(model="tiny", prompt="x", max_tokens=1, user="a").choices
        assert client.post("/v1/completions", json={**SMALL, "user": "b"}).status_code == 200
        assert 2 <= metric(client, "admission_rejections_total", "requests_per_minute") <= 4


def test_tokens_have_a_rate_too(model_dir: Path) -> None:
    with Server(model_dir, limits={"tenant_tokens_per_minute": 600}).ready() as server, server.client() as client:
        body = {"prompt": [5] * 300, "max_tokens": 200, "ignore_eos": True, "user": "a"}
        assert client.post("/v1/completions", json=body).status_code == 200
        answer = refused(client.post("/v1/completions", json=body), "rate_limit_exceeded")
        assert 5_000 < int(answer.headers["retry-after-ms"]) <= 20_000  # 200 are lacking, 10 come in a second
        assert metric(client, "admission_rejections_total", "tokens_per_minute") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_cannot_be_met_is_refused_at_the_door(model_dir: Path, stream: bool) -> None:
    # A place should become free after 0.7 s: long enough that nobody is late before the server has read so far.
    server = Server(model_dir, "--step-seconds", "0.1", "--blocks", "2048").ready()
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with server, server.client() as client, sdk, crowded(client):
        wishes = {"model": "tiny", "prompt": "x", "max_tokens": 1, "stream": stream}
        with pytest.raises(openai.RateLimitError) as full:
            sdk.completions.create(**wishes, extra_headers={"x-slo-ttft-ms": "150"})
        assert full.value.code == "deadline_unreachable"
        assert int(full.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            sdk.completions.create(**wishes, extra_body={"timeout": 0.15})
        assert metric(client, "admission_rejections_total", "deadline_unreachable") == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_that_passes_in_the_queue_is_told_once_with_a_status(model_dir: Path, stream: bool) -> None:
    """The SDK, which asks again after a 408, is told that nobody wants that."""
    with Server(model_dir, "--step-seconds", "1.5").ready() as server, server.client() as client:
        first = Asking(server, {**SMALL, "max_tokens": 1})
        time.sleep(0.3)  # its iteration is under way, and lasts
        began = time.monotonic()
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2)
        with sdk, pytest.raises(openai.APIStatusError) as late:
            sdk.completions.create(
                model="tiny", prompt="x", max_tokens=1, stream=stream, extra_headers={"x-slo-ttft-ms": "300"}
            )
        assert late.value.status_code == 408
        assert late.value.code == "deadline_passed"
        assert late.value.response.headers["x-should-retry"] == "false"
        assert 0.29 < time.monotonic() - began < 1.2
        assert metric(client, "admission_rejections_total", "deadline_passed") == 1, "it was not asked again"
        assert first.answer().status_code == 200


def test_a_timeout_ends_what_runs(model_dir: Path) -> None:
    body = {"prompt": "The", "max_tokens": 80, "ignore_eos": True, "seed": 1}
    with Server(model_dir, "--step-seconds", "0.01").ready() as server, server.client() as client:
        whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        answer = client.post("/v1/completions", json={**body, "timeout": 0.3})
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        with client.stream("POST", "/v1/completions", json={**body, "timeout": 0.3, "stream": True}) as response:
            assert response.status_code == 200
            chunks = events(response)
        assert chunks[-1]["error"]["code"] == "timeout"
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])
        assert text
        assert whole.startswith(text)
        assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1]), "it did not end by itself"
        assert client.post("/v1/completions", json={**body, "timeout": 60}).json()["choices"][0]["text"] == whole
        wait_for(lambda: metric(client, "kv_cache_usage_perc") == 0)
        ended = 'vllm:request_success_total{finished_reason="timeout",model_name="tiny"} 2.0'
        assert ended in client.get("/metrics").text


def test_terms_are_checked(client: httpx.Client) -> None:
    for value in ("0", "-5", "soon", "nan", "inf", ""):
        answer = client.post("/v1/completions", json=SMALL, headers={"x-slo-ttft-ms": value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-slo-ttft-ms"), value
    for field, value in (("timeout", 0), ("timeout", -1), ("timeout", "1"), ("priority", 1 << 40)):
        answer = client.post("/v1/completions", json={**SMALL, field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    good = {**SMALL, "timeout": 30.5, "priority": -7, "user": "x" * 5000}
    assert client.post("/v1/completions", json=good, headers={"x-slo-ttft-ms": "30000.5"}).status_code == 200
    document = json.dumps(client.get("/openapi.json").json())
    assert "x-slo-ttft-ms" in document
    assert client.post("/v1/completions%0A", json=SMALL).status_code == 404, "almost a path is none"


def test_keys_that_cannot_be_told_apart_end_the_start(model_dir: Path) -> None:
    for keys in (["k", "k"], ["a=k", "b=k"], ["k", "a=k"]):
        with Server(model_dir, http={"api_keys": keys}) as server:
            _, err = server.process.communicate(timeout=20)
            assert server.process.returncode == 1
            assert "given twice" in err


def test_bodies_that_come_at_the_same_time_are_bounded(model_dir: Path) -> None:
    """And small ones have room of their own, whoever may be slow."""
    most = 1 << 20
    with Server(model_dir, http={"max_body_bytes": most}).ready() as server, server.client() as client:
        port = int(server.url.rpartition(":")[2])
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {most}\r\n\r\n".encode()
        slow: list[socket.socket] = []

        def hold() -> None:
            """Four bodies are nearly there; who was refused, since another was being read, comes again."""
            for connection in select.select(slow, [], [], 0)[0]:
                slow.remove(connection)
                connection.close()
            while len(slow) < 4:
                slow.append(socket.create_connection(("127.0.0.1", port)))
                slow[-1].sendall(head + b" " * (most - 1))

        def status(size: int) -> httpx.Response:
            padded = json.dumps({"prompt": [5], "max_tokens": 1}).encode().ljust(size)
            return client.post("/v1/completions", content=padded)

        end = time.monotonic() + 20
        hold()
        while (refused := status(most // 2)).status_code == 200:  # until the server has read what the slow ones sent
            assert time.monotonic() < end
            hold()
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1, refused.text
        assert status(1000).status_code == 200
        for connection in slow:
            connection.close()
        while status(most // 2).status_code == 429:
            assert time.monotonic() < end, "nothing is left of bodies whose clients have gone"
        assert status(most // 2).status_code == 200
