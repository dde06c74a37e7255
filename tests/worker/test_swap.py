"""KV that was moved out of the cache and back is what it was: answers with and without swapping have the same bits."""

from __future__ import annotations

import random
import time

import kernel_sets
import pytest
import torch
from checkpoints import make_model

from orcaserve.core.batch import Batch, ScheduledRequest, Swap
from orcaserve.core.config import ModelError, SwapSpace
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import DEFAULT
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Submit
from orcaserve.executors.local import LocalExecutor
from orcaserve.executors.measure import measure
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder
from orcaserve.worker.swap import Swapper
from orcaserve.worker.worker import Worker

VOCAB = 300
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 512, "eos_token_id": 0, "bos_token_id": 1,
}  # fmt: skip
BLOCK = 16
EACH = [*kernel_sets.TWIN_AND_BEST, *(f"{name} kv-int8" for name in kernel_sets.TWIN_AND_BEST)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("qwen3")
    make_model("Qwen3Config", SHAPE, seed=3).save_pretrained(made)
    return made


def load(folder, kernels, dtype=torch.bfloat16):
    return Decoder.load(read_config(folder), folder, dtype, kernels=kernel_sets.make(kernels))


class Crowd:
    """Inbox and outbox of an engine to which all requests come at once."""

    def __init__(self, members):
        self.commands = [Submit(member) for member in members]
        self.outputs = {member.id: [] for member in members}
        self.num_open = len(members)

    def take(self, block):
        commands, self.commands = self.commands, []
        return commands

    def put(self, step):
        for output in step.outputs:
            assert output.error is None
            self.outputs[output.id].append(output)
            self.num_open -= output.finish_reason is not None


def answers(model, members, num_blocks, swap=None, folder=None):
    """What each request was told, and the scheduler."""
    slots = swap.num_slots if swap else 0
    worker = Worker(model, num_blocks=num_blocks, block_size=BLOCK, num_slots=slots, swap_dir=folder)
    for cache in worker._kv:
        kernel_sets.fill_cache(cache, torch.nan)
    config = SchedulerConfig(
        policy=DEFAULT, max_batch_size=6, max_batch_tokens=40, num_blocks=num_blocks, block_size=BLOCK, swap=swap
    )
    scheduler, crowd = CheckedScheduler(config), Crowd(members)
    loop = EngineLoop(scheduler, LocalExecutor(worker), crowd, crowd, time.monotonic)
    while crowd.num_open:
        loop.step()
    told = {
        id: [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in outputs] for id, outputs in crowd.outputs.items()
    }
    return told, scheduler


def draw(rng, count):
    """The first four begin in one block each, so that all of them run in seven blocks, and need three to end."""
    stem = [rng.randrange(2, VOCAB) for _ in range(40)]
    for id in range(count):
        own, shared = (rng.randint(6, BLOCK - 6), 0) if id < 4 else (rng.randint(1, 20), rng.choice([0, 20, 40]))
        prompt = (*stem[:shared], *(rng.randrange(2, VOCAB) for _ in range(own)))
        params = SamplingParams(
            temperature=float(id % 2), logprobs=2, prompt_logprobs=1 if id % 4 == 0 else None, repetition_penalty=1.1
        )
        yield NewRequest(
            id=id, token_ids=prompt, num_prompt=len(prompt), max_tokens=rng.randint(28, 40), params=params, seed=id
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernels", EACH)
def test_answers_are_the_same_with_and_without_swapping(folder, tmp_path, kernels, dtype):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    members = list(draw(random.Random(seed), 7))
    model = load(folder, kernels, dtype)
    roomy, scheduler = answers(model, members, 200)
    assert scheduler.num_preemptions == 0
    for where in (None, str(tmp_path)) if dtype == torch.bfloat16 else (None,):
        space = SwapSpace(num_slots=40, copy_seconds=0.0, token_seconds=1.0)
        tight, scheduler = answers(model, members, 7, space, where)
        assert scheduler.kv.swap.num_swapped > 0
        assert tight == roomy
    assert list(tmp_path.iterdir()) == [], "the file has no name"


@pytest.mark.parametrize("kernels", EACH)
def test_a_swap_moves_every_byte_of_its_blocks_and_no_other(folder, kernels):
    model = load(folder, kernels)
    caches = [model.kernels.kv_cache(5, BLOCK, model.num_kv_heads, model.head_dim, model.dtype) for _ in range(3)]
    parts = [part for cache in caches for part in cache.block_bytes()]
    size = sum(part.shape[1] for part in parts)
    assert size == 3 * BLOCK * model.kernels.kv_bytes_per_token(model.num_kv_heads, model.head_dim, model.dtype)
    for part in parts:
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8))
    before = [part.clone() for part in parts]
    swapper = Swapper(caches, 4)
    swapper.run(
        (Swap(True, (3, 1), (0, 2)), Swap(False, (4,), (0,)), Swap(True, (2,), (0,)), Swap(False, (1, 3), (0, 2)))
    )
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part, old[[0, 2, 2, 1, 3]])


def test_blocks_and_slots_that_are_not_there_are_refused(folder):
    model = load(folder, "torch")
    worker = Worker(model, num_blocks=4, block_size=BLOCK, num_slots=2)
    for swap in (Swap(True, (4,), (0,)), Swap(True, (0,), (2,)), Swap(False, (0,), (2,)), Swap(False, (4,), (0,))):
        with pytest.raises(IndexError):
            worker.run(Batch(1, (), swaps=(swap,)))


@pytest.mark.parametrize("folder_name", ["missing", "full"])
def test_a_file_that_cannot_be_made_is_said_in_a_line(folder, tmp_path, folder_name):
    model = load(folder, "torch")
    where, slots = (tmp_path / "missing", 2) if folder_name == "missing" else (tmp_path, 1 << 36)
    with pytest.raises(ModelError, match="swap space of") as caught:
        Worker(model, num_blocks=4, block_size=BLOCK, num_slots=slots, swap_dir=str(where))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_measured_leaves_nothing_behind(folder):
    """Seconds of a clock that says how long each batch took; afterwards the worker knows nobody."""
    model = load(folder, "torch")
    executor = LocalExecutor(Worker(model, num_blocks=30, block_size=BLOCK, num_slots=8))
    now = iter(x for took in (9.0, 4.0, 8.0, 32.0, 12.8, 20.0) for x in (0.0, took))
    space = measure(
        executor, num_slots=8, num_blocks=30, block_size=BLOCK, max_model_len=400, stages=2, clock=lambda: next(now)
    )
    assert space == SwapSpace(num_slots=8, copy_seconds=4.0 / 16, token_seconds=12.8 / 256)
    row = ScheduledRequest(0, 0, 1, (0,))
    assert executor.submit(Batch(1, (row,))).result().rows[0].error is not None
    assert measure(executor, num_slots=0, num_blocks=30, block_size=BLOCK, max_model_len=400) is None
