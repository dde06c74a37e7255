"""R10: clients that take one byte a second of their streams, beside others that read as they should."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
from e2e.serving import Serving

from orcaserve.bench import client
from orcaserve.bench.client import Reply, Server
from orcaserve.bench.workloads import Item
from torture.footprint import cpu_seconds, family, memory, unacknowledged
from torture.hostile import post
from torture.rows import Outcome, Row, Setup

ROWS = (Row("R10", "clients that read 1 B/s", "≤ 256 KiB buffered each, the others keep ≥ 95 %"),)
MOST_BUFFERED = 256 << 10
LEAST_KEPT = 0.95
OTHERS = 4
RECEIVE_BYTES = 4096  # of the slow ones' own kernel buffers
VOCAB = 3072
PATIENCE = 900.0


def torture(setup: Setup) -> Iterator[Outcome]:
    with Serving("--threads", "1", "--kv-memory", "128MiB", "--log-level", "warning") as server:
        yield asyncio.run(_Run(setup, server).outcome())


class Window(NamedTuple):
    """Of time, by time.perf_counter(), and what CPU the server used in it, in seconds."""

    start: float
    end: float
    cpu: float


class SlowReader:
    """A stream over a socket of its own. Owner of the socket and of what has come of it."""

    def __init__(self, port: int, body: dict[str, Any]) -> None:
        self.body = body
        self.data = bytearray()
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        self._socket.connect(("127.0.0.1", port))
        data = json.dumps(body).encode()
        self._socket.sendall(post("/v1/completions", data))
        self._socket.setblocking(False)

    def take(self) -> None:
        """One byte, if there is one."""
        with contextlib.suppress(BlockingIOError):
            self.data += self._socket.recv(1)

    async def rest(self) -> None:
        """Reads on, as quickly as it comes, to the end."""
        while data := await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16):
            self.data += data

    def close(self) -> None:
        self._socket.close()

    def got(self) -> list[tuple[list[int], list[float]]]:
        """Ids and log-probabilities, when all of it is there. AssertionError if it is cut or holds an error."""
        assert b"data: [DONE]" in self.data, f"the stream ends with {bytes(self.data[-200:])!r}"
        events = [json.loads(line[6:]) for line in bytes(self.data).splitlines() if line.startswith(b"data: {")]
        return merged(events)


def merged(events: list[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
    """What one choice's chunks, or its whole response, hold together."""
    ids: list[int] = []
    logprobs: list[float] = []
    for event in events:
        assert "choices" in event, event
        for choice in event["choices"]:
            ids += choice["token_ids"]
            logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
    return [(ids, logprobs)]


