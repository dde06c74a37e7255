"""Real worker processes: the same answers whatever the tensor- and pipeline-parallel sizes, and what their ends do."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import kernel_sets
import msgspec
import psutil
import pytest
import torch
from checkpoints import make_model

from orcaserve.core.config import EngineInfo, EngineOptions, ModelError, SwapSpace
from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import POLICIES
from orcaserve.core.request import NewRequest, Output, SamplingParams
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.executor import Executor, WorkerLost
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Command, Step, Submit
from orcaserve.executors.build import Lost, build
from orcaserve.executors.distributed import DistributedExecutor

pytestmark = kernel_sets.NEEDS_NATIVE

VOCAB = 331
_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
SHAPES = {
    "gpt2": (
        "GPT2Config",
        {"n_embd": 64, "n_layer": 5, "n_head": 8, "n_positions": 256, "vocab_size": VOCAB, "bos_token_id": 1,
         "eos_token_id": 2},
    ),
    "llama": ("LlamaConfig", _SIZES),
    "qwen3": ("Qwen3Config", {**_SIZES, "head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", {**_SIZES, "num_local_experts": 6, "num_experts_per_tok": 2}),
}  # fmt: skip
SIZES = (1, 2, 4)
SOME = [("gpt2", 4, 1), ("mixtral", 2, 2)]  # two ranks are those that swap, 2 x 2 of a plain MLP those of the variants
VARIANTS = [{"control_plane": "mixed"}, {"stage_split": "equal"}, {"quantization": "int8"}]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tensor" in metafunc.fixturenames:
        grid = [case for case in itertools.product(SHAPES, SIZES, SIZES) if case[1:] != (1, 1)]
        metafunc.parametrize(("shape", "tensor", "pipeline"), grid if metafunc.config.getoption("whole_grid") else SOME)
    if "variant" in metafunc.fixturenames:
        everything = dict(itertools.chain.from_iterable(variant.items() for variant in VARIANTS))
        metafunc.parametrize("variant", VARIANTS if metafunc.config.getoption("whole_grid") else [everything])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, (config, sizes) in SHAPES.items():
        made[name] = tmp_path_factory.mktemp(name)
        make_model(config, sizes, seed=5).save_pretrained(made[name])
    return made


@contextmanager
def engine(folder: Path, on_lost: Lost | None = None, **options) -> Iterator[tuple[Executor, EngineInfo]]:
    options = EngineOptions(model=str(folder), kv_memory=1 << 21, max_model_len=200, **options)
    executor, info = build(options, None, on_lost)
    try:
        yield executor, info
    finally:
        if isinstance(executor, DistributedExecutor):
            executor.close()
        torch.set_num_threads(1)


class Crowd:
    """Inbox and outbox of an engine to which all requests come at once."""

    def __init__(self, members: Sequence[NewRequest]) -> None:
        self._commands: list[Command] = [Submit(member) for member in members]
        self.outputs: dict[int, list[Output]] = {member.id: [] for member in members}
        self.num_open = len(members)

    def take(self, block: bool) -> list[Command]:
        commands, self._commands = self._commands, []
        return commands

    def put(self, step: Step) -> None:
        for output in step.outputs:
            self.outputs[output.id].append(output)
            self.num_open -= output.finish_reason is not None


def requests(seed: int, count: int) -> list[NewRequest]:
    chance = random.Random(seed)
    made = []
    for i in range(count):
        prompt = tuple(chance.randrange(3, VOCAB) for _ in range(chance.choice((1, 7, 40, 120))))
        params = SamplingParams(
            temperature=float(i % 2), logprobs=3, prompt_logprobs=2 if i % 3 == 0 else None, top_p=0.9
        )
        made.append(
            NewRequest(
                id=i, token_ids=prompt, num_prompt=len(prompt), max_tokens=chance.randint(1, 30), params=params, seed=i
            )
        )
    return made


def answers(
    executor: Executor,
    info: EngineInfo,
    depth: int,
    members: Sequence[NewRequest],
    policy: str = "default",
    num_blocks: int = 24,  # so that some are preempted
    swap: SwapSpace | None = None,
) -> list:
    """Tokens and log-probabilities of each, to the bit."""
    config = SchedulerConfig(
        policy=POLICIES[policy],
        max_batch_size=8,
        max_batch_tokens=48,
        num_blocks=min(num_blocks, info.num_blocks),
        block_size=info.block_size,
        depth=depth,
        swap=swap,
    )
    scheduler, crowd = CheckedScheduler(config), Crowd(members)
    loop = EngineLoop(scheduler, executor, crowd, crowd, time.monotonic)
    while crowd.num_open:
        loop.step()
    assert swap is None or scheduler.kv.swap.num_swapped > 0, "nobody was swapped out"
    found = []
    for member in members:
        outputs = crowd.outputs[member.id]
        scores = [score for output in outputs for score in (*output.prompt_logprobs, *output.logprobs)]
        assert outputs[-1].error is None
        found.append(
            (
                [token for output in outputs for token in output.token_ids],
                [(score.token_id, score.logprob.hex(), score.rank, score.top) for score in scores],
            )
        )
    return found


def test_ranks_answer_as_one_process(folders, shape, tensor, pipeline, pytestconfig):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    is_whole = pytestconfig.getoption("whole_grid")
    members = requests(seed, 16 if is_whole else 10)
    for dtype in ("bfloat16", "float32") if is_whole else ("bfloat16",):
        with engine(folders[shape], threads=1, dtype=dtype) as (executor, info):
            alone = answers(executor, info, 1, members)
            profile = info.profile
        sizes = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
        with engine(folders[shape], threads=2, dtype=dtype, **sizes) as (executor, info):
            assert info.profile == profile
            assert isinstance(executor, DistributedExecutor) and len(executor.pids) == tensor * pipeline
            together = answers(executor, info, pipeline, members)
            executor.forget_all()
            again = answers(executor, info, pipeline, members, policy="orca")
        assert together == alone
        assert again == alone
        assert not any(psutil.pid_exists(pid) for pid in executor.pids)


def test_variants_answer_as_one_process(folders, variant):
    """All of them in one engine; with --whole-grid each by itself."""
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    members = requests(seed, 10)
    quantization = variant.get("quantization", "none")
    with engine(folders["qwen3"], threads=1, quantization=quantization) as (executor, info):
        alone = answers(executor, info, 1, members)
    with engine(folders["qwen3"], tensor_parallel=2, pipeline_parallel=2, **variant) as (executor, info):
        assert answers(executor, info, 2, members) == alone


@pytest.mark.parametrize(
    ("sizes", "number"), [({"pipeline_parallel": 2}, signal.SIGKILL), ({"tensor_parallel": 2}, signal.SIGSTOP)]
)
def test_ranks_swap_their_own_shares_and_a_lost_one_is_noticed_within_a_second(folders, tmp_path, sizes, number):
    """They swap in memory for the stages, in files for those that share layers."""
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    told, noticed = [], threading.Event()

    def on_lost(why: str) -> None:
        told.append((time.monotonic(), why))
        noticed.set()

    members = [msgspec.structs.replace(member, max_tokens=60) for member in requests(seed, 12)]
    with engine(folders["qwen3"], threads=1) as (executor, info):
        alone = answers(executor, info, 1, members)
    swap = {"swap_space": 1 << 20, "swap_dir": str(tmp_path) if "tensor_parallel" in sizes else None}
    with engine(folders["qwen3"], on_lost, threads=2, **swap, **sizes) as (executor, info):
        measured = info.swap
        assert measured.num_slots > 20 and measured.copy_seconds > 0 and measured.token_seconds > 0
        always = msgspec.structs.replace(measured, copy_seconds=0.0)
        depth = sizes.get("pipeline_parallel", 1)
        assert answers(executor, info, depth, members, num_blocks=13, swap=always) == alone
        assert not told
        at = time.monotonic()
        os.kill(executor.pids[1], number)
        assert noticed.wait(10)
        [(then, why)] = told
        print(f"noticed after {then - at:.2f} s: {why}")
        assert "worker 1" in why
        with pytest.raises(WorkerLost):
            answers(executor, info, depth, requests(2, 3))
    assert list(tmp_path.iterdir()) == []
    assert not any(psutil.pid_exists(pid) for pid in executor.pids)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tensor_parallel": 3}, "shared by 1, 2, 4, 8 ranks, not by 3"),
        ({"pipeline_parallel": 6}, "5 layers make no 6 stages"),
        ({"tensor_parallel": 2, "kernels": "torch"}, "native kernels"),
        ({"pipeline_parallel": 2, "backend": "transformers"}, "one process"),
        ({"pipeline_parallel": 2, "max_model_len": 4000}, "the model's longest is 256"),
        ({"nnodes": 2}, "1 ranks cannot be spread evenly over 2 hosts"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(folders, options, says):
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ModelError, match=says) as caught:
        build(EngineOptions(model=str(folders["llama"]), **options))
    assert "\n" not in str(caught.value)
    assert set(psutil.Process().children(recursive=True)) <= before, "no worker is left"


def test_a_worker_that_dies_while_loading_is_no_fault_of_the_model(folders):
    """Another start may do better, so that it must not be told as a model that cannot be served."""

    before = psutil.Process().children()  # of others, such as a server that serves all of this process's tests

    def on_progress(*_: object) -> None:
        for child in psutil.Process().children():
            if child not in before:
                with suppress(psutil.NoSuchProcess):  # the other's death has ended it
                    child.kill()

    with pytest.raises(WorkerLost, match=r"worker . is gone \(signal 9\)"):
        build(EngineOptions(model=str(folders["llama"]), tensor_parallel=2, threads=2), on_progress)
