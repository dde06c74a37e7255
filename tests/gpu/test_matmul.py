"""Matrix products against float64, and their promise: a row's bits hang neither on the batch nor on the tile."""

import pytest
import torch

from orcaserve.ops.activation import ACTIVATIONS
from orcaserve.ops.gpu.matmul import MatmulScratch, gated, matmul
from orcaserve.ops.gpu.norm import rms_norm
from orcaserve.ops.gpu.tiles import Tile, segments, tiles
from orcaserve.worker.gpu.worker import graph_sizes, layers_sizes

# Triton's interpreter multiplies the bit patterns of bfloat16 as integers; float16 stands in for it there.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# outputs, inputs: segments of one length, a shorter last one, one segment, edges in every direction
SHAPES = [(130, 1024), (70, 656), (96, 208), (50, 84)]


@pytest.fixture(scope="module")
def scratch(device: torch.device) -> MatmulScratch:
    made = MatmulScratch(device)
    made.partials.fill_(torch.nan)
    return made


def noise(seed: int, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.cpu().double() - wanted).norm() / wanted.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = x.cpu().double() @ weight.cpu().double().T
    return out if bias is None else out + bias.cpu().double()


def every_tile(dtype: torch.dtype) -> list[Tile]:
    if dtype == torch.float32:
        return [Tile(32, 32, 32, 4, 2), Tile(32, 16, 64, 4, 1, split=True)]
    return [
        Tile(64, 16, 128, 4, 3, split=True),
        Tile(64, 16, 64, 4, 4),
        Tile(64, 64, 64, 4, 3, split=True),
        Tile(128, 128, 64, 8, 3),
    ]


def test_segments_hang_on_the_matrix_and_are_few_and_long() -> None:
    for n in (8, 64, 1024, 4096, 6144, 24576, 151936):
        for k in (16, 64, 512, 1000, 1024, 3072, 4096, 14336):
            count = segments(n, k)
            assert 1 <= count <= 8
            assert count == 1 or k // count >= 200
    assert [segments(*shape) for shape in SHAPES] == [2, 1, 1, 1]
    assert segments(4096, 4096) > 1
    assert segments(151936, 4096) == 1


