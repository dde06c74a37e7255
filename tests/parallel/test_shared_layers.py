"""Every architecture on 1, 2 and 4 ranks that share its layers, bit for bit; the cut maps by themselves."""

from __future__ import annotations

import itertools
import random

import kernel_sets
import pytest
import torch
from checkpoints import CASES, VOCAB, Bench, make_model
from thread_group import ThreadGroup, on_every_rank

from orcaserve.core.config import ModelError
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder
from orcaserve.model.plan import plan, shared
from orcaserve.ops.native_kernels import NativeKernels
from orcaserve.parallel.split import Split

pytestmark = kernel_sets.NEEDS_NATIVE


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make_model(*CASES[request.param], seed=3).save_pretrained(path)
    return path


def logits_of(decoder: Decoder, iterations) -> list[torch.Tensor] | None:
    """Of every row of every iteration."""
    bench = Bench([decoder])
    found = []
    for rows in iterations:
        step = bench.hidden(rows)
        found.append(decoder.logits(step))
    return None if found[0] is None else found


def draw_iterations(seed: int) -> list[list[tuple[int, list[int]]]]:
    """Prompts whole and in pieces, then tokens one by one, of three requests together."""
    chance = random.Random(seed)

    def some(n: int) -> list[int]:
        return [chance.randrange(VOCAB) for _ in range(n)]

    return [
        [(0, some(11)), (1, some(1))],
        [(0, some(1)), (1, some(5)), (2, some(61))],  # enough rows that each rank finishes some of them
        *([(r, some(1)) for r in range(3)] for _ in range(3)),
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_layers_have_the_bits_of_one(folder, size):
    seed = random.randrange(10**6)
    print("seed", seed)
    config = read_config(folder)
    if config.num_heads % size:
        with pytest.raises(ModelError, match="tensor-parallel size that divides"):
            shared(config, Split(0, size))
        return
    iterations = draw_iterations(seed)
    for dtype in (torch.float32, torch.bfloat16):
        kernels = NativeKernels(1)
        alone = logits_of(Decoder.load(config, folder, dtype, kernels=kernels), iterations)

        def run(group: ThreadGroup, dtype: torch.dtype = dtype):
            kernels = NativeKernels(1)
            return logits_of(Decoder.load(config, folder, dtype, kernels=kernels, group=group), iterations)

        first, *others = on_every_rank(size, run)
        assert others == [None] * (size - 1)
        for one, other in zip(alone, first, strict=True):
            assert torch.equal(one, other)


def test_a_rank_reads_its_own_part_of_the_files(folder):
    config = read_config(folder)
    whole = plan(config, 0, config.num_layers)
    parts = [plan(config, 0, config.num_layers, Split(rank, 2)) for rank in range(2)]
    for key, spec in whole.items():
        taken = [part[key].num_values for part in parts if key in part]
        copies = spec.num_values * 2
        assert sum(taken) in (spec.num_values, copies)
        if len(spec.shape) == 2 and not any(word in key for word in ("router", "positions", "project", "expert")):
            assert sum(taken) == spec.num_values, key
        if "expert" in key:
            assert taken == [spec.num_values], f"{key} belongs to one rank"
    # stages take each layer once, and nothing of the others
    cut = config.num_layers // 2
    stages = [plan(config, 0, cut), plan(config, cut, config.num_layers)]
    assert set(stages[0]) | set(stages[1]) == set(whole)
    assert set(stages[0]) & set(stages[1]) <= {"embed.weight"}


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", kernel_sets.EVERY[1:])
def test_joined_parts_are_the_whole_map(name, dtype, quantization):
    seed = random.randrange(10**6)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    kernels = NativeKernels(1, name, quantization=quantization)
    n, k = 83, 512
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    for m, given, added in itertools.product((1, 5, 19), (False, True), (False, True)):
        x = torch.randn(m, k, generator=generator).to(dtype)
        residual = torch.randn(m, n, generator=generator).to(dtype) if added else None
        whole = kernels.linear([weight], [bias if given else None], cut=True)(x, residual)
        for size in (2, 4, 8):
            width = k // size
            parts = torch.stack(
                [
                    kernels.partial(weight[:, at : at + width], size)(x[:, at : at + width].contiguous())
                    for at in range(0, k, width)
                ]
            )
            joined = kernels.join(parts, bias.float() if given else None, residual, dtype)
            assert torch.equal(joined, whole), (m, size)
            twin = kernel_sets.make("torch").join(parts, bias.float() if given else None, residual, dtype)
            assert torch.equal(twin, whole), (m, size)


def test_what_cannot_be_shared_is_refused_in_a_line(tmp_path):
    make_model(*CASES["llama-2"], seed=3).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    with pytest.raises(ModelError, match="shared by 1, 2, 4, 8 ranks, not by 3"):
        shared(config, Split(0, 3))
    with pytest.raises(ModelError, match="4 heads cannot be shared by 8 ranks"):
        shared(config, Split(0, 8))
    with pytest.raises(ModelError, match="native kernels"):
        on_every_rank(2, lambda group: Decoder.load(config, tmp_path, torch.float32, group=group))
