"""`peer`: the shared benchmark's requests by transformers' continuous batching, as its users can have it.

It runs in a process of its own (this file is what that runs), so that it gets the whole card and may fail or hang. A
quarter of the requests goes first; all of them only if that promises to be in time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from orcaserve.bench.gpu.models import MODELS
from orcaserve.bench.gpu.report import Line
from orcaserve.bench.gpu.roofline import least_seconds_of
from orcaserve.executors.gpu_bench.lab import Lab, sizes_of
from orcaserve.executors.gpu_bench.shared import shared_requests

PARTS = 4  # the first run has one of so many parts of the requests
PAGE, BATCH_TOKENS = 256, 4096  # tokens of its blocks (its default), and of an iteration
LOADING = 60.0  # seconds that the child may take beside its runs
GROWTH = 3.0  # times as long as its share of requests says may the whole take: its masks grow with their square


@dataclass(frozen=True)
class Task:
    """config: as config.json. requests: (prompt, tokens to generate). limit: seconds of all runs together."""

    config: dict[str, Any]
    requests: list[tuple[list[int], int]]
    device: str
    limit: float


@dataclass(frozen=True)
class Run:
    """requests, finished: how many there were, and how many came to their end. tokens: of the latter."""

    requests: int
    finished: int
    tokens: int
    seconds: float
    attention: str


def peer(lab: Lab) -> Iterator[Line]:
    """A line for each run of the child; raises RuntimeError with its last words if there is none."""
    plan = lab.plan
    lab.let_go()
    sizes = sizes_of(plan.peer_model)
    requests = shared_requests(lab, sizes.vocab)
    task = Task(
        MODELS[plan.peer_model],
        [(list(one.token_ids), one.max_tokens) for one in requests],
        lab.device.type,
        plan.peer_seconds,
    )
    # without the network it would otherwise ask for attention kernels again and again
    child = subprocess.Popen(
        [sys.executable, "-m", "orcaserve.executors.gpu_bench.peer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        said, errors = child.communicate(json.dumps(asdict(task)), timeout=plan.peer_seconds + LOADING)
    except subprocess.TimeoutExpired:
        child.kill()
        said, errors = child.communicate()
    runs = [Run(**json.loads(line)) for line in said.splitlines() if line.startswith("{")]
    if not runs:
        raise RuntimeError(f"it gave nothing; its last words: {errors.strip()[-300:]}")
    for run in runs:
        lengths = [(len(one.token_ids), one.max_tokens) for one in requests[: run.requests]]
        least = least_seconds_of(lab.card, sizes, lengths, plan.shared_rows)
        yield Line(
            what=f"transformers {version('transformers')}, {plan.peer_model}: {run.requests} of the requests",
            seconds=run.seconds,
            rate=run.tokens / run.seconds,
            unit="tokens/s",
            limit=sum(output for _, output in lengths) / least,
            note=f"attention {run.attention}"
            + (f"; cut off, only {run.finished} answers counted" if run.finished < run.requests else ""),
        )


def main() -> None:
    """Reads a Task from stdin, writes a Run for each run to stdout."""
    task = Task(**json.load(sys.stdin))
    peer = _Peer(task)
    deadline = time.monotonic() + task.limit
    part = task.requests[: -(-len(task.requests) // PARTS)]
    peer.run([(prompt, 2) for prompt, _ in part[:4]], deadline)
    first = peer.run(part, deadline)
    _tell(first)
    expected = first.seconds * len(task.requests) / len(part) * GROWTH
    if first.finished == len(part) and time.monotonic() + expected < deadline:
        _tell(peer.run(task.requests, deadline))
    os._exit(0)  # its threads wait for requests that were cut off


def _tell(run: Run) -> None:
    print(json.dumps(asdict(run)), flush=True)


class _Peer:
    """Owner of transformers' model."""

    def __init__(self, task: Task) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**{key: value for key, value in task.config.items() if key != "architectures"})
        with torch.device(task.device):
            self._model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation="sdpa"
            ).eval()

    def run(self, requests: list[tuple[list[int], int]], deadline: float) -> Run:
        """To the end of all, or to the deadline; then nothing can follow, since what was cut off still runs."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        most = max(count for _, count in requests)
        manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=True, temperature=0.6, top_k=0, eos_token_id=-1, max_new_tokens=most
            ),
            # a cache of the size that is needed, since its kernels read more of it than that
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=sum(-(-(len(prompt) + count) // PAGE) + 1 for prompt, count in requests),
                max_batch_tokens=max(BATCH_TOKENS, len(requests)),
                max_requests_per_batch=len(requests),
                allow_block_sharing=False,
            ),
        )
        manager.warmup()
        manager.start()
        attention = self._model.config._attn_implementation
        left, finished, tokens = len(requests), 0, 0
        began = time.perf_counter()
        for i, (prompt, count) in enumerate(requests):
            manager.add_request(prompt, request_id=f"r{i}", max_new_tokens=count)
        while left and time.monotonic() < deadline and manager.is_running():
            result = manager.get_result(timeout=1)
            if result is not None and result.error is not None:
                left -= 1
            elif result is not None and result.is_finished():
                left, finished, tokens = left - 1, finished + 1, tokens + len(result.generated_tokens)
        seconds = time.perf_counter() - began
        if not left:
            manager.stop(block=True, timeout=5)
        return Run(len(requests), finished, tokens, seconds, attention)


if __name__ == "__main__":
    main()
