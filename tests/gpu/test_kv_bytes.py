"""Keys and values in bytes on a device: those of the CPU's, attended to as what they stand for, under the promise."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from test_device_worker import draw_request, folders, on_cpu, on_device, serve  # noqa: F401 - a fixture
from test_norm_and_heads import BLOCK_SIZE, layout_of, noise
from test_paged_attention import CAPPED, PLAIN, SLOPED, WINDOW, World, compare, same_bits

from orcaserve.core.batch import Swap
from orcaserve.ops.attention import ScaledBytes
from orcaserve.ops.gpu.attention import Tuning
from orcaserve.ops.gpu.benchmark import fill
from orcaserve.ops.gpu.heads import heads
from orcaserve.ops.gpu.kernels import TritonKernels
from orcaserve.ops.gpu.layout import SPAN
from orcaserve.ops.rotary import Rotary
from orcaserve.ops.torch_kernels import TorchKernels
from orcaserve.worker.swap import Swapper

DTYPES = [torch.bfloat16, torch.float32]


class ScaledWorld(World):
    """With a cache of bytes, where all that is nobody's has a scale of NaN.

    bad_key, bad_value: (request, position, kv head) of one that is not finite.
    """

    def __init__(
        self,
        device: torch.device,
        lengths: list[int],
        *,
        bad_key: tuple[int, int, int] | None = None,
        bad_value: tuple[int, int, int] | None = None,
        **options: object,
    ):
        super().__init__(device, lengths, **options)
        num_blocks, kv_heads = self.k.shape[:2]
        caches = []
        for name, bad in (("keys", bad_key), ("values", bad_value)):
            cache = ScaledBytes.empty(num_blocks, self.block_size, kv_heads, self.d)
            cache.values.fill_(77)
            cache.scales.fill_(math.nan)
            for i, request in enumerate(self.requests):
                new = getattr(request, name).cpu()
                if bad is not None and bad[0] == i:
                    new[bad[1:]] = math.inf if name == "keys" else math.nan
                places = torch.arange(len(new))
                slots = torch.tensor(request.blocks)[places // self.block_size] * self.block_size
                slots += places % self.block_size
                cache.store(new, slots)
                every = (slots[:, None] * kv_heads + torch.arange(kv_heads)).flatten()
                kept = cache.values.view(-1, self.d)[every].double() * cache.scales.view(-1)[every, None].double()
                self.requests[i] = replace(self.requests[i], **{name: kept.view(new.shape).to(device)})
            caches.append(cache)
        self.k, self.v = (cache.values.transpose(1, 2).contiguous().to(device) for cache in caches)
        self.scales = torch.stack([cache.scales.transpose(1, 2) for cache in caches], -1).contiguous().to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        (PLAIN, {"kv_heads": 2}),
        (WINDOW, {"group": 4, "d": 128}),
        (CAPPED, {"d": 80, "group": 1}),
        (WINDOW | SLOPED, {"d": 128, "block_size": 16, "group": 1}),
    ],
)
def test_agrees_with_a_plain_softmax_over_what_the_bytes_stand_for(
    device: torch.device, dtype: torch.dtype, options: dict[str, object], shape: dict[str, int]
) -> None:
    compare(ScaledWorld(device, [SPAN + 9, 70], dtype=dtype, **options, **shape), dtype)


@pytest.mark.parametrize(("dtype", "options"), [(torch.bfloat16, CAPPED), (torch.float32, WINDOW | SLOPED)])
def test_a_token_has_the_same_bits_decoded_and_in_any_chunk(
    device: torch.device, dtype: torch.dtype, options: dict[str, object]
) -> None:
    start, length = SPAN - 4, SPAN + 12
    world = ScaledWorld(device, [length, 40], dtype=dtype, group=4, **options)
    whole = world.run([], [(0, start, length - start)])
    assert torch.isfinite(whole).all()
    at = [SPAN - 1, SPAN, length - 1]
    for programs, dealt in ((1, 0), (100, 4)):
        mixed = world.run([(1, 3), None, *((0, position) for position in at)], [(0, SPAN + 1, 8)], programs=programs)
        assert world.dealt == dealt  # two tokens see two spans
        assert same_bits(mixed[2:5], whole[[position - start for position in at]])
        assert same_bits(mixed[5:], whole[SPAN + 1 - start : SPAN + 9 - start])
    cut = world.run([], [(0, SPAN - 1, 3)], tile=2, tuning=Tuning(2, 128 if dtype == torch.bfloat16 else 16))
    assert same_bits(cut, whole[SPAN - 1 - start : SPAN + 2 - start])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["bad_key", "bad_value"])
def test_what_is_not_finite_reaches_those_who_see_it_and_nobody_else(
    device: torch.device, dtype: torch.dtype, which: str
) -> None:
    """Not those of the same chunk that stand before it, nor those whose window has left it behind."""
    window, place = 40, 70
    sound, spoilt = (
        ScaledWorld(device, [place + window + 6, 80], dtype=dtype, kv_heads=2, window=window, **bad)
        for bad in ({}, {which: (0, place, 1)})
    )
    decodes = [(1, 79), (0, place - 1), (0, place), (0, place + window - 1), (0, place + window)]
    chunks = [(0, place - 4, 10), (0, place + window - 3, 6), (1, 66, 5)]
    rows = [*decodes, *((request, start + i) for request, start, count in chunks for i in range(count))]
    sees = torch.tensor([request == 0 and place <= at < place + window for request, at in rows], device=device)
    assert 0 < sees.sum() < len(rows)
    clean, got = sound.run(decodes, chunks), spoilt.run(decodes, chunks)
    half = got.shape[1] // 2
    assert torch.isfinite(clean).all()
    assert same_bits(got[:, :half].contiguous(), clean[:, :half].contiguous())  # heads of the other kv head
    assert torch.equal(got[:, half:].isnan(), sees[:, None].expand(-1, half))
    assert same_bits(got[~sees].contiguous(), clean[~sees].contiguous())


def test_float16_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="float16"):
        ScaledWorld(device, [3], dtype=torch.float16).run([(0, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "d", "rotary_dim", "normed"),
    [(9, 3, 80, 32, True), (4, 1, 128, 128, False), (10, 10, 64, 0, False)],
)
def test_what_is_stored_is_what_the_cpu_stores(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, d: int, rotary_dim: int, normed: bool
) -> None:
    positions, slots = [0, 300, 7, 0, 41, 9, 12, 80], [17, 5, -1, 47, 3, 22, 23, 40]
    qkv = noise(6, 8, (num_heads + 2 * num_kv_heads) * d, dtype=dtype, device=device)
    first = num_heads * d
    ties = torch.arange(d) % 40 - 20.5
    ties[3] = 127.0
    qkv[0, first:] = 0.0
    qkv[1, first:] *= 1e-33
    qkv[4, first:] = ties.repeat(2 * num_kv_heads).to(dtype)
    qkv[5, first + 1], qkv[5, -1] = math.inf, math.nan
    qkv[6, first:] *= 1e30
    norms = [noise(seed, d, dtype=dtype, device=device) if normed else None for seed in (7, 8)]
    rotary = Rotary(10000.0 ** -(torch.arange(rotary_dim // 2) / max(rotary_dim // 2, 1)))
    options = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": d,
        "q_norm": norms[0],
        "k_norm": norms[1],
        "eps": 1e-6,
        "plus_one": False,
        "table": rotary.angles(300).to(device) if rotary_dim else None,
        "interleaved": False,
        "rotary_dim": rotary_dim,
    }
    shape = (3, num_kv_heads, BLOCK_SIZE, d)
    layout = layout_of(positions, slots, device)
    plain = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
    queries = heads(qkv, layout, *plain, **options)
    kept = [torch.full(shape, 99, dtype=torch.int8, device=device) for _ in range(2)]
    scales = torch.full((*shape[:3], 2), -5.0, device=device)
    got = heads(qkv, layout, *kept, **options, scales=scales)
    # Two kernels, of two profiles: a compiler may sum a norm in two orders. Then a value may fall to the byte beside.
    off = 0 if device.type == "cpu" else 1
    torch.testing.assert_close(got, queries, rtol=1e-2 * off, atol=0)
    used = [slot for slot in slots if slot >= 0]
    for i in range(2):
        twin = ScaledBytes.empty(3, BLOCK_SIZE, num_kv_heads, d)
        twin.values.fill_(99)
        twin.scales.fill_(-5.0)
        twin.store(plain[i].cpu().transpose(1, 2).flatten(0, 1)[used], torch.tensor(used))
        assert (kept[i].cpu().transpose(1, 2).int() - twin.values.int()).abs().max() <= off
        got = scales[..., i].cpu().transpose(1, 2)
        assert torch.equal(got.isnan(), twin.scales.isnan()) and got.isnan().sum() >= 1
        torch.testing.assert_close(got.nan_to_num(-1.0), twin.scales.nan_to_num(-1.0), rtol=1e-2 * off, atol=0)
        assert (got == -5.0).sum() == (3 * BLOCK_SIZE - len(used)) * num_kv_heads


def kernels_of(device: torch.device) -> TritonKernels:
    return TritonKernels(device, max_positions=512, kv_dtype="int8")


def test_blocks_come_back_from_a_swap_as_they_went(device: torch.device) -> None:
    kernels = kernels_of(device)
    cache = kernels.kv_cache(4, 64, 2, 24, torch.bfloat16)
    parts = cache.block_bytes()
    assert not any(part.any() for part in parts), "what a mask hides must be a number"
    assert sum(part.shape[1] for part in parts) == 64 * kernels.kv_bytes_per_token(2, 24, torch.bfloat16)
    fill(cache)
    cache.scales[1, 0, 3, 1] = math.nan
    assert torch.isfinite(cache.scales[2:]).all() and (cache.k.unique().numel() > 200)
    before = [part.clone() for part in parts]
    swapper = Swapper([cache], 3)
    swapper.run([Swap(out=True, blocks=(1, 3), slots=(2, 0))])
    for part in parts:
        part.fill_(1)
    swapper.run([Swap(out=False, blocks=(2, 1), slots=(0, 2))])
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part[1:3], old[[1, 3]])
        assert (part[[0, 3]] == 1).all()


def test_the_name_and_the_room_are_those_of_bytes(device: torch.device) -> None:
    plain, few = TritonKernels(device, max_positions=512), kernels_of(device)
    assert few.name == plain.name + "-kv-int8" and few.kv_dtype == "int8" and few.deterministic
    assert few.kv_bytes_per_token(8, 128, torch.bfloat16) == 2 * 8 * (128 + 4)
    assert plain.kv_bytes_per_token(8, 128, torch.bfloat16) == 2 * 8 * 256


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_greedy_tokens_are_those_of_the_cpu(folders, device: torch.device, name: str) -> None:  # noqa: F811
    """Seeds stand still: a key that rounds to another byte here may turn a choice between two that are nearly equal."""
    rng = random.Random(11)
    requests = [draw_request(rng, id, temperature=0) for id in range(3)]
    executor = on_device(folders[name], device, kv_dtype="int8")
    assert all(cache.k.dtype == torch.int8 for cache in executor.caches)
    there = serve(executor, requests)
    assert any(cache.scales.any() for cache in executor.caches)
    here = serve(on_cpu(folders[name], TorchKernels(kv_dtype="int8")), requests, overlap=False)
    assert there.tokens == here.tokens


def test_a_request_alone_gets_what_it_gets_in_a_crowd(folders, device: torch.device) -> None:  # noqa: F811
    """In chunks, some of them preempted, against a whole prompt: what a chunk stores of its own it reads back."""
    rng = random.Random(12)
    requests = [draw_request(rng, id, temperature=rng.choice([0.0, 1.0]), logprobs=2) for id in range(3)]
    executor = on_device(folders["llama"], device, torch.bfloat16, kv_dtype="int8")
    crowd = serve(executor, requests, tokens=33, blocks=3)
    for request in requests[:2]:
        alone = serve(executor, [request], overlap=False)
        assert alone.tokens[request.id] == crowd.tokens[request.id], request
        assert alone.logprobs[request.id] == crowd.logprobs[request.id], request
