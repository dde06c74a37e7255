"""Experts: ties go to the lower index, sums follow the order of the experts, rows are strangers to each other."""

from __future__ import annotations

import random

import kernel_sets
import pytest
import torch
from checkpoints import make_model  # noqa: F401 - sets torch's threads as the other tests have them

from orcaserve.model.layers import Experts
from orcaserve.ops.kernels import Kernels
from orcaserve.parallel.group import Alone

TWIN = kernel_sets.make("torch")


def make_experts(
    router: torch.Tensor, per_token: int, normalise: bool, generator: torch.Generator, kernels: Kernels = TWIN
) -> Experts:
    def weight(out: int, size: int) -> torch.Tensor:
        return torch.randn(out, size, generator=generator).to(router.dtype)

    hidden = router.shape[1]
    experts = {
        e: kernels.mlp_half(
            None,
            kernels.gated(weight(12, hidden), weight(12, hidden), None, None, "silu"),
            kernels.linear([weight(hidden, 12)], [None], cut=True),
            None,
        )
        for e in range(router.shape[0])
    }
    owner = (0,) * router.shape[0]
    return Experts(None, kernels.linear([router], [None]), experts, owner, per_token, normalise, Alone())


def test_router_ties_go_to_the_lower_index() -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(8, generator=generator)
    router = torch.stack([-row, row, row, -row, row, row])  # experts 1, 2, 4 and 5 are equally likely
    shares, chosen = make_experts(router, 3, True, generator).route(torch.stack([row, -row]))
    assert chosen.tolist() == [[1, 2, 4], [0, 3, 1]]
    assert torch.allclose(shares[0], torch.full((3,), 1 / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kernels", kernel_sets.TWIN_AND_BEST)
def test_rows_do_not_depend_on_each_other(dtype: torch.dtype, normalise: bool, kernels: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    router = torch.randn(7, 24, generator=generator).to(dtype)
    experts = make_experts(router, 3, normalise, generator, kernel_sets.make(kernels))
    x = torch.randn(90, 24, generator=generator).to(dtype)
    together = experts(x)
    for i in (0, 1, 31, 32, 89):
        assert torch.equal(experts(x[i : i + 1])[0], together[i])
    order = torch.randperm(90, generator=generator)
    assert torch.equal(experts(x[order]), together[order])


def test_sum_follows_the_order_of_the_experts() -> None:
    """In float32 the order of a sum shows: likeliest first would give other bits."""
    generator = torch.Generator().manual_seed(1)
    experts = make_experts(torch.randn(6, 16, generator=generator), 4, True, generator)
    x = torch.randn(40, 16, generator=generator)
    shares, chosen = experts.route(x)
    found = experts(x)
    differs = 0
    for i in range(40):
        by_expert, by_share = torch.zeros(16), torch.zeros(16)
        parts = [
            (e, s * experts.experts[e](x[i : i + 1])[0]) for e, s in zip(chosen[i].tolist(), shares[i], strict=True)
        ]
        for _, part in sorted(parts, key=lambda p: p[0]):
            by_expert = by_expert + part
        for _, part in parts:
            by_share = by_share + part
        assert torch.equal(found[i], by_expert)
        differs += not torch.equal(by_expert, by_share)
    assert differs > 0
