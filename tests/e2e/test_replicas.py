"""Two replicas of the built-in model: the promise while one of them is killed, and the router that is asked for."""

from __future__ import annotations

import asyncio
import time

import httpx
import psutil
from crowd import Answer, all_streams, body, stream
from serving import Serving, is_alive

STREAMS = 40
BODIES = [body(i, 60 + i, ignore_eos=True) for i in range(STREAMS)]
OPTIONS = ("--replicas", "2", "--threads", "2", "--kv-memory", "16MiB")


def engines(server: Serving) -> set[int]:
    children = psutil.Process(server.process.pid).children()
    return {child.pid for child in children if is_alive(child.pid)}


def all_ready(server: Serving) -> None:
    end = time.monotonic() + 120
    while "replicas_not_ready" in server.client.get("/ready").json():
        assert time.monotonic() < end, "a replica does not get ready"
        time.sleep(0.05)


def of_replica(server: Serving, name: str, replica: int) -> float:
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith(f"orcaserve:replica_{name}{{") and f'replica="{replica}"' in line:
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


def both_run(server: Serving) -> bool:
    return all(of_replica(server, "requests_running", replica) > 0 for replica in range(2))


async def disturbed(server: Serving, total: int) -> tuple[list[tuple[int, Answer]], list[int]]:
    """The same streams while an engine is killed when a third of all tokens have come, and its successor after that.

    Who has an answer asks again until both are dead: so there is work for the successor, whenever it comes.
    """
    progress, answers, is_over = [0] * STREAMS, [], asyncio.Event()
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client, asyncio.TaskGroup() as all:

        async def again_and_again(i: int) -> None:
            while not is_over.is_set():
                answers.append((i, await stream(client, BODIES[i], progress, i)))

        for i in range(STREAMS):
            all.create_task(again_and_again(i))
        while sum(progress) < total / 3 and not answers:
            await asyncio.sleep(0.005)
        before = engines(server)
        victims = [before.pop()]
        psutil.Process(victims[0]).kill()
        assert (await asyncio.to_thread(server.client.get, "/health")).status_code == 200
        while not (new := engines(server) - before - set(victims)) or not await asyncio.to_thread(both_run, server):
            await asyncio.sleep(0.005)
        victims.append(new.pop())
        psutil.Process(victims[1]).kill()
        is_over.set()
    return answers, victims


def test_a_crowd_on_two_replicas_of_which_one_is_killed_twice() -> None:
    with Serving(*OPTIONS, "--max-batch-size", "16") as server:
        assert any("2 replicas" in line for line in server.lines), server.lines
        all_ready(server)
        calm = asyncio.run(all_streams(server.url, BODIES, [0] * STREAMS))
        assert all(of_replica(server, "prefix_cache_queries_total", replica) > 0 for replica in range(2))
        stormy, victims = asyncio.run(disturbed(server, sum(len(ids) for _, ids, _, _ in calm)))
        assert len(set(victims)) == 2
        assert {i for i, _ in stormy} == set(range(STREAMS))
        for i, got in stormy:
            assert got == calm[i], f"stream {i}: {got} instead of {calm[i]}"
        all_ready(server)
        assert sum(of_replica(server, "restarts_total", replica) for replica in range(2)) == 2
        assert server.gauge("vllm:num_requests_running") == 0
        assert server.gauge("vllm:kv_cache_usage_perc") == 0


def test_replicas_take_turns_if_asked_to() -> None:
    with Serving(*OPTIONS, "--router", "round-robin") as server:
        all_ready(server)
        asked = {"prompt": "Once upon a time there was a fox. " * 8, "max_tokens": 1}
        for _ in range(4):
            server.client.post("/v1/completions", json=asked).raise_for_status()
        hits = [of_replica(server, "prefix_cache_hits_total", replica) for replica in range(2)]
        assert min(hits) > 0, "the prefix router would have kept to one"
        assert sum(hits) == server.gauge("vllm:prefix_cache_hits_total")
