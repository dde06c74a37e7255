"""Mixtures of experts on a device: as on the CPU, and with bits that hang neither on the batch nor on the tile."""

import pytest
import torch

from orcaserve.model.layers import Experts
from orcaserve.ops.gpu.experts import DeviceExperts, grouped, mix, tiles
from orcaserve.ops.gpu.kernels import TritonKernels
from orcaserve.ops.gpu.routing import group, most_tiles, route
from orcaserve.ops.gpu.tiles import Tile
from orcaserve.ops.torch_kernels import TorchKernels
from orcaserve.parallel.group import Alone

EXPERTS, PLACES, HIDDEN, INNER = 6, 3, 48, 40
# hidden, inner values: multiples of no block, and edges that no descriptor can describe
SIZES = [(HIDDEN, INNER), (45, 21)]


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(hidden: int, inner: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return [
        tuple(noise(10 * e + i, *shape, dtype=dtype) / shape[1] ** 0.5 for i, shape in enumerate(shapes))
        for e in range(EXPERTS)
    ]


def router_to(*experts: int) -> torch.Tensor:
    """Float32 [EXPERTS, HIDDEN]: rows of positive numbers all go to these, likeliest first."""
    router = torch.zeros(EXPERTS, HIDDEN)
    for place, e in enumerate(experts):
        router[e] = 0.2 / (place + 1)
    return router


def on_device(
    device: torch.device,
    router: torch.Tensor,
    hidden: int = HIDDEN,
    inner: int = INNER,
    *,
    normalise: bool = True,
    numerics: str = "invariant",
) -> DeviceExperts:
    kernels = TritonKernels(device, numerics, max_positions=8)
    taken = (tuple(one.to(device) for one in three) for three in weights(hidden, inner, router.dtype))
    return kernels.experts(
        None,
        kernels.linear([router.to(device)], [None], exact=True),
        taken,
        "silu",
        num_experts=EXPERTS,
        per_token=PLACES,
        normalise=normalise,
    )


def on_cpu(router: torch.Tensor, hidden: int = HIDDEN, inner: int = INNER, *, normalise: bool = True) -> Experts:
    kernels = TorchKernels()
    halves = {
        e: kernels.mlp_half(None, kernels.gated(gate, up, None, None, "silu"), kernels.linear([down], [None]), None)
        for e, (gate, up, down) in enumerate(weights(hidden, inner, router.dtype))
    }
    return Experts(None, kernels.linear([router], [None]), halves, (0,) * EXPERTS, PLACES, normalise, Alone())


def by_number(shares: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Experts.route` gives, best first, in the order of the experts."""
    order = chosen.argsort(dim=1)
    return shares.gather(1, order), chosen.gather(1, order).int()


@pytest.mark.parametrize("normalise", [True, False])
def test_rows_are_routed_as_on_the_cpu(device: torch.device, normalise: bool) -> None:
    router, x = noise(1, EXPERTS, HIDDEN), noise(2, 7, HIDDEN)
    shares, chosen = route((x @ router.T).to(device), PLACES, normalise=normalise)
    wanted_shares, wanted = by_number(*on_cpu(router, normalise=normalise).route(x))
    assert torch.equal(chosen.cpu(), wanted)
    torch.testing.assert_close(shares.cpu(), wanted_shares, atol=1e-6, rtol=1e-5)


def test_ties_go_to_the_lower_number(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 3.0], [5.0] * 6, [0.0, 0.0, 9.0, 0.0, 0.0, 0.0]], device=device)
    shares, chosen = route(logits, 3, normalise=True)
    assert chosen.tolist() == [[1, 2, 4], [0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(shares[:2].cpu(), torch.full((2, 3), 1 / 3))


def test_a_row_of_nothing_still_goes_somewhere(device: torch.device) -> None:
    logits = torch.full((2, EXPERTS), torch.nan, device=device)
    logits[1] = -torch.inf
    shares, chosen = route(logits, PLACES, normalise=True)
    assert chosen.tolist() == [[0, 1, 2]] * 2
    assert shares.isnan().all()


def test_shares_are_rounded_as_the_logits_are(device: torch.device) -> None:
    logits = noise(3, 4, EXPERTS, dtype=torch.bfloat16).to(device)
    shares, _ = route(logits, PLACES, normalise=True)
    exact, _ = route(logits.float(), PLACES, normalise=True)
    assert torch.equal(shares, shares.bfloat16().float())
    assert not torch.equal(shares, exact)


@pytest.mark.parametrize(
    ("chosen", "num_experts"),
    [
        (torch.randint(0, 5, (33, 2), generator=torch.Generator().manual_seed(4)), 5),
        (torch.full((40, 1), 2), 4),  # all to one, the others have none
        (torch.tensor([[3]]), 4),
        (torch.tensor([[0, 7]]), 8),
        (torch.randint(0, 2, (600, 2), generator=torch.Generator().manual_seed(5)) * 2, 3),  # more than one block
    ],
)
def test_groups_hold_every_pair_once(device: torch.device, chosen: torch.Tensor, num_experts: int) -> None:
    groups = group(chosen.int().to(device), num_experts, 16)
    flat, pairs, there = chosen.flatten(), groups.pairs.cpu().long(), groups.num_tiles.item()
    assert torch.equal(pairs, flat.argsort(stable=True))
    assert groups.tiles.shape[0] == most_tiles(flat.numel(), num_experts, 16)
    covered = []
    for expert, first, end in groups.tiles[:there].tolist():
        own = range(first, min(first + 16, end))
        assert len(own) > 0
        assert all(flat[pairs[place]] == expert for place in own)
        assert end == flat.numel() or flat[pairs[end]] > expert
        covered += own
    assert covered == list(range(flat.numel()))


@pytest.mark.parametrize(("num_pairs", "num_experts"), [(1, 128), (8, 128), (16, 3), (47, 3), (48, 3), (1000, 7)])
def test_there_is_room_for_the_most_tiles_that_pairs_can_make(num_pairs: int, num_experts: int) -> None:
    scattered = min(num_pairs, num_experts)
    # one pair to each expert, the rest to one of them
    assert scattered - 1 + -(-(num_pairs - scattered + 1) // 16) <= most_tiles(num_pairs, num_experts, 16)
    # as many as can be have one pair more than fills a tile
    over = min(num_pairs // 17, num_experts)
    assert 2 * over <= most_tiles(num_pairs, num_experts, 16)


def test_the_sizes_that_are_powers_of_two_meet_every_tile() -> None:
    for num_experts, places in ((128, 8), (8, 2), (60, 4), (96, 7)):
        every, warmed = (
            {tiles(m * places, num_experts, 2048, torch.bfloat16) for m in some}
            for some in (range(1, 8193), (1 << n for n in range(14)))
        )
        assert warmed == every
    for inner, outer in every:
        assert inner.block_m == outer.block_m


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_values_are_those_of_the_cpu(device: torch.device, hidden: int, inner: int, normalise: bool) -> None:
    router, x, residual = noise(1, EXPERTS, hidden), noise(2, 9, hidden), noise(3, 9, hidden)
    there, here = (
        make(router, hidden, inner, normalise=normalise)
        for make in (lambda *a, **k: on_device(device, *a, **k), on_cpu)
    )
    torch.testing.assert_close(there(x.to(device)).cpu(), here(x), atol=2e-6, rtol=1e-4)
    got = there(x.to(device), residual.to(device))
    torch.testing.assert_close(got.cpu(), here(x, residual), atol=2e-6, rtol=1e-4)


def test_all_rows_to_the_same_experts(device: torch.device) -> None:
    """Several tiles of each, and none of the others'."""
    router, x = router_to(5, 0, 3), noise(2, 37, HIDDEN).abs()
    got = on_device(device, router)(x.to(device))
    assert set(on_cpu(router).route(x)[1].flatten().tolist()) == {0, 3, 5}
    torch.testing.assert_close(got.cpu(), on_cpu(router)(x), atol=2e-6, rtol=1e-4)


def test_fast_numerics_have_the_same_experts(device: torch.device) -> None:
    router, x = noise(1, EXPERTS, HIDDEN), noise(2, 4, HIDDEN)
    got = on_device(device, router, numerics="fast")(x.to(device))
    torch.testing.assert_close(got.cpu(), on_cpu(router)(x), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_batch(device: torch.device, dtype: torch.dtype) -> None:
    router = noise(1, EXPERTS, HIDDEN, dtype=dtype)
    rows = 300 if device.type == "cuda" else 40  # by which bfloat16 has met two kinds of tiles, or more
    x, residual = (noise(seed, rows, HIDDEN, dtype=dtype).to(device) for seed in (2, 3))
    experts = on_device(device, router)
    whole = experts(x, residual)
    for some in ([0], [rows - 1], [3, 17, 5], range(8, 8 + rows // 3)):
        rows_there = torch.tensor(list(some), device=device)
        assert torch.equal(experts(x[rows_there], residual[rows_there]), whole[rows_there])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_tile(device: torch.device, dtype: torch.dtype) -> None:
    experts = on_device(device, noise(1, EXPERTS, HIDDEN, dtype=dtype))
    x = noise(2, 12, HIDDEN, dtype=dtype).to(device)
    wanted = experts(x)
    shares, chosen = route(experts.router(x), PLACES, normalise=True)
    every = [Tile(64, 16, 64, 4, 3), Tile(64, 32, 128, 4, 2), Tile(64, 64, 32, 4, 2), Tile(128, 128, 64, 8, 3)]
    if dtype == torch.float32:
        every = [Tile(32, 16, 64, 4, 1), Tile(32, 32, 32, 4, 2)]
    for tile in every:
        groups = group(chosen, EXPERTS, tile.block_m)
        middle = grouped(x, experts.gate, experts.up, groups, places=PLACES, activation="silu", tile=tile)
        results = grouped(middle, experts.down, None, groups, places=0, activation=None, tile=tile)
        assert torch.equal(mix(results, shares, None), wanted), tile


def test_rows_that_come_to_nothing_leave_the_others_alone(device: torch.device) -> None:
    """As padding may, and a request whose values have overflown."""
    router, x = noise(1, EXPERTS, HIDDEN), noise(2, 10, HIDDEN).to(device)
    experts = on_device(device, router)
    whole = experts(x)
    x[3:5], x[7] = torch.nan, torch.inf
    got = experts(x)
    sound = torch.tensor([0, 1, 2, 5, 6, 8, 9], device=device)
    assert torch.equal(got[sound], whole[sound])
    assert got[3:5].isnan().all()


def test_results_are_added_in_the_order_of_the_experts(device: torch.device) -> None:
    """In float32, what is small would be lost if it did not come behind what cancels out; the residual comes last."""
    results = torch.tensor([[1e8], [-1e8], [1.0]]).expand(3, HIDDEN).contiguous().to(device)
    shares, residual = torch.ones(1, 3, device=device), torch.full((1, HIDDEN), 0.25, device=device)
    assert torch.equal(mix(results, shares, None), torch.ones(1, HIDDEN, device=device))
    assert torch.equal(mix(results, shares, residual), residual + 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there are no graphs to record without a GPU")
def test_a_graph_goes_where_the_rows_go_now(device: torch.device) -> None:
    experts = on_device(device, noise(1, EXPERTS, HIDDEN, dtype=torch.bfloat16))

    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = experts(x, x)
        return x

    x = noise(2, 24, HIDDEN, dtype=torch.bfloat16).to(device)
    run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(x)
    for seed in range(10, 15):
        x.copy_(noise(seed, 24, HIDDEN, dtype=torch.bfloat16))
        got.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, run(x))
