"""Spans of requests at a real OTLP/HTTP receiver: their parents, phases and attributes, and a receiver that is down."""

from __future__ import annotations

import asyncio
import gzip
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_world import Server, free_port

pytest.importorskip("opentelemetry.sdk", reason="needs the extra orcaserve[otel]")
pb2 = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")

PHASES = ("queued", "prefill", "decode", "preempted")
SAID = "The quick brown secret"


class Receiver:
    """An OTLP/HTTP endpoint on a port of its own. Owner of the spans that came."""

    def __init__(self, port: int = 0) -> None:
        receiver = self
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Any] = []
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
                receiver.take(self.path, body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, path: str, body: bytes) -> None:
        self.paths.add(path)
        self.bodies.append(body)
        for of_resource in pb2.ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(values(of_resource.resource.attributes))
            for of_scope in of_resource.scope_spans:
                self.spans += of_scope.spans

    def forget(self) -> None:
        for known in (self.resources, self.spans, self.bodies, self.paths):
            known.clear()

    def roots(self, count: int) -> list[Any]:
        """The spans of requests, once there are so many."""
        end = time.monotonic() + 20
        while len(found := [span for span in list(self.spans) if span.name not in PHASES]) < count:
            assert time.monotonic() < end, f"{len(found)} of {count} came"
            time.sleep(0.05)
        return found

    def children(self, root: Any) -> list[Any]:
        found = [span for span in self.spans if span.parent_span_id == root.span_id]
        assert all(span.trace_id == root.trace_id and span.name in PHASES for span in found)
        return sorted(
            found, key=lambda span: (values(span.attributes)["orcaserve.choice.index"], span.start_time_unix_nano)
        )

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def values(attributes: Any) -> dict[str, Any]:
    return {pair.key: value(pair.value) for pair in attributes}


def value(any_value: Any) -> Any:
    kind = any_value.WhichOneof("value")
    found = getattr(any_value, kind)
    return [value(one) for one in found.values] if kind == "array_value" else found


def seconds(span: Any) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def standing(model_dir: Path) -> Iterator[tuple[Receiver, Server, int]]:
    """A receiver, a server that sends to it, and the server's gRPC port."""
    receiver, port = Receiver(), free_port()
    with serving(model_dir, receiver.url, "--step-seconds", "0.005", grpc_port=port) as server:
        yield receiver, server, port
    receiver.close()


@pytest.fixture
def traced(standing: tuple[Receiver, Server, int]) -> tuple[Receiver, Server, int]:
    """The same, and the receiver knows nothing of the tests before."""
    standing[0].forget()
    return standing


def serving(model_dir: Path, url: str, *engine: str, **http: Any) -> Server:
    return Server(model_dir, *engine, http={"otlp_traces_endpoint": url, **http}).ready()


def test_a_request_is_a_span_of_its_parent_and_its_phases_add_up(traced: tuple[Receiver, Server, int]) -> None:
    receiver, server, _ = traced
    name = server.model.name
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"prompt": SAID, "max_tokens": 12, "ignore_eos": True, "n": 2, "seed": 5, "temperature": 0.5}
    with server.client() as client:
        headers = {"traceparent": traceparent, "x-request-id": "order-66"}
        before = time.time()
        reply = client.post("/v1/completions", json={**body, "include_timing": True}, headers=headers).json()
        [root] = receiver.roots(1)
        after = time.time()
    assert receiver.paths == {"/v1/traces"}
    assert receiver.resources[0]["service.name"] == "orcaserve"
    assert root.trace_id.hex() == traceparent.split("-")[1] and root.parent_span_id.hex() == traceparent.split("-")[2]
    assert root.name == f"text_completion {name}" and root.kind == 2  # a server's
    assert before - 1 <= root.start_time_unix_nano / 1e9 <= root.end_time_unix_nano / 1e9 <= after + 1
    told = values(root.attributes)
    ttft = told.pop("gen_ai.response.time_to_first_chunk")
    assert 0.005 <= ttft <= seconds(root)
    assert told == {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "orcaserve",
        "gen_ai.request.model": name,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 12,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 50,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.seed": 5,
        "gen_ai.request.stream": False,
        "gen_ai.response.model": name,
        "gen_ai.response.id": "cmpl-order-66",
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": reply["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 24,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "orcaserve.preemptions": 0,
        "orcaserve.recomputed_tokens": 0,
        "orcaserve.swapped_tokens": 0,
    }
    children = receiver.children(root)
    assert len(children) == 6 and len(receiver.spans) == 7
    for index, timing in enumerate(reply["timing"]):
        mine = [span for span in children if values(span.attributes) == {"orcaserve.choice.index": index}]
        assert [span.name for span in mine] == ["queued", "prefill", "decode"]
        for span, part in zip(mine, ("queue", "prefill", "decode"), strict=True):
            assert seconds(span) == pytest.approx(timing[f"{part}_seconds"], abs=1e-5)
        ends, starts = [span.end_time_unix_nano for span in mine], [span.start_time_unix_nano for span in mine]
        assert all(abs(end - start) < 1000 for end, start in zip(ends, starts[1:], strict=False))
        assert root.start_time_unix_nano <= starts[0] and ends[-1] <= root.end_time_unix_nano + 100_000


