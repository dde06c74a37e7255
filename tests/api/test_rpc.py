"""The gRPC endpoint through grpc's own client: the answers of the HTTP API, its errors as status codes."""

from __future__ import annotations

import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from api_world import Server, free_port

from orcaserve.serve import errors
from orcaserve.serve.stream import CutOff

grpc = pytest.importorskip("grpc", reason="needs the extra orcaserve[grpc]")
health_pb2 = pytest.importorskip("grpc_health.v1.health_pb2")
health_pb2_grpc = pytest.importorskip("grpc_health.v1.health_pb2_grpc")
reflection_pb2 = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2")
reflection_pb2_grpc = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2_grpc")

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: E402

from orcaserve.serve.rpc.service import _CODES  # noqa: E402

PROTO = Path(__file__).parent.parent.parent / "src" / "orcaserve" / "serve" / "rpc"
SERVICE = "orcaserve.v1.OrcaServe"
KEYS = ["ann=right", "bob=other"]


class Client:
    """What a client makes of the descriptor; `metadata` goes with every call."""

    def __init__(self, address: str, key: str | None = None, credentials: Any = None) -> None:
        files = descriptor_pb2.FileDescriptorSet.FromString((PROTO / "orcaserve.binpb").read_bytes())
        pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            pool.Add(file)
        self._pool = pool
        self.channel = grpc.secure_channel(address, credentials) if credentials else grpc.insecure_channel(address)
        self.metadata = [("authorization", f"Bearer {key}")] if key else []

    def type(self, name: str) -> Any:
        return message_factory.GetMessageClass(self._pool.FindMessageTypeByName(f"orcaserve.v1.{name}"))

    def generate(self, **fields: Any) -> Any:
        """The call, to be iterated over. timeout: in seconds."""
        timeout, metadata = fields.pop("timeout", None), fields.pop("metadata", [])
        call = self.channel.unary_stream(
            f"/{SERVICE}/Generate",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self.type("GenerateReply").FromString,
        )
        request = self.type("GenerateRequest")(**fields)
        return call(request, timeout=timeout, metadata=[*self.metadata, *metadata])

    def abort(self, request_id: str) -> bool:
        call = self.channel.unary_unary(
            f"/{SERVICE}/Abort",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self.type("AbortReply").FromString,
        )
        request = self.type("AbortRequest")(request_id=request_id)
        return bool(call(request, metadata=self.metadata, timeout=10).found)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def rpc(model_dir: Path, port: int) -> Iterator[Server]:
    """A server with keys, whose iterations take a while."""
    options = {"grpc_port": port, "api_keys": KEYS}
    with Server(model_dir, "--step-seconds", "0.005", http=options) as server:
        yield server.ready()


@pytest.fixture
def client(rpc: Server, port: int) -> Iterator[Client]:
    with Client(f"127.0.0.1:{port}", "right") as client:
        yield client


