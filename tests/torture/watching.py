"""What a running server holds: its metrics, and the descriptors, threads, tasks and shared memory of its processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import psutil
from e2e.serving import Serving

WATCHED = str(Path(__file__).with_name("watched_server.py"))
# The gauges that have to be 0 when nothing is asked, as this project, vLLM and llama.cpp call them.
AT_REST = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "llamacpp:requests_processing",
    "llamacpp:requests_deferred",
)


def metrics(url: str) -> dict[str, float]:
    """Each name's sum over its labels; nothing if the server has no metrics."""
    found: Counter[str] = Counter()
    response = httpx.get(f"{url}/metrics", timeout=60, trust_env=False)
    for line in response.text.splitlines() if response.status_code == 200 else ():
        if line and not line.startswith("#"):
            with contextlib.suppress(ValueError):
                found[line.partition("{")[0].partition(" ")[0]] += float(line.rpartition(" ")[2])
    return dict(found)


def processes(pid: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server's, by what they are: the frontend, its engine, the engine's workers and the parent that forked them."""
    frontend = psutil.Process(pid)
    yield "frontend", frontend
    for engine in frontend.children():
        yield "engine", engine
        for parent in engine.children():
            yield "parent", parent
            for worker in parent.children():
                yield "worker", worker


def holdings(pid: int) -> dict[str, int]:
    """How many descriptors, threads and pieces of shared memory each kind of the server's processes has."""
    found: Counter[str] = Counter()
    for name, process in processes(pid):
        found[f"{name} processes"] += 1
        found[f"{name} descriptors"] += process.num_fds()
        found[f"{name} threads"] += process.num_threads()
        shared = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        found[f"{name} shared memory"] += sum("/shm/" in line or "/memfd:" in line for line in shared)
    return dict(found)


def tasks(server: Serving) -> int:
    """Of the frontend, which `watched_server.py` counts."""
    told = len(server.lines)
    os.kill(server.process.pid, signal.SIGUSR1)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for line in server.lines[told:]:
            if line.startswith("tasks "):
                return int(line.split()[1])
        time.sleep(0.01)
    raise AssertionError("the server does not answer a signal")


def all_holdings(server: Serving) -> dict[str, int]:
    return holdings(server.process.pid) | {"frontend tasks": tasks(server)}


def leftovers(url: str, before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """What a server that nobody asks anything has more than before, or should have none of."""
    gauges = metrics(url)
    busy = [f"{name} is {gauges[name]:g}" for name in AT_REST if gauges.get(name)]
    return busy + [
        f"{count} {name}, {before.get(name, 0)} before" for name, count in now.items() if count > before.get(name, 0)
    ]
