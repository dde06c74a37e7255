"""A server on a host whose disk is full, or whose clock jumps."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from crowd import all_streams, body
from serving import Serving

DAY = 24 * 3600
OPTIONS = ("--threads", "1", "--kv-memory", "8MiB")

CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile int64_t *ahead;

__attribute__((constructor)) static void begin(void) {
    int fd = open(getenv("SECONDS_AHEAD"), O_RDONLY);
    ahead = mmap(0, sizeof *ahead, PROT_READ, MAP_SHARED, fd, 0);
}

int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(id, at);
    if (ahead && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += *ahead;
    return code;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


def test_a_log_that_cannot_be_written_harms_nobody() -> None:
    """Everything that is said goes to a full disk, also what is said of an engine that freezes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "orcaserve", "serve", "--port", str(port), *OPTIONS]
    with Path("/dev/full").open("wb") as full, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        server = subprocess.Popen(command, stdout=full, stderr=full)
        try:
            while True:
                assert server.poll() is None, "it ended before it served"
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            asked = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
            calm = client.post("/v1/completions", json=asked)
            [engine] = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
            os.kill(int(engine), signal.SIGSTOP)
            again = client.post("/v1/completions", json=asked)
            assert again.json()["choices"] == calm.json()["choices"]
            assert not Path(f"/proc/{engine}").exists()
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
            server.wait()


@pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler makes the clock that jumps")
def test_only_monotonic_clocks_decide(tmp_path: Path) -> None:
    """The time of day jumps by a day to and fro: nobody is late, frozen, or refused, and no engine is replaced."""
    (tmp_path / "clock.c").write_text(CLOCK)
    library, ahead = tmp_path / "clock.so", tmp_path / "ahead"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    ahead.write_bytes(struct.pack("<q", 0))

    def jump(seconds: int) -> None:
        with ahead.open("r+b") as file:
            file.write(struct.pack("<q", seconds))

    bodies = [body(i, 30, timeout=60) for i in range(24)]
    jumps = [DAY, -DAY, 40 * 365 * DAY, 0]

    async def disturbed(url: str, total: int) -> list:
        progress = [0] * len(bodies)
        running = asyncio.ensure_future(all_streams(url, bodies, progress))
        for i, seconds in enumerate(jumps):
            while sum(progress) < (i + 1) / (len(jumps) + 1) * total:
                assert not running.done(), running.exception()
                await asyncio.sleep(0.005)
            jump(seconds)
        return await running

    with Serving(*OPTIONS, environment={"LD_PRELOAD": str(library), "SECONDS_AHEAD": str(ahead)}) as server:
        engine = server.engine.pid
        calm = asyncio.run(all_streams(server.url, bodies, [0] * len(bodies)))
        stormy = asyncio.run(disturbed(server.url, sum(len(ids) for _, ids, _, _ in calm)))
        assert stormy == calm
        jump(DAY)
        one = server.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).json()
        assert one["created"] > time.time() + DAY / 2, "the clock was meant to jump"
        time.sleep(1)  # four beats
        jump(-DAY)
        server.client.get("/health").raise_for_status()
        server.client.get("/ready").raise_for_status()
        assert server.engine.pid == engine
