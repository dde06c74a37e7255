"""Norms, heads and activations against their twins of the CPU: same values, and bits that hang on the row alone."""

import pytest
import torch

from orcaserve.ops import norm as twins
from orcaserve.ops.activation import ACTIVATIONS
from orcaserve.ops.gpu.activation import KINDS, act_mul
from orcaserve.ops.gpu.heads import heads
from orcaserve.ops.gpu.layout import DeviceLayout
from orcaserve.ops.gpu.norm import layer_norm, rms_norm
from orcaserve.ops.rotary import Rotary

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
BLOCK_SIZE = 16


def noise(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.cpu().float(), wanted.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("h", [64, 100, 1536])
@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(device: torch.device, dtype: torch.dtype, h: int, plus_one: bool) -> None:
    x, residual = (noise(seed, 5, h, dtype=dtype, device=device) for seed in (1, 2))
    weight = noise(3, h, dtype=dtype, device=device)
    wanted = twins.rms_norm(x.cpu().float(), weight.cpu(), 1e-5, plus_one=plus_one)
    close(rms_norm(x, weight, 1e-5, plus_one=plus_one), wanted, dtype)
    got = rms_norm(x, weight, 1e-5, plus_one=plus_one, residual=residual)
    close(got, wanted + residual.cpu().float(), dtype)
    assert torch.equal(got[3:4], rms_norm(x[3:4], weight, 1e-5, plus_one=plus_one, residual=residual[3:4]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("h", [64, 100, 1536])
@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm(device: torch.device, dtype: torch.dtype, h: int, affine: bool) -> None:
    x, residual = (noise(seed, 5, h, dtype=dtype, device=device) + 3 for seed in (1, 2))
    weight, bias = (noise(seed, h, dtype=dtype, device=device) if affine else None for seed in (3, 4))
    wanted = twins.layer_norm(
        x.cpu().float(), None if weight is None else weight.cpu(), None if bias is None else bias.cpu(), 1e-5
    )
    close(layer_norm(x, weight, bias, 1e-5), wanted, dtype)
    got = layer_norm(x, weight, bias, 1e-5, residual=residual)
    close(got, wanted + residual.cpu().float(), dtype)
    assert torch.equal(got[3:4], layer_norm(x[3:4], weight, bias, 1e-5, residual=residual[3:4]))


def test_every_activation_is_known() -> None:
    assert set(KINDS) == set(ACTIVATIONS)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_times_up(device: torch.device, dtype: torch.dtype, activation: str) -> None:
    gate_up = noise(5, 3, 2 * 1100, dtype=dtype, device=device) * 4
    gate, up = gate_up.cpu().float().chunk(2, dim=1)
    close(act_mul(gate_up, activation), ACTIVATIONS[activation](gate) * up, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "d", "rotary_dim", "interleaved", "normed", "plus_one"),
    [
        (10, 10, 64, 64, False, False, False),
        (9, 3, 80, 32, False, True, False),
        (4, 2, 96, 96, True, True, True),
        (4, 1, 128, 64, True, False, False),
        (2, 1, 256, 256, False, True, True),
        (3, 3, 64, 0, False, False, False),
    ],
)
def test_heads(
    device: torch.device,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    d: int,
    rotary_dim: int,
    interleaved: bool,
    normed: bool,
    plus_one: bool,
) -> None:
    positions, slots = [0, 300, 7, 0, 41], [17, 5, -1, 47, 48]
    rotary = Rotary(10000.0 ** -(torch.arange(rotary_dim // 2) / (rotary_dim // 2)), interleaved=interleaved)
    qkv = noise(6, 5, (num_heads + 2 * num_kv_heads) * d, dtype=dtype, device=device)
    norms = [noise(seed, d, dtype=dtype, device=device) if normed else None for seed in (7, 8)]
    shape = (4, num_kv_heads, BLOCK_SIZE, d)
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))

    def run(rows: slice) -> torch.Tensor:
        return heads(
            qkv[rows],
            layout_of(positions[rows], slots[rows], device),
            k_cache,
            v_cache,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=d,
            q_norm=norms[0],
            k_norm=norms[1],
            eps=1e-6,
            plus_one=plus_one,
            table=rotary.angles(300).to(device) if rotary_dim else None,
            interleaved=interleaved,
            rotary_dim=rotary_dim,
        )

    got = run(slice(None))
    q, k, v = qkv.cpu().float().unflatten(1, (-1, d)).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if normed:
        q, k = (
            twins.rms_norm(x, weight.cpu(), 1e-6, plus_one=plus_one) for x, weight in zip((q, k), norms, strict=True)
        )
    if rotary_dim:
        q, k = (rotary.rotate(x, torch.tensor(positions)) for x in (q, k))
    close(got, q.flatten(1), dtype)
    stored = [token for token, slot in enumerate(slots) if slot >= 0]
    for cache, rows in ((k_cache, k), (v_cache, v)):
        by_slot = cache.transpose(1, 2).flatten(0, 1)
        close(by_slot[[slots[token] for token in stored]], rows[stored], dtype)
        untouched = by_slot.shape[0] - len(stored) - (15 if cache is v_cache else 0)  # behind slot 48
        assert by_slot.isnan().all(dim=(1, 2)).sum() == untouched
    before = k_cache.clone()
    assert torch.equal(run(slice(4, 5)), got[4:5])
    assert torch.equal(k_cache.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize("num_kv_heads", [1, 11])
def test_what_is_behind_a_request_s_last_value_in_its_block_is_zero(device: torch.device, num_kv_heads: int) -> None:
    """What another left there may be no number, and attention reads whole blocks."""
    d = 64
    slots = [
        *(18, 19, 20),  # a chunk that goes on in a block, begins none and does not end it
        *(13, 14, 15, 32, 33),  # one that goes over into a block
        -1,
        48,  # alone: the first of its block
        70,  # alone, with others before it in its block
        *(94, 95),  # to the very end
    ]
    qkv = noise(9, len(slots), 3 * num_kv_heads * d, dtype=torch.bfloat16, device=device)
    shape = (6, num_kv_heads, BLOCK_SIZE, d)
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device) for _ in range(2))
    heads(
        qkv, layout_of([0] * len(slots), slots, device), k_cache, v_cache, num_heads=num_kv_heads,
        num_kv_heads=num_kv_heads, head_dim=d, q_norm=None, k_norm=None, eps=1e-6, plus_one=False, table=None,
        interleaved=False, rotary_dim=0,
    )  # fmt: skip
    values = v_cache.transpose(1, 2).flatten(0, 1).cpu()
    zeros = [*range(21, 32), *range(34, 48), *range(49, 64)]
    assert not values[zeros].any()
    rest = set(range(len(values))) - {*zeros, *slots}
    assert values[sorted(rest)].isnan().all()
    assert torch.equal(
        values[[s for s in slots if s >= 0]],
        qkv.cpu().unflatten(1, (-1, d))[[i for i, s in enumerate(slots) if s >= 0], 2 * num_kv_heads :],
    )


def layout_of(positions: list[int], slots: list[int], device: torch.device) -> DeviceLayout:
    def ints(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    nothing = ints([])
    return DeviceLayout(
        positions=ints(positions),
        slots=ints(slots),
        seats=nothing,
        tables=nothing,
        block_size=BLOCK_SIZE,
        tiles=nothing,
        num_tiles=nothing,
    )