def test_preemptions_stand_where_they_happened(model_dir: Path, receiver: Receiver) -> None:
    engine = ("--blocks", "14", "--step-seconds", "0.01", "--max-model-len", "200")

    def ask(index: int) -> Any:
        body = {"prompt": [7 + index] * 40, "max_tokens": 60, "ignore_eos": True, "include_timing": True}
        return client.post("/v1/completions", json=body, headers={"x-request-id": str(index)}).json()["timing"][0]

    with serving(model_dir, receiver.url, *engine) as server, server.client() as client:
        with ThreadPoolExecutor(4) as pool:
            timings = list(pool.map(ask, range(4)))
        roots = receiver.roots(4)
    assert any(timing["preemptions"] for timing in timings), "the cache is too large for this test"
    for root in roots:
        told = values(root.attributes)
        timing = timings[int(told["gen_ai.response.id"].removeprefix("cmpl-"))]
        children = receiver.children(root)
        for name, part in (("queued", "queue"), ("prefill", "prefill"), ("decode", "decode"), ("preempted", "lost")):
            total = sum(seconds(span) for span in children if span.name == name)
            assert total == pytest.approx(timing[f"{part}_seconds"], abs=1e-4)
        names = [span.name for span in children]
        assert told["orcaserve.preemptions"] == timing["preemptions"] >= names.count("preempted")
        assert names[0] == "queued" and all(one != other for one, other in pairwise(names))
        assert ("preempted" in names) == (timing["preemptions"] > 0)
        # Where it was in the midst of its tokens, it stands in the midst of its decode.
        assert names[-1] == "decode", names


def test_every_endpoint_and_every_end(traced: tuple[Receiver, Server, int]) -> None:
    receiver, server, _ = traced
    chat = {"messages": [{"role": "user", "content": SAID}], "max_tokens": 3, "ignore_eos": True, "stop": [SAID]}
    with server.client() as client:
        with client.stream("POST", "/v1/chat/completions", json={**chat, "stream": True}) as response:
            assert b"[DONE]" in response.read()
        assert client.post("/v1/responses", json={"input": SAID, "max_output_tokens": 2}).status_code == 200
        assert client.post("/v1/chat/completions", json={**chat, "temperature": SAID}).status_code == 400
        assert client.post("/v1/completions", json={"prompt": SAID, "model": "other"}).status_code == 404
        long = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=long) as gone:
            next(gone.iter_bytes())
        assert client.get("/v1/models").status_code == 200  # no request to the model, no span
    roots = sorted(receiver.roots(5), key=lambda root: root.start_time_unix_nano)
    streamed, responses, bad, unknown, left = [values(root.attributes) for root in roots]
    assert streamed["gen_ai.operation.name"] == "chat" and streamed["gen_ai.request.stream"]
    assert streamed["gen_ai.response.finish_reasons"] == ["length"] and streamed["gen_ai.usage.output_tokens"] == 3
    assert responses["http.route"] == "/v1/responses" and responses["gen_ai.response.id"].startswith("resp_")
    assert bad["error.type"] == "400" and "gen_ai.response.id" not in bad
    assert unknown["error.type"] == "404" and unknown["gen_ai.request.model"] == server.model.name
    assert left["error.type"] == "abort" and 0 < left["gen_ai.usage.output_tokens"] < 400
    assert [root.status.code for root in roots] == [0, 0, 2, 2, 2]
    assert len({root.trace_id for root in roots}) == 5 and not any(root.parent_span_id for root in roots)
    assert not any(b"secret" in body for body in receiver.bodies), "what was said is nobody's business"


def test_calls_of_grpc_have_spans_too(traced: tuple[Receiver, Server, int]) -> None:
    from test_rpc import Client, grpc

    receiver, _, port = traced
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with Client(f"127.0.0.1:{port}") as client:
        fields = {"text": SAID, "max_tokens": 3, "ignore_eos": True, "request_id": "call-1"}
        assert list(client.generate(**fields, metadata=[("traceparent", parent)]))[-1].usage.completion_tokens == 3
        with pytest.raises(grpc.RpcError):
            list(client.generate(**{**fields, "temperature": 9.0}))
        good, bad = sorted(receiver.roots(2), key=lambda root: root.start_time_unix_nano)
    assert good.trace_id.hex() == parent.split("-")[1] and good.parent_span_id.hex() == parent.split("-")[2]
    told = values(good.attributes)
    assert told["rpc.method"] == "orcaserve.v1.OrcaServe/Generate" and "http.route" not in told
    assert told["gen_ai.response.id"] == "call-1" and told["gen_ai.usage.output_tokens"] == 3
    assert [span.name for span in receiver.children(good)] == ["queued", "prefill", "decode"]
    assert values(bad.attributes)["error.type"] == "INVALID_ARGUMENT" and bad.status.code == 2


