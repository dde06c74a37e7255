"""A prompt as one vector: the same bits however it is cut, and the mean of what the model really gave."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import kernel_sets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from orcaserve.core.batch import Batch, RowResult, ScheduledRequest
from orcaserve.core.request import NewRequest, Pooling, SamplingParams
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder
from orcaserve.worker.pooling import INCOMPLETE, NOT_FINITE
from orcaserve.worker.worker import Worker

VOCAB, LENGTH = 300, 300
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def load(folder: Path, dtype: torch.dtype, kernels: str) -> Decoder:
    return Decoder.load(read_config(folder), folder, dtype, kernels=kernel_sets.make(kernels, 1))


def asked(id: int, token_ids: Sequence[int], pooling: Pooling) -> NewRequest:
    params = SamplingParams(pooling=pooling)
    return NewRequest(id=id, token_ids=tuple(token_ids), num_prompt=len(token_ids), max_tokens=0, params=params)


def run(worker: Worker, new: NewRequest, cuts: Sequence[int]) -> list[RowResult]:
    """Its rows, in chunks that end at the cuts. Blocks of 16 from id * 20 on."""
    results, start = [], 0
    for step, end in enumerate([*cuts, new.num_prompt]):
        blocks = tuple(range(new.id * 20 + -(-start // 16), new.id * 20 + -(-end // 16)))
        row = ScheduledRequest(new.id, start, end - start, blocks)
        batch = Batch(step, (row,), (new,) if start == 0 else ())
        results += worker.run(batch).rows
        start = end
    return results


def prompt(seed: int, count: int = LENGTH) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=count)


@pytest.mark.parametrize("kernels", kernel_sets.TWIN_AND_BEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_chunks_change_no_bit(folder: Path, kernels: str, dtype: torch.dtype, pooling: Pooling) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    model = load(folder, dtype, kernels)
    worker = Worker(model, num_blocks=200, block_size=16)
    ids = prompt(seed)
    [alone] = run(worker, asked(0, ids, pooling), [])
    assert alone.error is None and len(alone.pooled) == 4 * CONFIG.hidden_size
    for id in range(1, 5):
        cuts = sorted(rng.sample(range(1, LENGTH), rng.choice([1, 2, 7, 30])))
        *before, end = run(worker, asked(id, ids, pooling), cuts)
        assert not any(row.pooled or row.error for row in before)
        assert end.pooled == alone.pooled, (seed, cuts)


def test_it_is_the_mean_of_the_final_values(folder: Path) -> None:
    """Against the sum as it is defined: in float32, one token after the other."""
    model = load(folder, torch.float32, "torch")
    worker = Worker(model, num_blocks=200, block_size=16)
    ids = prompt(3)
    [mean] = run(worker, asked(0, ids, "mean"), [])
    total = None
    for end in range(1, LENGTH + 1):  # the last of each beginning
        [last] = run(worker, asked(1, ids[:end], "last"), [])
        value = np.frombuffer(last.pooled, "<f4")
        total = value.copy() if total is None else total + value
        worker.run(Batch(0, (), (), (1,)))
    assert mean.pooled == (total / np.float32(LENGTH)).astype("<f4").tobytes()


def test_rows_that_are_computed_again_count_once(folder: Path) -> None:
    """An iteration that fails for one is tried again for each: what was summed is not summed twice."""
    model = load(folder, torch.float32, "torch")

    class Shaky:
        """The real decoder, which cannot compute two requests at a time once, after it has answered the first."""

        def __init__(self) -> None:
            self.finals = 0

        def __getattr__(self, name: str) -> object:
            return getattr(model, name)

        def final(self, hidden: torch.Tensor) -> torch.Tensor:
            self.finals += 1
            if self.finals == 2:
                raise RuntimeError("on purpose")
            return model.final(hidden)

    ids = prompt(4, 60)
    [alone] = run(Worker(model, num_blocks=200, block_size=16), asked(0, ids, "mean"), [])
    shaky = Shaky()
    worker = Worker(shaky, num_blocks=200, block_size=16)
    both = [asked(0, ids, "mean"), asked(1, ids, "mean")]
    first = [ScheduledRequest(id, 0, 40, tuple(range(id * 20, id * 20 + 3))) for id in (0, 1)]
    second = [ScheduledRequest(id, 40, 20, (id * 20 + 3,)) for id in (0, 1)]
    worker.run(Batch(1, tuple(first), tuple(both)))
    assert shaky.finals > 2
    assert [row.pooled for row in worker.run(Batch(2, tuple(second))).rows] == [alone.pooled] * 2


def test_a_mean_without_its_beginning_is_an_error(folder: Path) -> None:
    worker = Worker(load(folder, torch.float32, "torch"), num_blocks=20, block_size=16)
    row = ScheduledRequest(0, 16, 4, (0, 1))
    [got] = worker.run(Batch(1, (row,), (asked(0, prompt(5, 20), "mean"),))).rows
    assert (got.error, got.pooled) == (INCOMPLETE, b"")


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_nan_fails_its_own_request(folder: Path, pooling: Pooling) -> None:
    model = load(folder, torch.float32, "torch")

    class Poisoned:
        def __getattr__(self, name: str) -> object:
            return getattr(model, name)

        def forward(self, x: torch.Tensor, layout: object, kv: object) -> torch.Tensor:
            return model.forward(x, layout, kv).masked_fill((x == 9)[:, None], torch.nan)

    worker = Worker(Poisoned(), num_blocks=20, block_size=16)
    new = (asked(0, [5, 6, 9], pooling), asked(1, [5, 6, 7], pooling))
    rows = tuple(ScheduledRequest(id, 0, 3, (id,)) for id in (0, 1))
    results = worker.run(Batch(1, rows, new)).rows
    assert [got.error for got in results] == [NOT_FINITE, None]
    assert results[1].pooled
