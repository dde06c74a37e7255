"""Prints as JSON what an engine inside this process answers, for machines that are emulated: KERNELS and KV_DTYPE.

Every request runs alone, then all of them run together in chunks. Log-probabilities are written bit by bit.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence

from orcaserve.builtin import MODEL_DIR
from orcaserve.core.config import EngineOptions
from orcaserve.core.policy import POLICIES
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.executor import Executor
from orcaserve.executors.build import build
from orcaserve.ops.native_kernels import instruction_sets


def requests(first: int) -> list[NewRequest]:
    """The same whenever it is called, but for their ids, which begin at `first`."""
    chance = random.Random(7)
    made = []
    for i, (prompt, tokens) in enumerate([(40, 6), (1, 9), (150, 4), (17, 12)]):
        ids = tuple(chance.randrange(300, 1500) for _ in range(prompt))
        params = SamplingParams(temperature=float(i % 2), logprobs=2)
        made.append(
            NewRequest(id=first + i, token_ids=ids, num_prompt=prompt, max_tokens=tokens, params=params, seed=i)
        )
    return made


def run(executor: Executor, config: SchedulerConfig, members: Sequence[NewRequest]) -> list[list[object]]:
    """[token id, log-probabilities] of every token of every member."""
    scheduler = Scheduler(config)
    answers: dict[int, list[object]] = {member.id: [] for member in members}
    for member in members:
        scheduler.add(member)
    while (batch := scheduler.schedule()) is not None:
        for output in scheduler.update(batch, executor.submit(batch).result()):
            for token, scores in zip(output.token_ids, output.logprobs, strict=True):
                answers[output.id].append([token, scores.logprob.hex(), [value.hex() for _, value in scores.top]])
    return list(answers.values())


def main() -> None:
    kernels, kv_dtype = sys.argv[1:]
    options = EngineOptions(
        model=str(MODEL_DIR), threads=1, kernels=kernels, kv_dtype=kv_dtype, kv_memory=8 << 20, max_model_len=256
    )
    executor, info = build(options)
    config = SchedulerConfig(
        policy=POLICIES["default"],
        max_batch_size=8,
        max_batch_tokens=48,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
    )
    alone = [answer for i in range(4) for answer in run(executor, config, requests(10 * i)[i : i + 1])]
    together = run(executor, config, requests(100))
    print(json.dumps({"sets": instruction_sets(), "alone": alone, "together": together}))


main()