def test_no_default_tile_splits_more_rows_than_the_scratch_has() -> None:
    for m in (1, 16, 17, 64, 128, 256, 257, 4096):
        for is_gated in (False, True):
            tile = tiles(m, 4096, 4096, gated=is_gated, dtype=torch.bfloat16)
            assert not tile.split or m <= 256


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(
    ("n", "k"), [(6144, 4096), (1024, 2048), (1024, 3072), (12288, 4096), (151936, 1024), (96, 64)]
)
def test_the_sizes_that_are_recorded_bring_in_every_tile(n: int, k: int, is_gated: bool) -> None:
    """No request is to wait for a compiler."""

    def tile(m: int) -> tuple[Tile, bool]:
        return tiles(m, n, k, gated=is_gated, dtype=torch.bfloat16), m > 256

    recorded = {tile(m) for m in (*graph_sizes(256), *layers_sizes(8192), 8192)}
    assert {tile(m) for m in range(1, 2500)} <= recorded


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 37])
def test_matmul(device: torch.device, scratch: MatmulScratch, dtype: torch.dtype, n: int, k: int, m: int) -> None:
    x, weight = noise(1, m, k, dtype=dtype, device=device), noise(2, n, k, dtype=dtype, device=device)
    bias, residual = noise(3, n, dtype=dtype, device=device), noise(4, m, n, dtype=dtype, device=device)
    plain = product(x, weight)
    close(matmul(x, weight, scratch=scratch), plain, dtype)
    whole = matmul(x, weight, bias, residual, scratch=scratch)
    close(whole, plain + bias.cpu().double() + residual.cpu().double(), dtype)
    assert whole.dtype == dtype
    wide = matmul(x, weight, scratch=scratch, wide=True)
    assert wide.dtype == torch.float32
    close(wide, plain, torch.float32)
    assert not scratch.counters.any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(device: torch.device, scratch: MatmulScratch, activation: str) -> None:
    x, weight = noise(1, 3, 64, dtype=HALF, device=device), noise(2, 40, 64, dtype=HALF, device=device)
    bias = noise(3, 40, dtype=HALF, device=device)
    got = matmul(x, weight, bias, scratch=scratch, activation=activation, wide=True)
    torch.testing.assert_close(
        got.cpu().double(), ACTIVATIONS[activation](product(x, weight, bias)).double(), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("with_biases", [False, True])
def test_gated(device: torch.device, scratch: MatmulScratch, dtype: torch.dtype, with_biases: bool) -> None:
    n, k = 100, 304
    x = noise(1, 19, k, dtype=dtype, device=device)
    gate, up = (noise(seed, n, k, dtype=dtype, device=device) for seed in (2, 3))
    biases = [noise(seed, n, dtype=dtype, device=device) if with_biases else None for seed in (4, 5)]
    got = gated(x, gate, up, *biases, "silu", scratch=scratch)
    close(got, torch.nn.functional.silu(product(x, gate, biases[0])) * product(x, up, biases[1]), dtype)
    assert torch.equal(gated(x[7:8], gate, up, *biases, "silu", scratch=scratch), got[7:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(130, 1024), (96, 208)])
def test_a_row_has_the_same_bits_in_every_batch_and_tile(
    device: torch.device, scratch: MatmulScratch, dtype: torch.dtype, n: int, k: int
) -> None:
    cuts = ((0, 1), (699, 1), (5, 7), (100, 33), (3, 64), (600, 100), (1, 200), (100, 300))
    if device.type == "cpu":
        cuts = ((0, 1), (36, 1), (3, 20))  # what the interpreter does in seconds
    rows_there = max(first + m for first, m in cuts)
    x, weight = noise(1, rows_there, k, dtype=dtype, device=device), noise(2, n, k, dtype=dtype, device=device)
    up, residual = noise(3, n, k, dtype=dtype, device=device), noise(4, rows_there, n, dtype=dtype, device=device)
    whole = matmul(x, weight, None, residual, scratch=scratch, activation="gelu_new")
    whole_gated = gated(x, weight, up, None, None, "silu", scratch=scratch)
    for first, m in cuts:
        rows = slice(first, first + m)
        chosen = [None, *(tile for tile in every_tile(dtype) if m <= 256 or not tile.split)]
        for tile in chosen:
            got = matmul(x[rows], weight, None, residual[rows], scratch=scratch, activation="gelu_new", tile=tile)
            assert torch.equal(got, whole[rows]), (first, m, tile)
            got = gated(x[rows], weight, up, None, None, "silu", scratch=scratch, tile=tile)
            assert torch.equal(got, whole_gated[rows]), (first, m, tile)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there are no graphs to record without a GPU")
def test_a_graph_of_kernels_that_overlap_gives_what_they_give_one_by_one(device: torch.device) -> None:
    n, k = 512, 1024
    gate, up, down, weight = (
        noise(seed, *shape, dtype=torch.bfloat16, device=device) / 32
        for seed, shape in enumerate(((n, k), (n, k), (k, n), (k,)))
    )
    scratch, apart = MatmulScratch(device), MatmulScratch(device)
    apart.overlap = False

    def run(x: torch.Tensor, scratch: MatmulScratch) -> torch.Tensor:
        for _ in range(6):
            inner = gated(rms_norm(x, weight, 1e-6, plus_one=True), gate, up, None, None, "silu", scratch=scratch)
            x = matmul(inner, down, None, x, scratch=scratch)
        return x

    x = noise(9, 9, k, dtype=torch.bfloat16, device=device)
    run(x, scratch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(x, scratch)
    for seed in range(10, 15):
        x.copy_(noise(seed, 9, k, dtype=torch.bfloat16, device=device))
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, run(x, apart))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_every_tile_computes_the_product(device: torch.device, scratch: MatmulScratch, dtype: torch.dtype) -> None:
    m, n, k = 20, 70, 656
    x, weight = noise(1, m, k, dtype=dtype, device=device), noise(2, n, k, dtype=dtype, device=device)
    for tile in every_tile(dtype):
        close(matmul(x, weight, scratch=scratch, tile=tile), product(x, weight), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_programs_that_share_a_tile_add_like_one_that_has_it_alone(
    device: torch.device, scratch: MatmulScratch, dtype: torch.dtype
) -> None:
    x, weight = noise(1, 20, 1000, dtype=dtype, device=device), noise(2, 70, 1000, dtype=dtype, device=device)
    shared, alone = (
        matmul(x, weight, scratch=scratch, wide=True, tile=Tile(64, 16, 64, 4, 3, split=split))
        for split in (True, False)
    )
    assert torch.equal(shared, alone)


def test_rows_that_no_descriptor_can_describe(device: torch.device, scratch: MatmulScratch) -> None:
    storage = noise(1, 5 * 64 + 1, dtype=HALF, device=device)
    x, weight = storage[1:].view(5, 64), noise(2, 40, 64, dtype=HALF, device=device)
    assert torch.equal(matmul(x, weight, scratch=scratch), matmul(x.clone(), weight, scratch=scratch))


def test_more_rows_than_may_be_split(device: torch.device, scratch: MatmulScratch) -> None:
    x, weight = torch.ones(257, 1024, device=device), torch.ones(64, 1024, device=device)
    with pytest.raises(ValueError, match="256 rows"):
        matmul(x, weight, scratch=scratch, tile=Tile(32, 32, 32, 4, 2, split=True))
