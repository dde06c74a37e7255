"""Two hosts, one of them a network namespace: a pipeline across them, its link cut, its processes killed."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import kernel_sets
import psutil
import pytest
from crowd import all_streams, body
from serving import Serving, is_alive

STREAMS = 30
BODIES = [body(i, 30 + i % 50) for i in range(STREAMS)]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def can_make_hosts() -> bool:
    """Whether this machine has iproute2 and lets us make a network namespace."""
    name = f"orca-try-{os.getpid()}"
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return False
    ip("netns", "delete", name)
    return True


pytestmark = [
    kernel_sets.NEEDS_NATIVE,
    pytest.mark.skipif(not can_make_hosts(), reason="needs iproute2 and the right to make network namespaces"),
]


class Wire:
    """A namespace, and a pair of interfaces that leads into it. Owner of both."""

    def __init__(self, number: int) -> None:
        self.name, self.ours, self.theirs = f"orca{number}", f"orca{number}a", f"orca{number}b"
        self.head = f"10.213.{number % 250}.1"
        ip("netns", "add", self.name)
        ip("link", "add", self.ours, "type", "veth", "peer", "name", self.theirs, "netns", self.name)
        ip("addr", "add", f"{self.head}/24", "dev", self.ours)
        ip("link", "set", self.ours, "up")
        for words in (
            ("addr", "add", f"10.213.{number % 250}.2/24", "dev", self.theirs),
            ("link", "set", self.theirs, "up"),
            ("link", "set", "lo", "up"),
        ):
            ip("-n", self.name, *words)

    def cut(self, seconds: float) -> None:
        ip("link", "set", self.ours, "down")
        time.sleep(seconds)
        ip("link", "set", self.ours, "up")

    def close(self) -> None:
        ip("netns", "delete", self.name)  # the interfaces go with it


class SecondHost:
    """`orcaserve serve --node-rank 1` in the namespace. Owner of the process."""

    def __init__(self, wire: Wire, options: list[str]) -> None:
        command = [sys.executable, "-m", "orcaserve", "serve", *options, "--node-rank", "1"]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", wire.name, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def workers(self) -> list[psutil.Process]:
        """`ip netns exec` becomes the command, whose child forks them."""
        return [rank for parent in psutil.Process(self.process.pid).children() for rank in parent.children()]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@contextmanager
def two_hosts(tmp_path: Path) -> Iterator[tuple[Wire, Serving, SecondHost]]:
    wire = Wire(os.getpid() % 10000)
    try:
        secret = tmp_path / "secret"
        secret.write_text(secrets.token_hex(32))
        options = ["--pipeline-parallel-size", "2", "--nnodes", "2", "--head-address", f"{wire.head}:7000"]
        options += ["--secret-file", str(secret), "--kv-memory", "8MiB", "--threads", "1"]
        second = SecondHost(wire, options)
        try:
            with Serving(*options, "--max-batch-size", "32") as server:
                yield wire, server, second
            assert second.process.poll() is None, "the second host ended with the head"
        finally:
            second.close()
            print("\n".join(second.lines))
    finally:
        wire.close()


async def disturbed(server: Serving, total: int, wire: Wire, second: SecondHost) -> list:
    """The streams while the link is cut for five seconds, and later the second host's workers are killed."""
    progress = [0] * STREAMS
    running = asyncio.ensure_future(all_streams(server.url, BODIES, progress))

    async def until(share: float) -> None:
        while sum(progress) < share * total:
            assert not running.done(), running.exception()
            await asyncio.sleep(0.005)

    await until(1 / 4)
    before = sum(progress)
    await asyncio.to_thread(wire.cut, 5.0)
    print(f"{sum(progress) - before} tokens came while the link was cut")
    await until(1 / 2)
    killed = [worker.pid for worker in second.workers()]
    assert killed
    for worker in second.workers():
        worker.kill()
    await until(3 / 4)
    assert not any(map(is_alive, killed))
    return await running


def test_streams_survive_a_cut_link_and_killed_workers(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as (wire, server, second):
        calm = asyncio.run(all_streams(server.url, BODIES, [0] * STREAMS))
        total = sum(len(ids) for _, ids, _, _ in calm)
        began = time.monotonic()
        stormy = asyncio.run(disturbed(server, total, wire, second))
        print(f"{total} tokens in {time.monotonic() - began:.1f} s")
        for i, (expected, got) in enumerate(zip(calm, stormy, strict=True)):
            assert got == expected, f"stream {i}: {got} instead of {expected}"
