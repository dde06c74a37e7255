"""A Ray cluster of two nodes on this machine: it places what it is given, and starts again what is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator

import kernel_sets
import psutil
import pytest
from crowd import all_streams, body
from ray.cluster_utils import Cluster
from serving import Serving

from orcaserve.core.config import EngineOptions
from orcaserve.serve.cluster import placed

STREAMS = 40
BODIES = [body(i, 30 + i % 50) for i in range(STREAMS)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster whose head has no processor to give."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        yield made.address
    finally:
        made.shutdown()


def remote_engines() -> dict[int, psutil.Process]:
    """The engine processes that the cluster's nodes run, by pid."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any("orcaserve.serve.engine_process" in word for word in words):
            with contextlib.suppress(psutil.NoSuchProcess):
                # not parent(), which compares when the two began by a clock that may have been put back meanwhile
                if "replica" in psutil.Process(process.ppid()).cmdline():
                    found[process.pid] = process
    return found


async def disturbed(server: Serving, total: int) -> list:
    """The streams while one replica's whole host process is killed at a third of the tokens."""
    progress = [0] * STREAMS
    running = asyncio.ensure_future(all_streams(server.url, BODIES, progress))
    while sum(progress) < total / 3:
        assert not running.done(), running.exception()
        await asyncio.sleep(0.005)
    engines = remote_engines()
    assert len(engines) == 2
    os.kill(next(iter(engines.values())).ppid(), signal.SIGKILL)
    got = await running
    end = time.monotonic() + 240
    while len(new := remote_engines()) < 2 or set(new) == set(engines):
        assert time.monotonic() < end, "Ray has not started the lost replica again"
        await asyncio.sleep(0.2)
    return got


def test_two_replicas_on_a_cluster_lose_nothing(cluster: str) -> None:
    with Serving("--replicas", "2", "--ray", cluster, "--threads", "1", "--kv-memory", "8MiB") as server:
        calm = asyncio.run(all_streams(server.url, BODIES, [0] * STREAMS))
        total = sum(len(ids) for _, ids, _, _ in calm)
        end = time.monotonic() + 240  # the first to be ready can have served the calm streams by itself
        while len(remote_engines()) < 2:
            assert time.monotonic() < end, "Ray has not started both replicas"
            time.sleep(0.2)
        stormy = asyncio.run(disturbed(server, total))
        for i, (expected, got) in enumerate(zip(calm, stormy, strict=True)):
            assert got == expected, f"stream {i}: {got} instead of {expected}"
    assert not remote_engines(), "a replica outlived the server"


@kernel_sets.NEEDS_NATIVE
def test_ranks_on_a_cluster_answer_as_one_process(cluster: str) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "logprobs": 1}
    answers = []
    for options in ([], ["--pipeline-parallel-size", "2", "--nnodes", "2", "--ray", cluster]):
        with Serving(*options, "--threads", "1", "--kv-memory", "8MiB") as server:
            [choice] = server.client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
            answers.append((choice["text"], choice["logprobs"]["token_logprobs"]))
    assert answers[0] == answers[1]


def test_hosts_use_no_more_processors_than_ray_reserves(cluster: str) -> None:
    with placed(cluster, "orcaserve-tiny", EngineOptions(model="orcaserve-tiny"), 1) as (engine, commands):
        assert engine.threads == 1, "of a node's, which are everybody's"
        assert commands is not None and len(commands) == 1
