"""Every row of the table computes what transformers computes, whatever the batch, the chunks and the stages."""

from __future__ import annotations

import random
from pathlib import Path

import kernel_sets
import pytest
import torch
from checkpoints import CASES, VOCAB, Bench, expected_logits, load, make_model

from orcaserve.model.architectures import ARCHITECTURES
from orcaserve.model.config import read_config

TOLERANCE = 1e-4
LENGTH = 40


@pytest.fixture(params=sorted(CASES), scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    seed = random.randrange(1 << 30)
    print(f"{request.param}: seed {seed}")
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(*CASES[request.param], seed)
    model.save_pretrained(folder)
    return folder, model, random.Random(seed)


@pytest.fixture(params=kernel_sets.TWIN_AND_BEST)
def kernels(request: pytest.FixtureRequest):
    return kernel_sets.make(request.param)


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


def test_prompt_matches_transformers(checkpoint, kernels) -> None:
    folder, model, rng = checkpoint
    tokens = prompt(rng, LENGTH)
    (found,) = Bench(load(folder, kernels=kernels)).step([(0, tokens)])
    wanted = expected_logits(model, tokens)
    assert found.dtype == torch.float32 and found.shape == (LENGTH, VOCAB)
    assert wanted.std() > 0.1  # else agreement would say nothing
    assert (found - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_batch_or_chunks(checkpoint, kernels, dtype) -> None:
    """Requests that join, leave and are chunked at random get the bits that each of them gets alone and whole."""
    folder, _, rng = checkpoint
    stages = load(folder, dtype, kernels=kernels)
    prompts = {i: prompt(rng, length) for i, length in enumerate([LENGTH, 17, 33, 1, 9])}
    alone = {i: Bench(stages).step([(i, tokens)])[0] for i, tokens in prompts.items()}
    bench, found, left = Bench(stages, seed=rng.randrange(99)), {i: [] for i in prompts}, dict(prompts)
    while left:
        rows = []
        for i in rng.sample(sorted(left), rng.randint(1, len(left))):
            n = rng.choice([1, 1, 2, 5, 40])
            rows.append((i, left[i][:n]))
            left[i] = left[i][n:]
        for (i, _), logits in zip(rows, bench.step(rows), strict=True):
            found[i].append(logits)
        left = {i: tokens for i, tokens in left.items() if tokens}
    for i, parts in found.items():
        assert torch.equal(torch.cat(parts), alone[i]), f"request {i}"


def test_stages_add_up(checkpoint, kernels) -> None:
    folder, _, rng = checkpoint
    tokens = prompt(rng, 11)
    (whole,) = Bench(load(folder, kernels=kernels)).step([(0, tokens)])
    (staged,) = Bench(load(folder, cuts=[1, 2], kernels=kernels)).step([(0, tokens)])
    assert torch.equal(whole, staged)


def test_every_row_has_a_case(tmp_path: Path) -> None:
    covered = set()
    for name, (config_class, arguments) in CASES.items():
        make_model(config_class, arguments, 0).config.save_pretrained(tmp_path / name)
        covered.add(read_config(tmp_path / name).architecture)
    assert covered == set(ARCHITECTURES)