def over_http(rpc: Server, path: str, body: dict[str, Any]) -> Any:
    with rpc.client(headers={"Authorization": "Bearer right"}) as client:
        response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def fails(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


def trailing(error: Any) -> dict[str, str]:
    return dict(error.trailing_metadata())


def test_a_completion_is_that_of_http(rpc: Server, client: Client) -> None:
    body = {"max_tokens": 20, "seed": 3, "n": 2, "temperature": 0.7, "logprobs": 2, "ignore_eos": True}
    expected = over_http(rpc, "/v1/completions", {**body, "prompt": "The fox", "return_token_ids": True})
    *replies, last = client.generate(text="The fox", **body)
    assert not last.text and not last.token_ids
    assert last.usage.prompt_tokens == expected["usage"]["prompt_tokens"]
    assert last.usage.completion_tokens == expected["usage"]["completion_tokens"] == 40
    for index, choice in enumerate(expected["choices"]):
        own = [reply for reply in replies if reply.index == index]
        assert "".join(reply.text for reply in own) == choice["text"]
        assert [id for reply in own for id in reply.token_ids] == choice["token_ids"]
        entries = [entry for reply in own for entry in reply.logprobs]
        assert [entry.logprob for entry in entries] == choice["logprobs"]["token_logprobs"]
        assert all(len(entry.top) == 2 for entry in entries)
        assert [reply.finish_reason for reply in own if reply.finish_reason] == [choice["finish_reason"]]


def test_a_conversation_and_token_ids(rpc: Server, client: Client) -> None:
    said = [{"role": "user", "content": "Tell me about the fox"}]
    expected = over_http(rpc, "/v1/chat/completions", {"messages": said, "max_tokens": 15, "seed": 2})
    replies = list(client.generate(chat={"messages": said}, max_tokens=15, seed=2))
    assert "".join(reply.text for reply in replies) == expected["choices"][0]["message"]["content"]
    ids = [0, 5, 9, 77]
    expected = over_http(
        rpc, "/v1/completions", {"prompt": ids, "max_tokens": 5, "temperature": 0, "prompt_logprobs": 1}
    )
    replies = list(client.generate(token_ids={"ids": ids}, max_tokens=5, temperature=0, prompt_logprobs=1))
    assert "".join(reply.text for reply in replies) == expected["choices"][0]["text"]
    scores = [entry for reply in replies for entry in reply.prompt_logprobs]
    assert [entry.token_id for entry in scores] == ids[1:]
    biased = list(client.generate(text="x", max_tokens=3, temperature=0, logit_bias={42: 100}, ignore_eos=True))
    assert [id for reply in biased for id in reply.token_ids] == [42, 42, 42]
    stopped = list(client.generate(text="The fox", max_tokens=60, seed=3, stop=["e"]))
    assert "e" not in "".join(reply.text for reply in stopped)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "INVALID_ARGUMENT", "input"),
        ({"text": "x", "temperature": 3}, "INVALID_ARGUMENT", "temperature"),
        ({"text": "x", "n": 0}, "INVALID_ARGUMENT", "n"),
        ({"text": "x", "max_tokens": 100_000}, "INVALID_ARGUMENT", "input"),
        ({"token_ids": {"ids": [5, 400]}}, "INVALID_ARGUMENT", "input"),
        ({"chat": {}}, "INVALID_ARGUMENT", "chat.messages"),
        ({"text": "x", "choice": {}}, "INVALID_ARGUMENT", "choice"),
        ({"text": "x", "regex": "(a"}, "INVALID_ARGUMENT", "regex"),
        ({"text": "x", "request_id": "a b"}, "INVALID_ARGUMENT", "request_id"),
        ({"text": "x", "model": "other"}, "NOT_FOUND", "model"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_has_a_status(client: Client, fields: dict[str, Any], code: str, param: str) -> None:
    error = fails(client.generate(**fields))
    assert error.code() == grpc.StatusCode[code], error.details()
    assert trailing(error)["error-param"] == param
    assert "Traceback" not in error.details()


def test_whatever_cuts_a_response_off_has_a_status() -> None:
    for why in get_args(CutOff):
        assert errors.cut_off(why).status in _CODES, why


def test_keys(rpc: Server, port: int) -> None:
    for key in (None, "wrong"):
        with Client(f"127.0.0.1:{port}", key) as client:
            error = fails(client.generate(text="x", max_tokens=1))
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED
            assert trailing(error)["error-code"] == "invalid_api_key"
            with pytest.raises(grpc.RpcError) as caught:
                client.abort("x")
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            stub = health_pb2_grpc.HealthStub(client.channel)  # probes have no key
            assert stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status == 1


def wait_until_idle(rpc: Server) -> None:
    end = time.monotonic() + 20
    with rpc.client(headers={"Authorization": "Bearer right"}) as client:
        while True:
            lines = client.get("/metrics").text.splitlines()
            if any(line.startswith("vllm:num_requests_running{") and line.endswith(" 0.0") for line in lines):
                return
            assert time.monotonic() < end, "it still runs"
            time.sleep(0.02)


def test_abort_and_cancel_end_the_request(rpc: Server, client: Client, port: int) -> None:
    long = {"max_tokens": 480, "ignore_eos": True, "seed": 1}
    call = client.generate(text="The", request_id="mine", **long)
    next(call)
    assert dict(call.initial_metadata())["x-request-id"] == "mine"
    with Client(f"127.0.0.1:{port}", "other") as stranger:
        assert not stranger.abort("mine"), "of another tenant"
    again = fails(client.generate(text="The", request_id="mine", **long))
    assert again.code() == grpc.StatusCode.ALREADY_EXISTS
    assert client.abort("mine")
    assert fails(call).code() == grpc.StatusCode.CANCELLED
    wait_until_idle(rpc)
    assert not client.abort("mine")
    call = client.generate(text="The", n=3, **long)
    next(call)
    call.cancel()
    wait_until_idle(rpc)


def test_the_deadline_of_the_call_is_the_requests(rpc: Server, client: Client) -> None:
    error = fails(client.generate(text="The", max_tokens=480, ignore_eos=True, timeout=0.4))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until_idle(rpc)
    assert list(client.generate(text="The", max_tokens=2, timeout=30))


def test_a_full_queue_is_exhausted(model_dir: Path) -> None:
    port = free_port()
    limits = {"max_queue_requests": 2}
    options = {"grpc_port": port}
    server = Server(model_dir, "--step-seconds", "0.05", http=options, limits=limits)
    with server.ready(), Client(f"127.0.0.1:{port}") as client, ThreadPoolExecutor(12) as several:

        def ask(_: int) -> Any:
            try:
                return list(client.generate(token_ids={"ids": [5] * 200}, max_tokens=2))
            except grpc.RpcError as error:
                return error

        answers = list(several.map(ask, range(12)))
    refused = [answer for answer in answers if isinstance(answer, grpc.RpcError)]
    assert refused and len(refused) < 12
    for error in refused:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        told = trailing(error)
        assert told["error-code"] == "queue_full"
        assert int(told["grpc-retry-pushback-ms"]) == int(told["retry-after-ms"]) >= 1


def test_health_follows_the_server(model_dir: Path) -> None:
    port = free_port()
    kinds = health_pb2.HealthCheckResponse
    loads = Server(model_dir, "--load-seconds", "1.5", http={"grpc_port": port})
    with loads as server, Client(f"127.0.0.1:{port}") as client:
        stub = health_pb2_grpc.HealthStub(client.channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        watch = stub.Watch(request, wait_for_ready=True, timeout=30)
        assert next(watch).status == kinds.NOT_SERVING
        error = fails(client.generate(text="x"))
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert int(trailing(error)["retry-after-ms"]) >= 1
        assert next(watch).status == kinds.SERVING
        server.ready()
        assert stub.Check(request, timeout=10).status == kinds.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=10)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        call = client.generate(text="The", max_tokens=100, ignore_eos=True)
        next(call)
        server.process.terminate()
        assert sum(bool(reply.text) for reply in call) > 0, "what runs is finished"
        assert server.process.wait(20) == 0


def test_reflection_tells_what_there_is(client: Client) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    services, file = stub.ServerReflectionInfo(iter(asked), metadata=client.metadata, timeout=10)
    names = {service.name for service in services.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    [data] = file.file_descriptor_response.file_descriptor_proto
    assert [one.name for one in descriptor_pb2.FileDescriptorProto.FromString(data).service] == ["OrcaServe"]


def test_tls(model_dir: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    options = {"grpc_port": port, "ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    with Server(model_dir, http=options).ready() as server:
        context = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(server.url.replace("127.0.0.1", "localhost") + "/ready", verify=context).status_code == 200
        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        with Client(f"localhost:{port}", credentials=trusted) as client:
            assert list(client.generate(text="x", max_tokens=2, timeout=20))


def test_a_port_that_is_taken_ends_the_start(model_dir: Path, rpc: Server, port: int) -> None:
    with Server(model_dir, http={"grpc_port": port}) as server:
        _, err = server.process.communicate(timeout=20)
    assert server.process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in err and "Traceback" not in err


def test_the_descriptor_is_that_of_the_proto(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    made = tmp_path / "made.binpb"
    words = ["protoc", f"-I{PROTO}", "--include_imports", f"--descriptor_set_out={made}", "orcaserve.proto"]
    assert protoc.main(words) == 0
    new, old = (descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in
                (made, PROTO / "orcaserve.binpb"))  # fmt: skip
    assert new == old
