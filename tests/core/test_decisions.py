"""Why somebody had to wait: each reason in a small world, told once, and by whoever decides nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from ledger_world import World

from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.decisions import Decision, Preempted, Waits
from orcaserve.core.policy import DEFAULT, ORCA, STACKED, STATIC, Policy, parse_policy
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Command


class Listening(World):
    """A ledger world with a witness: `said` has the decisions of each batch that came after some."""

    def __init__(self, policy: Policy = DEFAULT, **changes: int) -> None:
        fields = {"max_batch_size": 4, "max_batch_tokens": 8, "num_blocks": 64, "block_size": 4, "depth": 1} | changes
        super().__init__(SchedulerConfig(policy=policy, **fields))
        self.loop = EngineLoop(self.scheduler, self.executor, self, self, lambda: 0.0, self)
        self.said: list[tuple[Decision, ...]] = []
        self.batches: list[Batch] = []

    def took(self, now: float, commands: Sequence[Command]) -> None:
        pass

    def decided(self, now: float, decisions: Sequence[Decision]) -> None:
        self.said.append(tuple(decisions))

    def submitted(self, now: float, batch: Batch) -> None:
        self.batches.append(batch)

    def returned(self, now: float, batch: Batch, result: StepResult) -> None:
        pass

    @property
    def flat(self) -> list[Decision]:
        return [decision for decisions in self.said for decision in decisions]


def test_all_rows_are_taken() -> None:
    world = Listening(max_batch_size=2, max_batch_tokens=40)
    for token in range(4):
        world.submit((token, token), 5)
    world.step(3)
    assert world.flat == [Waits(id=3, why="rows")], "the first in the queue, once, and nobody behind it"
    world.drain()
    assert world.flat == [Waits(id=3, why="rows")], "both are let in together"


def test_who_comes_to_stand_first_is_told_again() -> None:
    world = Listening(max_batch_size=1, max_batch_tokens=40)
    for token in range(4):
        world.submit((token, token), 2)
    world.drain()
    assert world.flat == [Waits(id=id, why="rows") for id in (2, 3, 4)]


def test_the_tokens_are_given_out_and_a_running_prefill_is_left_out() -> None:
    world = Listening(max_batch_tokens=8)
    world.submit((1,) * 6, 2)
    world.submit((2,) * 20, 2)
    world.submit((3,) * 9, 2)
    world.step()
    assert world.flat == [Waits(id=3, why="tokens")]
    world.submit((4,), 9)
    world.drain()
    assert Waits(id=4, why="tokens") in world.flat


def test_a_prompt_that_is_half_read_is_left_out_for_a_more_urgent_one() -> None:
    world = Listening(parse_policy("priority,ageing=inf"))
    world.submit((1,) * 20, 2)
    world.step()
    world.submit((2,) * 12, 2, priority=-1)
    world.step()
    assert world.flat == [Waits(id=1, why="tokens", runs=True)]
    world.drain()
    assert world.flat == [Waits(id=1, why="tokens", runs=True)], "the rest of it takes what the other one leaves"


def test_blocks_lack_and_who_holds_them() -> None:
    world = Listening(ORCA, num_blocks=6)  # 24 slots
    world.submit((1, 1), 8)  # 3 blocks
    world.submit((2, 2), 3)  # 2
    world.submit((3, 3), 9)  # 3: two too many
    world.step(2)
    assert world.flat == [Waits(id=3, why="blocks", blocks=2, holders=((1, 3), (2, 2)))]
    world.drain()


def test_a_preemption_is_told_with_its_cause_and_loss_and_nobody_is_let_in_by_it() -> None:
    world = Listening(num_blocks=5, max_batch_tokens=40, max_batch_size=2)
    world.submit((1,) * 7, 12)
    world.submit((2,) * 3, 12)
    world.drain()
    [decisions] = [said for said in world.said if any(isinstance(one, Preempted) for one in said)]
    lost, waits = decisions
    assert isinstance(lost, Preempted) and (lost.id, lost.by) == (2, 1) and lost.tokens > 3
    assert waits == Waits(id=2, why="preemption", by=1)
    after = [decision for decision in world.flat if isinstance(decision, Waits)]
    assert [(one.id, one.why) for one in after] == [(2, "preemption"), (2, "blocks")]


def test_a_static_batch_is_closed() -> None:
    world = Listening(STATIC)
    world.submit((1, 2), 3)
    world.step()
    world.submit((3,), 1)
    world.submit((4,), 1)
    world.drain()
    assert world.flat == [Waits(id=2, why="closed")]


def test_who_cannot_be_stacked_waits_in_the_queue_and_while_it_runs() -> None:
    world = Listening(STACKED)
    world.submit((1, 1, 1), 3)
    world.submit((2, 2), 3)
    world.drain()
    assert world.flat[0] == Waits(id=2, why="shape")


def test_a_running_request_lacks_memory_and_nobody_passes_it() -> None:
    """The older one is in flight, so that the younger one can take nothing from anybody."""
    world = Listening(num_blocks=4, block_size=2, max_batch_tokens=40, max_batch_size=4, depth=2)
    world.submit((1,) * 3, 4)
    world.submit((2,) * 2, 4)
    world.submit((3,) * 2, 2)
    world.drain()
    lacking = [one for one in world.flat if isinstance(one, Waits) and one.runs]
    assert lacking and all(one.why == "blocks" and one.blocks > 0 for one in lacking)
    assert any(one.why == "memory" and one.by in {other.id for other in lacking} for one in world.flat[1:])


@pytest.mark.parametrize("policy", [DEFAULT, ORCA, STATIC])
def test_nothing_is_said_where_nobody_waits(policy: Policy) -> None:
    world = Listening(policy, max_batch_tokens=100)
    for token in range(4):
        world.submit((token, token), 4)
    world.drain()
    assert world.flat == []
    assert World(world.scheduler.config).scheduler.decisions is None, "without a witness nothing is gathered"
