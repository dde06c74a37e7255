"""A server from its start to its end: loading, hang-ups, an engine that dies, draining, and starts that fail."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from api_world import Server, events, free_port, make_model

LONG = {"prompt": "The", "max_tokens": 150, "ignore_eos": True, "seed": 1}


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def metric(client: httpx.Client, name: str) -> float:
    text = client.get("/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(f"vllm:{name}{{")).split()[-1])


def answers(url: str, path: str) -> int | None:
    try:
        return httpx.get(url + path).status_code
    except httpx.TransportError:
        return None


def test_the_port_answers_while_the_model_loads(model_dir: Path) -> None:
    port = free_port()
    with Server(model_dir, "--load-seconds", "1.5", http={"port": port}) as server:
        wait_for(lambda: answers(server.url, "/health") is not None)
        assert answers(server.url, "/health") == 200
        refused = httpx.get(server.url + "/ready")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "loading"
        assert "retry-after" in refused.headers
        refused = httpx.post(server.url + "/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        server.ready()
        assert answers(server.url, "/ready") == 200
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "x"}).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_blocks(model_dir: Path, stream: bool) -> None:
    with Server(model_dir, "--step-seconds", "0.02").ready() as server, server.client() as client:
        for _ in range(3):
            other = server.client()
            request = other.build_request("POST", "/v1/completions", json={**LONG, "stream": stream, "n": 3})
            if stream:
                response = other.send(request, stream=True)
                body = response.iter_raw()  # held, since it hangs up where it is collected
                next(body)
            else:
                with pytest.raises(httpx.ReadTimeout):
                    request.extensions["timeout"] = {"connect": 5, "read": 0.3, "write": 5, "pool": 5}
                    other.send(request)
            wait_for(lambda: metric(client, "num_requests_running") == 3)
            other.close()
            wait_for(lambda: metric(client, "kv_cache_usage_perc") == metric(client, "num_requests_running") == 0)
        aborted = 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 9.0'
        assert aborted in client.get("/metrics").text


def test_streams_outlive_the_engine(model_dir: Path) -> None:
    """The engine process is killed in the middle; the client sees nothing but a pause."""
    with Server(model_dir, "--step-seconds", "0.01").ready() as server, server.client() as client:
        calm = client.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            [engine] = psutil.Process(server.process.pid).children()
            engine.kill()
            wait_for(lambda: [child.pid for child in psutil.Process(server.process.pid).children()] != [engine.pid])
            assert client.get("/health").status_code == 200

            class Rest:
                def iter_lines(self) -> list[str]:
                    return [*lines]

            texts = [chunk["choices"][0]["text"] for chunk in events(Rest())]
        assert calm.endswith("".join(texts))
        assert len("".join(texts)) > len(calm) / 2
        assert server.stop()[0] == 0


def test_a_server_is_well_while_one_replica_is(model_dir: Path) -> None:
    """An engine is killed and loads for a while: who is not ready is said, and the other one serves."""

    def ready(client: httpx.Client) -> list[float]:
        text = client.get("/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("orcaserve:replica_ready{")]
        return [float(line.split()[-1]) for line in lines]

    server = Server(model_dir, "--load-seconds", "1.5", replication={"replicas": 2})
    with server.ready(), server.client() as client:
        wait_for(lambda: ready(client) == [1, 1])
        assert client.get("/ready").json() == {"status": "ok", "step_age": 0.0}
        engines = psutil.Process(server.process.pid).children()
        engines[0].kill()
        wait_for(lambda: sum(ready(client)) == 1)
        lacking = client.get("/ready")
        assert lacking.status_code == 200
        assert lacking.json()["replicas_not_ready"] == [ready(client).index(0)]
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
        engines[1].kill()
        wait_for(lambda: sum(ready(client)) == 0)
        assert client.get("/health").status_code == 200
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200, "it waited"
        wait_for(lambda: ready(client) == [1, 1])
        assert metric(client, "num_requests_running") == 0
        children = psutil.Process(server.process.pid).children()
        assert server.stop()[0] == 0
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_sigterm_lets_running_requests_end(model_dir: Path) -> None:
    with Server(model_dir, "--step-seconds", "0.01").ready() as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: answers(server.url, "/ready") == 503)
            refused = httpx.post(server.url + "/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "draining"
            chunks = events(response)
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        out, err = server.process.communicate(timeout=20)
        assert server.process.returncode == 0
        assert out.strip() == "False", "no torch in the frontend"
        assert err == ""


def test_a_drain_ends_in_time(model_dir: Path) -> None:
    http = {"drain_seconds": 0.5}
    with Server(model_dir, "--step-seconds", "0.1", http=http).ready() as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            server.process.send_signal(signal.SIGTERM)
            chunks = events(response)
        assert "error" in chunks[-1]
        server.process.communicate(timeout=20)
        assert server.process.returncode == 0


def test_what_a_drain_cuts_off_may_be_asked_for_again(model_dir: Path) -> None:
    http = {"drain_seconds": 0.5}
    with Server(model_dir, "--step-seconds", "0.1", http=http).ready() as server, server.client() as client:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=30)
            wait_for(lambda: metric(client, "num_requests_running") == 1)
            server.process.send_signal(signal.SIGTERM)
            response = waiting.result()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert response.headers["x-should-retry"] == "true" and "retry-after" in response.headers
        server.process.communicate(timeout=20)


def test_a_second_signal_ends_now(model_dir: Path) -> None:
    with Server(model_dir, "--step-seconds", "0.1").ready() as server, server.client() as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}):
            children = psutil.Process(server.process.pid).children(recursive=True)
            assert children
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: answers(server.url, "/ready") == 503)
            server.process.send_signal(signal.SIGTERM)
            server.process.communicate(timeout=20)
        assert server.process.returncode == 1
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


def test_sigterm_while_loading(model_dir: Path) -> None:
    port = free_port()
    with Server(model_dir, "--load-seconds", "60", http={"port": port}) as server:
        wait_for(lambda: answers(server.url, "/health") == 200)
        assert server.stop()[0] == 0


def fails(server: Server) -> str:
    with server:
        _, err = server.process.communicate(timeout=20)
        assert server.process.returncode == 1
        assert len(err.splitlines()) == 1, err
        return err


def test_starts_that_fail_say_why_in_one_line(model_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port}" in fails(Server(model_dir, http={"port": port}))
    assert "API key" in fails(Server(model_dir, http={"host": "0.0.0.0"}))
    assert "no model today" in fails(Server(model_dir, "--fail", "no model today"))
    (tmp_path / "empty").mkdir()
    assert "tokenizer.json" in fails(Server(tmp_path / "empty"))
    assert "cannot listen" in fails(Server(model_dir, http={"host": "192.0.2.1", "api_keys": ["k"]}))
    assert "certificate" in fails(Server(model_dir, http={"ssl_certfile": "x"}))
    assert "--api-key ops=KEY" in fails(Server(model_dir, http={"api_keys": ["k", "a=l"], "operator": "ops"}))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(model_dir: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*make.split(), *names], check=True, capture_output=True)
    with Server(model_dir, http={"ssl_certfile": str(cert), "ssl_keyfile": str(key)}).ready() as server:
        assert server.url.startswith("https://")
        with server.client(verify=ssl.create_default_context(cafile=str(cert))) as client:
            assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        assert server.stop()[0] == 0
    cert.write_text("not a certificate")
    said = fails(Server(model_dir, http={"ssl_certfile": str(cert), "ssl_keyfile": str(key)}))
    assert "certificate" in said


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """File descriptors and tasks of a server that has answered many clients."""
    with Server(make_model(tmp_path / "m")).ready() as server:
        process = psutil.Process(server.process.pid)

        def burst() -> None:
            with server.client() as client:
                for index in range(30):
                    body = {"prompt": "x", "max_tokens": 5, "stream": index % 2 == 0}
                    assert client.post("/v1/completions", json=body).status_code == 200

        burst()
        wait_for(lambda: len(process.net_connections()) <= 1)
        before = process.num_fds()
        burst()
        wait_for(lambda: process.num_fds() <= before)
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.communicate(timeout=20)
        assert server.process.returncode == 0


def test_what_is_unknown_is_warned_of_once_and_browsers_may_be_let_in(model_dir: Path) -> None:
    http = {"cors_origins": ["https://page.example"], "api_keys": ["k"]}
    with Server(model_dir, http=http).ready() as server:
        with server.client(headers={"Authorization": "Bearer k", "Origin": "https://page.example"}) as client:
            for _ in range(3):
                answer = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "colour\n": "blue"})
                assert answer.status_code == 200
                assert answer.headers["access-control-allow-origin"] == "https://page.example"
            asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
            assert client.options("/v1/completions", headers=asked).status_code == 200
            assert "access-control-allow-origin" not in client.get("/ready", headers={"Origin": "https://x.y"}).headers
        code, _, err = server.stop()
    assert code == 0
    assert len(err.splitlines()) == 1, err
    assert "unknown field 'colour\\n'" in err