class _Run:
    def __init__(self, setup: Setup, server: Serving) -> None:
        self._server = server
        self._port = int(server.url.rpartition(":")[2])
        self._num_slow = setup.size("clients", 24, 256)
        self._num_tokens = setup.size("tokens", 200, 900)
        self._window = setup.size("seconds", 1, 30)
        self._num_checked = setup.size("checked", 4, 64)
        self._is_short = setup.scale == "short"
        self._draw = setup.random("R10")
        self._slow: list[SlowReader] = []
        self._replies: list[tuple[float, Reply]] = []  # of the others, with when they were asked for

    async def outcome(self) -> Outcome:
        server = await client.asked(client.server_from("orcaserve", self._server.url))
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(OTHERS):
                stack.callback(asyncio.create_task(self._other(server)).cancel)
            await asyncio.sleep(self._window / 2)
            windows = [await self._watch()]
            before = memory([self._server.process.pid])
            peak, kernel = await self._open_and_settle(before)
            windows.append(await self._watch())
            peak = max(peak, memory([self._server.process.pid]))
            kernel = max(kernel, self._kernel())
            checked = await self._read_on()
            await self._until_few_run()
            windows.append(await self._watch())
        wrong = await self._compare(checked)
        return self._judge((peak - before) / self._num_slow, kernel, windows, len(checked), wrong)

    def _judge(self, each: float, kernel: int, windows: list[Window], num_checked: int, wrong: list[str]) -> Outcome:
        counts = self._counts(windows)
        rates = [count / (window.end - window.start) for count, window in zip(counts, windows, strict=True)]
        work = [count / window.cpu for count, window in zip(counts, windows, strict=True)]
        kept = rates[1] / ((rates[0] + rates[2]) / 2)
        figure = (
            f"{self._num_slow} readers: {each / 1024:.0f} KiB each in the frontend, {kernel / 1024:.0f} KiB at most in "
            f"the kernel; others {rates[0]:.0f}, with them {rates[1]:.0f}, after them {rates[2]:.0f} tokens/s: "
            f"{kept:.0%} (for each second of the server's CPU {work[0]:.0f}, {work[1]:.0f}, {work[2]:.0f} tokens); "
            f"{num_checked - len(wrong)} of {num_checked} streams, when read on, equal to a run alone"
        )
        is_right = each + kernel <= MOST_BUFFERED and not wrong
        is_quick = kept >= LEAST_KEPT or self._is_short  # windows of a second say what else the machine does
        return Outcome(ROWS[0], figure, is_right and is_quick, trace=tuple(wrong[:5]))

    async def _other(self, server: Server) -> None:
        """One that sends its next request when the last one has ended."""
        while True:
            ids = self._draw.choices(range(16, VOCAB), k=self._draw.randint(8, 32))
            reply = Reply(Item(0.0, tuple(ids), 64))
            self._replies.append((time.perf_counter(), reply))
            await client.send(server, [reply])

    async def _read_on(self) -> list[SlowReader]:
        """Some of the slow ones read all that there is; the others hang up."""
        checked = self._draw.sample(self._slow, min(self._num_checked, self._num_slow))
        for reader in self._slow:
            if reader not in checked:
                reader.close()
        self._slow = []
        await asyncio.wait_for(asyncio.gather(*(reader.rest() for reader in checked)), PATIENCE)
        for reader in checked:
            reader.close()
        return checked

    async def _watch(self) -> Window:
        """A window in which the others' tokens count, while the slow ones take their bytes."""
        start, cpu = time.perf_counter(), self._cpu()
        await self._take(self._window)
        return Window(start, time.perf_counter(), self._cpu() - cpu)

    def _cpu(self) -> float:
        return cpu_seconds(family(self._server.process.pid))

    async def _take(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while (now := time.perf_counter()) < end:
            for reader in self._slow:
                reader.take()
            await asyncio.sleep(min(1.0, end - now))

    async def _open_and_settle(self, before: int) -> tuple[int, int]:
        """Peak bytes of the frontend's memory, and of a connection in the kernel, until nobody but the others runs."""
        for index in range(self._num_slow):
            self._slow.append(SlowReader(self._port, self._body(index)))
            await asyncio.sleep(0.002)
        peak, kernel, few, began = before, 0, 0, time.perf_counter()
        while few < 3:
            await self._take(0.5)
            peak = max(peak, memory([self._server.process.pid]))
            kernel = max(kernel, self._kernel())
            few = few + 1 if await self._num_present() <= OTHERS else 0
            assert time.perf_counter() - began < PATIENCE, "the slow readers' requests never leave the engine"
        return peak, kernel

    async def _until_few_run(self) -> None:
        while await self._num_present() > OTHERS:
            await asyncio.sleep(0.2)

    def _kernel(self) -> int:
        return max(unacknowledged(self._port), default=0)

    async def _num_present(self) -> int:
        """Requests that engines have."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        return int(sum([await asyncio.to_thread(self._server.gauge, name) for name in names]))

    def _body(self, index: int) -> dict[str, Any]:
        return {
            "prompt": self._draw.choices(range(16, VOCAB), k=self._draw.randint(4, 40)),
            "max_tokens": self._num_tokens,
            "ignore_eos": True,
            "temperature": 0.8,
            "seed": index,
            "stream": True,
            "return_token_ids": True,
            "logprobs": [None, 5, 5][index % 3],
        }

    async def _compare(self, readers: list[SlowReader]) -> list[str]:
        """What is wrong with streams that were read slowly and then to their end."""
        wrong = []
        async with httpx.AsyncClient(base_url=self._server.url, timeout=PATIENCE) as alone:
            for reader in readers:
                whole = await alone.post("/v1/completions", json={**reader.body, "stream": False})
                try:
                    if reader.got() != merged([whole.json()]):
                        wrong.append(f"seed {reader.body['seed']}: other tokens than alone")
                except (AssertionError, ValueError) as error:
                    wrong.append(f"seed {reader.body['seed']}: {error}"[:300])
        return wrong

    def _counts(self, windows: list[Window]) -> list[int]:
        """Tokens that the others got in each window."""
        times = [began + at for began, reply in self._replies if reply.arrived for at in reply.record().token_times]
        return [sum(window.start <= at < window.end for at in times) for window in windows]
