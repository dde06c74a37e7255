"""Without selective batching only requests of one phase and length share an iteration, under any policy beside it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_world import World, random_life

from orcaserve.core.policy import ORCA, STACKED, Policy
from orcaserve.core.scheduler import SchedulerConfig


def sizes(policy: Policy, prompts: list[int], outputs: list[int], **changes: int) -> list[int]:
    """Rows of each iteration, all requests being there from the start."""
    fields = {"max_batch_size": 4, "max_batch_tokens": 8, "num_blocks": 64, "block_size": 4, "depth": 1} | changes
    world = World(SchedulerConfig(policy=policy, **fields))
    for prompt, output in zip(prompts, outputs, strict=True):
        world.submit(tuple(range(prompt)), output)
    rows = []
    while world.scheduler.requests or world.commands:
        world.step()
        assert world.last is not None
        rows.append(world.last.num_rows)
    return rows


def test_equal_requests_are_stacked_all_the_way() -> None:
    assert sizes(STACKED, [3, 3, 3], [4, 4, 4]) == [3, 3, 3, 3] == sizes(ORCA, [3, 3, 3], [4, 4, 4])


def test_the_papers_problem_that_nobody_can_be_stacked() -> None:
    """Two prompts of different lengths run one after the other, though both fit into a batch."""
    assert sizes(STACKED, [3, 2], [4, 4]) == [1] * 8
    assert sizes(ORCA, [3, 2], [4, 4]) == [2] * 4


def test_who_ends_leaves_at_once() -> None:
    assert sizes(STACKED, [3, 3], [2, 4]) == [2, 2, 1, 1]


def test_nobody_overtakes_to_be_stacked() -> None:
    """The third would fit the first; the second stands before it."""
    assert sizes(STACKED, [3, 2, 3], [1, 1, 1]) == [1, 1, 1]


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    flags=st.fixed_dictionaries(
        {name: st.booleans() for name in ("reserve", "chunked", "decodes_first", "prefix_cache", "deal")}
    ),
)
def test_answers_and_invariants_hold_beside_any_other_choice(seed: int, flags: dict[str, bool]) -> None:
    # Reservations are counted as if nobody shared blocks, so that those who reserve have no prefix cache.
    flags["prefix_cache"] &= not flags["reserve"]
    random_life(seed, policy=Policy(name="any", alike=True, **flags))
