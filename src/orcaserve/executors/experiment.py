"""`engine_for`: one loaded model on which experiments run one scheduler after another, and their default model.

It is built as for serving (`build`), once, with KV memory for the largest experiment.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from orcaserve.bench.paper.engine import Engine
from orcaserve.core.config import EngineOptions
from orcaserve.executors.build import build
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


def engine_for(name: str, folder: Path, threads: int | None) -> Engine:
    """Loads a model. Raises ModelError, in one line, if it cannot be served here."""
    options = EngineOptions(
        model=str(folder),
        threads=threads,
        policy="orca",  # whole prompts: the most that an iteration may need
        max_batch_size=ROWS,
        max_model_len=min(LONGEST, read_config(folder).max_positions),
    )
    executor, info = build(options)
    size = {line.name: line.num_bytes for line in info.budget}
    return Engine(
        device=executor,
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
    )


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"Python": platform.python_version(), "torch": str(torch.__version__)}
