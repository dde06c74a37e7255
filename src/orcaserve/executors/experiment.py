"""`engine_for`: one loaded model on which experiments run one scheduler after another, and their default model.

It is built as for serving (`build`), once, with KV memory for the largest experiment; on the CPU, whose name and
threads the reports have, and whose executor computes while a batch is submitted.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from orcaserve.bench.paper.engine import Device, Engine
from orcaserve.core.config import ControlPlane, EngineInfo, EngineOptions
from orcaserve.executors.build import build
from orcaserve.executors.distributed import make_places, start_workers
from orcaserve.model.config import read_config
from orcaserve.model.random_checkpoint import Shape, write_random

RANDOM = "random-29m"  # what the generated model is called
SHAPE = Shape(layers=8, hidden=512, mlp=1536, heads=8, kv_heads=4, vocab=4096, max_positions=2048)
LONGEST, ROWS = 2048, 32  # the longest request and the largest batch of any experiment


@contextmanager
def random_model() -> Iterator[Path]:
    """A folder with a model of SHAPE and random weights, for as long as it is needed."""
    with TemporaryDirectory(prefix="orcaserve-") as folder:
        write_random(Path(folder), SHAPE)
        yield Path(folder)


def engine_for(
    name: str, folder: Path, threads: int | None, swap_space: int = 0, swap_dir: str | None = None
) -> Engine:
    """Loads a model into this process. Raises ModelError, in one line, if it cannot be served here."""
    options = _options(folder, threads=threads, swap_space=swap_space, swap_dir=swap_dir)
    executor, info = build(options)
    return engine_of(name, executor, info)


@contextmanager
def engine_of_ranks(
    name: str, folder: Path, *, tensor: int, pipeline: int, threads: int, control: ControlPlane = "separate"
) -> Iterator[tuple[Engine, Callable[[], tuple[float, ...]], Callable[[], list[list[float]]]]]:
    """A model on worker processes, one even for a single rank.

    Beside it what tells their busy seconds so far, and what they took at each batch since they were asked.

    threads: of all of them. Raises ModelError, in one line, if it cannot be served here.
    """
    options = _options(
        folder, tensor_parallel=tensor, pipeline_parallel=pipeline, control_plane=control, threads=threads
    )
    executor, info = start_workers(options, None, None)
    try:
        yield engine_of(name, executor, info), lambda: executor.busy_seconds, executor.take_seconds
    finally:
        executor.close()


def layers_of_stages(folder: Path, stages: int) -> list[int]:
    """Layers of each stage, as the engine cuts this model."""
    options = EngineOptions(model=str(folder), pipeline_parallel=stages)
    return [last - first for first, last in make_places(read_config(folder), options)[0].stages]


def _options(folder: Path, **others: Any) -> EngineOptions:
    return EngineOptions(
        model=str(folder),
        device="cpu",
        policy="orca",  # whole prompts: the most that an iteration may need
        max_batch_size=ROWS,
        max_model_len=min(LONGEST, read_config(folder).max_positions),
        **others,
    )


def engine_of(name: str, device: Device, info: EngineInfo) -> Engine:
    """What an experiment is given, from what an executor says of itself."""
    size = {line.name: line.num_bytes for line in info.budget}
    return Engine(
        device=device,
        model=name,
        architecture=info.architecture,
        dtype=info.dtype,
        profile=info.profile,
        weight_bytes=size["weights"],
        bytes_per_token=size["KV cache"] // (info.num_blocks * info.block_size),
        vocab_size=info.vocab_size,
        max_model_len=info.max_model_len,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        threads=info.threads,
        swap=info.swap,
        overlap=info.overlap,
    )


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"Python": platform.python_version(), "torch": str(torch.__version__)}
