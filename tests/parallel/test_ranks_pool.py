"""Vectors of prompts through stages and shared layers: the bits of one process."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import kernel_sets
import pytest
import torch
from checkpoints import make_model

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import POLICIES
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.executor import Executor
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Command, Step, Submit
from orcaserve.executors.build import build
from orcaserve.executors.distributed import DistributedExecutor

pytestmark = kernel_sets.NEEDS_NATIVE
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "vocab_size": 331, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


class Crowd:
    """Inbox and outbox: all at once, and what each has got."""

    def __init__(self, members: Sequence[NewRequest]) -> None:
        self._commands: list[Command] = [Submit(member) for member in members]
        self.pooled: dict[int, bytes] = {}
        self.num_open = len(members)

    def take(self, block: bool) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    def put(self, step: Step) -> None:
        for output in step.outputs:
            assert output.error is None
            self.pooled[output.id] = self.pooled.get(output.id, b"") + output.pooled
            self.num_open -= output.finish_reason is not None


def vectors(executor: Executor, info: EngineInfo, depth: int, members: Sequence[NewRequest]) -> dict[int, bytes]:
    config = SchedulerConfig(
        policy=POLICIES["default"],
        max_batch_size=8,
        max_batch_tokens=random.choice([48, 100]),
        num_blocks=min(30, info.num_blocks),
        block_size=info.block_size,
        depth=depth,
    )
    crowd = Crowd(members)
    loop = EngineLoop(CheckedScheduler(config), executor, crowd, crowd, time.monotonic)
    while crowd.num_open:
        loop.step()
    return {member.id: crowd.pooled[member.id] for member in members if member.params.pooling}


@pytest.mark.parametrize("sizes", [{"pipeline_parallel": 2}, {"tensor_parallel": 2}], ids=str)
def test_ranks_give_the_vectors_of_one_process(tmp_path: Path, sizes: dict[str, int]) -> None:
    make_model("LlamaConfig", SIZES, seed=5).save_pretrained(tmp_path)
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    members = []
    for i in range(16):
        ids = tuple(chance.randrange(3, 331) for _ in range(chance.choice((1, 7, 60, 150))))
        pooling = ("mean", "last", None)[i % 3]
        params = SamplingParams(temperature=0.0, pooling=pooling)
        members.append(
            NewRequest(id=i, token_ids=ids, num_prompt=len(ids), max_tokens=0 if pooling else 20, params=params, seed=i)
        )
    options = {"model": str(tmp_path), "kv_memory": 1 << 21, "max_model_len": 200, "dtype": "bfloat16"}
    executor, info = build(EngineOptions(**options, threads=1))
    alone = {}
    for member in members:
        alone |= vectors(executor, info, 1, [member])
        executor.forget_all()
    executor, info = build(EngineOptions(**options, threads=2, **sizes))
    assert isinstance(executor, DistributedExecutor)
    try:
        together = vectors(executor, info, sizes.get("pipeline_parallel", 1), members)
    finally:
        executor.close()
        torch.set_num_threads(1)
    assert together == alone
    assert all(len(vector) == 4 * SIZES["hidden_size"] for vector in alone.values())
