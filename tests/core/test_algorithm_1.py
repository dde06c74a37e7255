"""The policy "orca" makes the batches of the paper's Algorithm 1, transcribed here line by line, at block size 1."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from ledger_world import VOCAB, random_life

from orcaserve.core.invariants import CheckedScheduler
from orcaserve.core.policy import ORCA
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.ledger import LedgerExecutor


class Wish:
    def __init__(self, id: int, prompt: int, output: int) -> None:
        self.id, self.prompt, self.output = id, prompt, output
        self.state = "INITIATION"
        self.generated = 0


class Paper:
    """Algorithm 1 with a fixed number of iterations per request and no end tokens."""

    def __init__(self, n_workers: int, max_bs: int, n_slots: int) -> None:
        self.n_workers, self.max_bs, self.n_slots = n_workers, max_bs, n_slots
        self.pool: list[Wish] = []
        self.n_scheduled = self.n_rsrv = 0
        self.in_flight: list[list[Wish]] = []
        self.history: list[tuple[int, ...]] = []

    def turn(self) -> None:
        while True:
            batch = self.select()
            if not batch:
                break
            self.history.append(tuple(wish.id for wish in batch))
            for wish in batch:
                wish.state = "RUNNING"
            self.in_flight.append(batch)
            self.n_scheduled += 1
            if self.n_scheduled == self.n_workers:
                break
        if self.in_flight:
            for wish in self.in_flight.pop(0):
                wish.state = "INCREMENT"
                wish.generated += 1
                if wish.generated == wish.output:
                    self.n_rsrv -= wish.prompt + wish.output
                    self.pool.remove(wish)
            self.n_scheduled -= 1

    def select(self) -> list[Wish]:
        batch: list[Wish] = []
        for wish in [wish for wish in self.pool if wish.state != "RUNNING"]:
            if len(batch) == self.max_bs:
                break
            if wish.state == "INITIATION":
                reserve = self.n_rsrv + wish.prompt + wish.output
                if reserve > self.n_slots:
                    break
                self.n_rsrv = reserve
            batch.append(wish)
        return batch


@pytest.mark.parametrize("seed", range(150))
def test_batches_are_those_of_the_paper(seed: int) -> None:
    rng = random.Random(seed)
    n_workers, max_bs, n_slots = rng.randint(1, 4), rng.randint(1, 5), rng.choice([8, 20, 60])
    paper = Paper(n_workers, max_bs, n_slots)
    config = SchedulerConfig(
        policy=ORCA, max_batch_size=max_bs, max_batch_tokens=1, num_blocks=n_slots, block_size=1, depth=n_workers
    )
    scheduler = CheckedScheduler(config)
    executor = LedgerExecutor(n_slots, 1, VOCAB)
    in_flight: list = []
    history: list[tuple[int, ...]] = []
    iterations: Counter[int] = Counter()
    next_id = 0
    for turn in range(200):
        for _ in range(rng.choice([0, 0, 0, 1, 3]) if turn < 120 else 0):
            prompt = rng.randint(1, n_slots - 1)
            output = rng.randint(1, n_slots - prompt)
            next_id += 1
            paper.pool.append(Wish(next_id, prompt, output))
            params = SamplingParams()
            tokens = tuple(rng.choices(range(VOCAB), k=prompt))
            scheduler.add(NewRequest(id=next_id, token_ids=tokens, num_prompt=prompt, max_tokens=output, params=params))
        paper.turn()
        while len(in_flight) < n_workers and (batch := scheduler.schedule()) is not None:
            in_flight.append((batch, executor.submit(batch)))
            history.append(tuple(row.id for row in batch.rows))
            for row in batch.rows:
                iterations[row.id] += 1
                earlier = [id for id in scheduler.requests if id < row.id]
                assert all(iterations[id] >= iterations[row.id] for id in earlier), "iteration-level FCFS"
        if in_flight:
            batch, pending = in_flight.pop(0)
            scheduler.update(batch, pending.result())
    assert history == paper.history
    assert len(history) > 50


@pytest.mark.parametrize("seed", range(30))
def test_larger_blocks_reserve_whole_blocks(seed: int) -> None:
    random_life(seed, policy="orca")
