"""`orcaserve serve --step-log`: a real server's life, replayed batch for batch."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
from serving import Serving

from orcaserve.bench import client
from orcaserve.bench.client import Server
from orcaserve.bench.workloads import spec
from orcaserve.engine.step_log import Arrived, Left, Returned, Submitted, read
from orcaserve.sim.replay import replay
from orcaserve.sim.story import stories


def hang_up(url: str, prompt: list[int]) -> None:
    """Starts a long request and leaves after a few tokens."""
    body = {"model": "orcaserve-tiny", "prompt": prompt, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number == 6:
                return


def test_a_real_run_is_replayed_batch_for_batch(tmp_path: Path) -> None:
    """With chunks, preemption, prefix hits, end tokens and clients that hang up."""
    path = tmp_path / "steps.jsonl"
    text = "burst:in=40-120,out=60-90,n=10 + chat:sessions=3,rate=20,turns=2,think=0.2,system=64,in=20,out=20"
    work = spec.make(text, vocab=3072, seed=1)
    options = ("--threads", "1", "--kv-memory", "2MiB", "--max-model-len", "600")
    batches = ("--max-batch-size", "6", "--max-batch-tokens", "48")
    with Serving(*options, *batches, "--step-log", str(path)) as server:
        leavers = [
            threading.Thread(target=hang_up, args=(server.url, [200 + number] * 50), daemon=True) for number in range(3)
        ]
        for leaver in leavers:
            leaver.start()
        records = client.in_loop(client.run(Server("ours", server.url, "orcaserve-tiny"), work))
        for leaver in leavers:
            leaver.join(60)
        for question in ("What is a whale?", "What is a whale?"):
            messages = [{"role": "user", "content": question}]
            reply = server.client.post(
                "/v1/chat/completions", json={"model": "orcaserve-tiny", "messages": messages, "temperature": 0}
            )
            assert reply.json()["choices"][0]["finish_reason"] == "stop"
        preemptions = server.gauge("vllm:num_preemptions_total")
    assert not any(record.error for record in records)
    [log] = read(path.read_bytes())
    recorded = [event.rows for event in log.events if isinstance(event, Submitted)]
    assert replay(log) == recorded
    config = log.header.config
    assert (config.max_itl, config.prompt_share) == (0.25, 3.0), "streams are not stopped by long prompts on a CPU"
    kinds = [type(event) for event in log.events]
    assert kinds.count(Arrived) == len(work.items) + 5 and kinds.count(Left) >= 3
    assert sum(len(event.stopped) for event in log.events if isinstance(event, Returned)) == 2
    assert preemptions > 0, "the KV cache was meant to be too small"
    first = {}
    for rows in recorded:
        for id, start, _, _ in rows:
            first.setdefault(id, start)
    assert any(first.values()), "a prefix was meant to be found"
    assert log.header.model is not None and log.header.model.layers == 5
    told = stories(log)
    assert all(story.name.startswith(("cmpl-", "chatcmpl-")) for story in told)
    assert sum(len(story.losses) for story in told) == preemptions
    assert {"rows", "blocks", "preemption"} <= {wait.why for story in told for wait in story.waits}


def test_a_log_that_cannot_be_written_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "orcaserve", "serve", "--port", "0", "--step-log", str(tmp_path / "no" / "log")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "cannot be written: No such file or directory" in done.stderr


def test_a_start_that_fails_leaves_the_log_of_the_running_server_alone(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("what is there")
    with socket.create_server(("127.0.0.1", 0)) as other:
        occupied = ["--port", str(other.getsockname()[1])]
        for why in (occupied, ["--port", "0", "--host", "0.0.0.0"], ["--nnodes", "1", "--node-rank", "1"]):
            command = [sys.executable, "-m", "orcaserve", "serve", *why, "--step-log", str(path)]
            assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 1
            assert path.read_text() == "what is there", why


def test_a_full_disk_ends_the_log_and_not_the_engine() -> None:
    with Serving("--threads", "1", "--kv-memory", "8MiB", "--step-log", "/dev/full") as server:
        body = {"model": "orcaserve-tiny", "prompt": "Once upon a time", "max_tokens": 5}
        replies = [server.client.post("/v1/completions", json=body) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [200] * 3
        engine = server.engine.pid
    assert engine is not None
    assert any("ends here: No space left on device" in line for line in server.lines)
