"""The stories of a log: the same times as the scheduler's own, and reasons that the batches themselves give."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from logged_world import logged_life

from orcaserve.core.decisions import Preempted, Waits
from orcaserve.core.policy import Policy
from orcaserve.engine.step_log import Arrived, Decided, Left, Log, Returned, Submitted, read
from orcaserve.sim.replay import replay
from orcaserve.sim.story import stories

RECORDED = Path(__file__).with_name("recorded.jsonl")
PLAIN = Policy(name="plain", prefix_cache=False)


@pytest.mark.parametrize("policy", [None, "orca", "static", "stacked"])
def test_a_story_tells_what_the_scheduler_has_counted(policy: str | None) -> None:
    base = random.SystemRandom().randrange(10**9)
    waits = losses = 0
    # The last one let in for a moment who never ran, and lost his place a second time.
    for seed in [*range(base, base + (50 if policy is None else 15)), 100610698]:
        world = logged_life(seed, policy)
        [log] = read(bytes(world.data))
        assert replay(log) == [event.rows for event in log.events if isinstance(event, Submitted)], f"seed {seed}"
        told = {story.id: story for story in stories(log)}
        for id, timing in world.timings.items():
            story = told[id]
            where = f"seed {seed}, request {id}: {story}"
            assert story.end in ("stop", "length"), where
            for kind in ("queue", "prefill", "decode", "lost"):
                assert story.seconds(kind) == pytest.approx(getattr(timing, f"{kind}_seconds"), abs=1e-6), where
            together = story.together
            counted = (together.iterations, together.mates, together.most_mates, story.recomputed, len(story.losses))
            assert counted == (
                timing.iterations,
                timing.mates,
                timing.most_mates,
                timing.recomputed_tokens,
                timing.preemptions,
            ), where
            assert story.cached == timing.cached_tokens, where
        for story in told.values():
            where = f"seed {seed}, request {story.id}: {story}"
            spans = [span for span in story.spans if span.kind != "burned"]
            assert sum(span.seconds for span in spans) == pytest.approx(story.ended - story.arrived, abs=1e-6), where
            in_queue = [wait for wait in story.waits if not wait.is_left_out]
            for before, after in pairwise(in_queue):
                assert before.end <= after.begin, where
            until = story.began if story.began is not None else story.ended
            first = sum(wait.seconds for wait in in_queue if wait.end <= until)
            assert first == pytest.approx(until - story.arrived, abs=1e-6), where
            untils = [*(loss.at for loss in story.losses[1:]), story.ended]
            again = sum((loss.resumed or until) - loss.at for loss, until in zip(story.losses, untils, strict=False))
            assert story.waited == pytest.approx(first + again, abs=1e-6), where
            waits += len(in_queue)
            losses += len(story.losses)
    assert waits > 25
    assert losses > 5 or policy is not None


class Checker:
    """Reads a log of who comes first is served first, and holds every reason against the batches.

    Owner of what runs by its own account. KV is counted where no prefix is shared.
    """

    def __init__(self, log: Log) -> None:
        self.config = log.header.config
        self.policy = self.config.policy
        self.arrived: dict[int, Arrived] = {}
        self.waiting: list[int] = []  # in order of arrival
        self.blocks: dict[int, int] = {}  # of those that run
        self.computed: dict[int, int] = {}
        self.generated: dict[int, int] = defaultdict(int)
        self.ended: set[int] = set()
        self.left: set[int] = set()
        self.flying: list[Submitted] = []
        self.head: Waits | None = None
        self.preempting: set[int] = set()
        self.seen: dict[str, int] = defaultdict(int)
        events = [*log.events, None]
        for event, following in pairwise(events):
            self.take(event, following if isinstance(following, Submitted) else None)

    def take(self, event, following: Submitted | None) -> None:
        match event:
            case Arrived():
                self.arrived[event.id] = event
                self.waiting.append(event.id)
            case Left():
                self.ended.add(event.id)
                self.left.add(event.id)
                self.waiting = [id for id in self.waiting if id != event.id]
                self.drop(together=False)
            case Decided():
                self.preempting = {one.by for one in event.decisions if isinstance(one, Preempted)}
                for one in event.decisions:
                    if isinstance(one, Preempted):
                        assert one.tokens == self.computed[one.id] and one.by in self.blocks
                        assert self.place(one.by) < self.place(one.id), "the younger one is preempted"
                        self.blocks.pop(one.id)
                        self.computed[one.id] = 0
                        self.waiting = sorted([*self.waiting, one.id], key=self.place)
                for one in event.decisions:
                    if isinstance(one, Waits):
                        self.check(one, event, following)
            case Submitted():
                self.submitted(event)
            case Returned():
                self.returned(self.flying.pop(0), event)

    def place(self, id: int) -> int:
        return list(self.arrived).index(id)

    def in_flight(self, id: int) -> int:
        return sum(row[0] == id for batch in self.flying for row in batch.rows)

    def room(self, id: int) -> int:
        """Tokens for which admission wants KV."""
        event = self.arrived[id]
        return event.prompt + (event.max_tokens if self.policy.reserve else event.done + self.generated[id])

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def check(self, one: Waits, event: Decided, following: Submitted | None) -> None:
        rows = () if following is None else following.rows
        admitted = [id for id, *_ in rows if id in self.waiting]
        own = sum(self.config.overlap or not self.in_flight(row[0]) for row in rows)
        tokens = sum(row[2] for row in rows)
        self.seen[f"{one.why}, running" if one.runs else one.why] += 1
        assert one.id not in [row[0] for row in rows], "who takes part does not wait"
        if one.runs:
            assert one.id in self.blocks and self.in_flight(one.id) <= self.config.overlap
        else:
            left = [id for id in self.waiting if id not in admitted]
            assert one.id == left[0], "who came first stands first"
            self.head = one
        match one.why:
            case "rows":
                assert own == self.config.max_batch_size
            case "tokens":
                is_dealt = self.config.depth > 1 and not self.config.overlap
                assert tokens == self.config.max_batch_tokens or is_dealt
            case "closed":
                assert self.policy.request_level and self.blocks
            case "shape":
                assert self.policy.alike and rows
            case "yields":
                assert self.config.overlap and one.runs and self.place(one.by) < self.place(one.id)
            case "preemption":
                assert one.by in self.preempting
            case "memory":
                [lacking] = [other for other in event.decisions if other.id == one.by] or [None]
                assert lacking is None or (isinstance(lacking, Waits) and lacking.runs)
                assert one.by in self.blocks and one.by not in [row[0] for row in rows]
            case "blocks" if not self.policy.prefix_cache and not one.runs:
                held = dict(self.blocks)
                for id, start, count, _ in rows:
                    held[id] = max(held.get(id, 0), self.blocks_for(start + count))
                for id in admitted:
                    held[id] = self.blocks_for(self.room(id))
                spare = 0 if self.policy.reserve else len(held)
                missing = self.blocks_for(self.room(one.id)) + spare + sum(held.values()) - self.config.num_blocks
                assert one.blocks == missing > 0
                assert [count for _, count in one.holders] == sorted(held.values(), reverse=True)[:3]
                assert all(held[id] == count for id, count in one.holders)
                self.seen["blocks, counted"] += 1

    def submitted(self, event: Submitted) -> None:
        self.flying.append(event)
        for id, start, count, _ in event.rows:
            if id in self.waiting:
                self.waiting.remove(id)
                self.blocks[id] = self.blocks_for(self.room(id))
            self.blocks[id] = max(self.blocks[id], self.blocks_for(start + count))
            self.computed[id] = max(self.computed.get(id, 0), start + count)
        if self.waiting:
            assert self.head is not None and self.head.id == self.waiting[0], "who stands first knows why"

    def returned(self, batch: Submitted, event: Returned) -> None:
        for id, start, count, samples in batch.rows:
            new = self.arrived[id]
            self.generated[id] += samples and id not in self.ended
            is_done = new.done + self.generated[id] >= new.max_tokens and start + count >= new.prompt
            if id in event.stopped or id in event.failed or is_done:
                self.ended.add(id)
        self.drop(together=True)

    def drop(self, *, together: bool) -> None:
        """Who has ended gives its KV back when no batch carries it; of a static batch only who leaves, or all."""
        gone = [id for id in self.blocks if id in self.ended and not self.in_flight(id)]
        if self.policy.request_level and not (together and len(gone) == len(self.blocks)):
            gone = [id for id in gone if id in self.left]
        for id in gone:
            del self.blocks[id]


@pytest.mark.parametrize("policy", ["default", PLAIN, "orca", "static", "stacked"], ids=str)
def test_the_batches_bear_out_every_reason(policy: str | Policy) -> None:
    base = random.SystemRandom().randrange(10**9)
    seen: dict[str, int] = defaultdict(int)
    wanted = {
        "default": {"rows", "tokens", "blocks", "preemption", "yields, running"},
        "orca": {"rows", "blocks", "blocks, counted"},
        "static": {"closed", "rows", "blocks, counted"},
        "stacked": {"shape", "rows"},
    }.get(str(policy), {"rows", "blocks, counted", "preemption"})
    for seed in range(base, base + 400):
        if seed >= base + 40 and wanted <= set(seen):  # one life in twenty sees somebody yield
            break
        world = logged_life(seed, policy)
        [log] = read(bytes(world.data))
        try:
            for why, count in Checker(log).seen.items():
                seen[why] += count
        except BaseException:
            print(f"seed {seed}")
            raise
    assert wanted <= set(seen), dict(seen)


def test_decisions_are_few() -> None:
    """Changes only: a log grows by a small part, whatever the load."""
    sizes = {"decided": 0, "all": 0}
    for seed in range(40):
        for line in bytes(logged_life(seed).data).splitlines():
            sizes["all"] += len(line)
            sizes["decided"] += len(line) if line.startswith(b'{"type":"decided"') else 0
    assert 0 < sizes["decided"] < 0.35 * sizes["all"], sizes


def test_a_log_of_before_has_stories_without_reasons() -> None:
    [log] = read(RECORDED.read_bytes())
    assert log.header.version == 1
    told = stories(log)
    assert {story.end for story in told} == {"stop", "length", "abort"}
    assert sum(len(story.losses) for story in told) > 0, "a preemption shows in what is computed again"
    assert {wait.why for story in told for wait in story.waits} == {"unknown"}
    for story in told:
        spans = sum(span.seconds for span in story.spans)
        assert spans == pytest.approx(story.ended - story.arrived, abs=1e-6)


def test_a_log_that_is_cut_off_leaves_its_stories_open() -> None:
    world = logged_life(5)
    [log] = read(bytes(world.data))
    for count in range(0, len(log.events), 7):
        cut = msgspec.structs.replace(log, events=log.events[:count])
        for story in stories(cut):
            assert story.end is not None or story.ended == cut.events[-1].at
            assert sum(span.seconds for span in story.spans if span.kind != "burned") == pytest.approx(
                story.ended - story.arrived, abs=1e-6
            )