def test_who_is_not_sampled_has_no_spans_and_a_broken_parent_is_none(model_dir: Path, receiver: Receiver) -> None:
    parents = ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", "00-zz-b7ad6b7169203331-01", "\xff" * 300)
    with serving(model_dir, receiver.url) as server, server.client() as client:
        for parent in parents:
            headers = {"traceparent": parent.encode("latin-1")}
            assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers).is_success
        code, _, said = server.stop()  # what waits is sent before the end
        assert code == 0 and "Traceback" not in said, said
    assert len(receiver.roots(2)) == 2
    assert not any(root.parent_span_id for root in receiver.roots(2))


def test_a_receiver_that_is_down_is_told_once_and_counted(model_dir: Path) -> None:
    port = free_port()
    with serving(model_dir, f"http://127.0.0.1:{port}") as server, server.client() as client:

        def counted(outcome: str) -> float:
            lines = client.get("/metrics").text.splitlines()
            name = f'orcaserve:spans_total{{outcome="{outcome}"}} '
            return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

        def until(outcome: str, least: int) -> None:
            end = time.monotonic() + 30
            while counted(outcome) < least:
                assert time.monotonic() < end, client.get("/metrics").text
                time.sleep(0.1)

        def ask() -> httpx.Response:
            return client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2, "ignore_eos": True})

        assert ask().is_success
        until("failed", 4)
        assert ask().is_success
        until("failed", 8)
        receiver = Receiver(port)
        assert ask().is_success
        until("sent", 4)
        receiver.roots(1)
        receiver.close()
        assert ask().is_success
        began = time.monotonic()
        code, _, said = server.stop()
        assert code == 0 and time.monotonic() - began < 25, "it does not wait for who is down"
        assert said.count("takes no spans") == 2, said  # once for each time
        assert "Traceback" not in said and str(port) not in said


def test_an_endpoint_that_says_nothing_fills_the_queue_and_holds_nobody_up() -> None:
    from orcaserve.serve.request_trace import RequestTrace
    from orcaserve.serve.tracing import Tracing

    counts = Counter[str]()

    async def main(port: int) -> None:
        tracing = Tracing(
            f"http://127.0.0.1:{port}", "tiny", lambda outcome, count: counts.update({outcome: count}), 20
        )
        for _ in range(200):
            tracing.end(RequestTrace("chat", {}, {}), None)
        assert counts["dropped"] >= 160 and not counts["sent"]
        silent.close()
        await tracing.close()

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # who connects waits for an answer
        asyncio.run(main(silent.getsockname()[1]))
    assert counts.total() == 200 and not counts["sent"]


def test_an_endpoint_that_is_none_is_one_line(model_dir: Path) -> None:
    from orcaserve.serve.tracing import Tracing

    with Server(model_dir, http={"otlp_traces_endpoint": "grpc://127.0.0.1:4317"}) as server:
        _, said = server.process.communicate(timeout=60)
        assert server.process.returncode == 1
        assert said.count("\n") == 1 and "http://127.0.0.1:4318/v1/traces" in said, said
    for url in ("127.0.0.1:4318", "http://", "http://h:x", "http://h:0", "", "file:///tmp/x"):
        with pytest.raises(ValueError, match="HTTP, not gRPC"):
            Tracing(url, "tiny", lambda outcome, count: None)


def test_who_does_not_ask_for_it_loads_nothing_of_it() -> None:
    script = (
        "import sys, orcaserve.serve.server; print(sorted(n for n in sys.modules if n.startswith('opentelemetry')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_phases_keep_their_order_and_their_sums() -> None:
    from orcaserve.core.timing import Timing
    from orcaserve.serve.request_trace import ChoiceTrace

    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(200):
        choice, total = ChoiceTrace(), Timing(queue_seconds=rng.random())
        for _ in range(rng.randrange(1, 30)):
            lost = rng.random() if rng.random() < 0.2 else 0.0
            total += Timing(prefill_seconds=rng.choice([0, 0.5]), decode_seconds=rng.random(), lost_seconds=lost)
            choice.told(total)
        assert sum(seconds for _, seconds in choice.phases) == pytest.approx(total.seconds)
        names = [name for name, _ in choice.phases]
        assert all(one != other for one, other in pairwise(names)) and set(names) <= set(PHASES)
