"""64 greedy tokens of every architecture are those of transformers, through the real scheduler, loop and worker.

The requests join one after the other, share prefixes, are prefilled in chunks, preempted and aborted.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import kernel_sets
import pytest
import torch
from checkpoints import CASES, VOCAB, expected_logits, expected_tokens, make_model

from orcaserve.core.batch import Batch
from orcaserve.core.policy import DEFAULT
from orcaserve.core.request import NewRequest, Output, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Abort, Command, Step, Submit
from orcaserve.executors.local import Finished, LocalExecutor
from orcaserve.model.load import load_model
from orcaserve.worker.worker import Worker

TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS)
TIE = 1e-5  # of two logits that close, rounding decides which is the greatest


class Script:
    """The inbox: commands by the turn at which they come. Its list is consumed by the loop alone."""

    def __init__(self, commands: dict[int, list[Command]]) -> None:
        self.commands = commands
        self.turn = -1

    def take(self, block: bool) -> list[Command]:
        self.turn += 1
        return self.commands.pop(self.turn, [])


class Collected:
    """The outbox: token ids by request."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, Output] = {}
        self.stats: Any = None

    def put(self, step: Step) -> None:
        self.stats = step.stats
        for output in step.outputs:
            self.tokens.setdefault(output.id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ended[output.id] = output


class Watched:
    """The executor, with a note of how many rows were less than a whole prompt and more than a token."""

    def __init__(self, executor: LocalExecutor) -> None:
        self.executor = executor
        self.num_chunks = 0

    def submit(self, batch: Batch) -> Finished:
        self.num_chunks += sum(not row.samples for row in batch.rows)
        return self.executor.submit(batch)


def check_greedy(model: Any, prompt: list[int], found: list[int]) -> None:
    """Each token is transformers' choice after those before it: so all of them are its greedy output."""
    logits = expected_logits(model, prompt + found[:-1])[len(prompt) - 1 :]
    short = logits.max(-1).values - logits[torch.arange(len(found)), torch.tensor(found)]
    assert short.max() <= TIE, f"token {int(short.argmax())} is not transformers' choice"


def serve(folder: Path, kernels: str, commands: dict[int, list[Command]]) -> Collected:
    """Everything that one set of kernels answers, where memory is short."""
    block_size = 4 if kernels == "torch" else 16
    config = SchedulerConfig(
        policy=DEFAULT, max_batch_size=5, max_batch_tokens=7, num_blocks=224 // block_size, block_size=block_size
    )
    decoder = load_model(folder, backend="native", kernels=kernel_sets.make(kernels))
    scheduler = Scheduler(config)
    executor = Watched(LocalExecutor(Worker(decoder, num_blocks=config.num_blocks, block_size=block_size)))
    inbox, outbox = Script(dict(commands)), Collected()
    loop = EngineLoop(scheduler, executor, inbox, outbox, clock=lambda: 0.0)
    while inbox.commands or scheduler.requests:
        assert loop.step() and inbox.turn < 2000
    assert outbox.stats.num_preemptions > 0 and outbox.stats.prefix_hits > 0 and executor.num_chunks > 10
    return outbox


@pytest.mark.parametrize("name", sorted(CASES))
def test_greedy_tokens(tmp_path: Path, name: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"{name}: seed {seed}")
    rng = random.Random(seed)
    model = make_model(*CASES[name], seed)
    model.save_pretrained(tmp_path)

    shared = [rng.randrange(VOCAB) for _ in range(26)]
    prompts = {}
    for i in range(6):
        own = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
        prompts[i] = shared[: rng.randint(17, 26)] + own  # a block is shared, whatever its size
    prompts[6] = list(prompts[0])  # once more, when its blocks are in the prefix cache
    commands: dict[int, list[Command]] = {}
    for i, prompt in prompts.items():
        new = NewRequest(
            id=i, token_ids=tuple(prompt), num_prompt=len(prompt), max_tokens=TOKENS, params=GREEDY, end_token_ids=()
        )
        commands.setdefault(rng.randint(0, 9) if i < 6 else 40, []).append(Submit(new))
    commands.setdefault(25, []).append(Abort(5))

    own = expected_tokens(model, prompts[0], TOKENS)  # transformers' generation itself, with its cache
    for kernels in kernel_sets.TWIN_AND_BEST:
        outbox = serve(tmp_path, kernels, commands)
        assert sorted(outbox.ended) == [0, 1, 2, 3, 4, 6]
        for i in outbox.ended:
            assert len(outbox.tokens[i]) == TOKENS
            check_greedy(model, prompts[i], outbox.tokens[i])
        assert outbox.tokens[6] == outbox.tokens[0]
        agreed = next((n for n, (a, b) in enumerate(zip(own, outbox.tokens[0], strict=True)) if a != b), TOKENS)
        if agreed < TOKENS:
            top = expected_logits(model, prompts[0] + own[:agreed])[-1].topk(2).values
            assert top[0] - top[1] <= TIE, f"{kernels}: token {agreed} differs"
