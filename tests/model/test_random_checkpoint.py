"""A random checkpoint is the same for the same seed, loads as any other, and gives numbers one can compute with."""

from __future__ import annotations

from pathlib import Path

from orcaserve.core.batch import Batch, ScheduledRequest
from orcaserve.core.config import EngineOptions
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.executors.build import build
from orcaserve.model.random_checkpoint import Shape, write_random

SHAPE = Shape(layers=2, hidden=64, mlp=96, heads=4, kv_heads=2, vocab=300, max_positions=128)


def test_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        write_random(tmp_path / name, SHAPE, seed)
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


def test_it_generates_and_a_cleared_executor_answers_the_same(tmp_path: Path) -> None:
    write_random(tmp_path, SHAPE)
    executor, info = build(EngineOptions(model=str(tmp_path), threads=1, kv_memory=1 << 20))
    assert (info.architecture, info.dtype, info.max_model_len) == ("LlamaForCausalLM", "bfloat16", 128)
    params = SamplingParams(temperature=0, logprobs=0)
    new = NewRequest(id=1, token_ids=tuple(range(9)), num_prompt=9, max_tokens=4, params=params)
    batch = Batch(step=1, rows=(ScheduledRequest(1, 0, 9, (0,), (), True),), new=(new,))
    first = executor.submit(batch).result()
    assert first.rows[0].error is None and first.rows[0].token_id is not None
    executor.forget_all()
    assert executor.submit(batch).result() == first
