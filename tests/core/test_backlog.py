"""How long the work ahead takes: pace learnt from iterations, and waits compared with those of the real scheduler."""

from __future__ import annotations

import random
import statistics

import pytest

from orcaserve.core.backlog import Ahead, Backlog
from orcaserve.core.batch import RowResult, StepResult
from orcaserve.core.policy import POLICIES
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig

FIXED, PER_PROMPT_TOKEN, PER_ROW = 0.004, 0.0003, 0.0007


def seconds_of(num_prefill: int, num_decode: int) -> float:
    return FIXED + PER_PROMPT_TOKEN * num_prefill + PER_ROW * num_decode


def taught(count: int = 300, scale: float = 1.0, backlog: Backlog | None = None, rng: random.Random | None = None):
    rng = rng or random.Random(5)
    backlog = backlog or Backlog(16, 256)
    for _ in range(count):
        prefill, decode = rng.choice([0, 0, rng.randint(1, 240)]), rng.randint(0, 16)
        backlog.learn(prefill, decode, scale * seconds_of(prefill, decode))
    return backlog


def test_nothing_is_known_at_first() -> None:
    backlog = Backlog(16, 256)
    ahead = Ahead(num_running=16, num_waiting=9, prompt_tokens=900, output_tokens=2000)
    assert backlog.until_end(ahead, 100, 100) == 0


def test_the_pace_is_found() -> None:
    backlog = taught()
    alone = backlog.until_first_token(Ahead(), 100)
    assert alone == pytest.approx(FIXED + 100 * PER_PROMPT_TOKEN, rel=1e-3)
    in_chunks = backlog.until_first_token(Ahead(), 512)
    assert in_chunks == pytest.approx(2 * FIXED + 512 * PER_PROMPT_TOKEN, rel=1e-3)
    end = backlog.until_end(Ahead(), 100, 51)
    assert end - alone == pytest.approx(50 * (FIXED + PER_ROW), rel=1e-3)


def test_places_follow_from_what_requests_take_of_the_cache() -> None:
    """Two of four fit, so that three must end before the next one starts: each place does 3 / 2 of 40 tokens."""
    backlog = taught()
    backlog.kv_tokens = 1000
    ahead = Ahead(num_running=1, num_waiting=3, output_tokens=160, kv_tokens=2000)
    assert backlog.until_start(ahead) == pytest.approx(60 * (FIXED + 2 * PER_ROW), rel=1e-3)


@pytest.mark.parametrize("ahead", [Ahead(num_running=1, output_tokens=20), Ahead(num_waiting=1, output_tokens=20)])
def test_one_request_is_waited_for_where_there_is_one_place(ahead: Ahead) -> None:
    backlog = taught(backlog=Backlog(1, 256))
    assert backlog.until_start(ahead) == pytest.approx(20 * (FIXED + PER_ROW), rel=1e-3)


def test_nobody_ahead_takes_no_place_in_the_cache() -> None:
    backlog = taught()
    backlog.kv_tokens = 1000
    assert backlog.until_start(Ahead()) == 0
    assert backlog.until_first_token(Ahead(), 100) == pytest.approx(FIXED + 100 * PER_PROMPT_TOKEN, rel=1e-3)


def test_what_iterations_that_are_all_alike_take_is_taken_to_be_fixed() -> None:
    """Nothing tells their rows' part from the rest: more rows are not said to take longer before they have."""
    backlog = Backlog(16, 256)
    for _ in range(50):
        backlog.learn(0, 4, 0.25)
    answers = [backlog.until_end(Ahead(num_running=rows), 0, 41) for rows in (1, 4, 16)]
    assert answers == pytest.approx([41 * 0.25] * 3, rel=1e-3)


def test_the_old_pace_is_forgotten() -> None:
    backlog = taught()
    before = backlog.until_first_token(Ahead(), 100)
    taught(1000, scale=3.0, backlog=backlog, rng=random.Random(6))
    assert backlog.until_first_token(Ahead(), 100) == pytest.approx(3 * before, rel=0.01)


def test_always_the_same_kind_of_iteration_is_enough() -> None:
    """Nothing can be told apart then, and what was seen is told all the same."""
    backlog = Backlog(16, 256)
    for _ in range(50):
        backlog.learn(0, 16, 0.02)
    ahead = Ahead(num_running=16, output_tokens=1600)  # a hundred each
    assert backlog.until_start(ahead) == pytest.approx(0.02 * 100 / 16, rel=1e-3)


def test_no_noise_makes_a_time_negative() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(50):
        backlog = Backlog(8, 64)
        for _ in range(rng.randint(1, 30)):
            backlog.learn(rng.randint(0, 64), rng.randint(0, 8), rng.choice([0.0, rng.random(), 10 * rng.random()]))
        small = Ahead(num_running=rng.randint(0, 8), output_tokens=100.0)
        large = Ahead(num_running=small.num_running, num_waiting=5, prompt_tokens=500, output_tokens=600.0)
        assert 0 <= backlog.until_start(small) <= backlog.until_start(large)
        assert backlog.until_start(large) <= backlog.until_first_token(large, 9) <= backlog.until_end(large, 9, 9)


def test_what_the_prefix_cache_knows_takes_no_time() -> None:
    backlog = taught()
    ahead = Ahead(num_running=2, num_waiting=8, prompt_tokens=4000, output_tokens=100)
    all_new = backlog.until_start(ahead)
    for _ in range(100):
        backlog.learn_prompt(500, 450)
    assert backlog.until_start(ahead) == pytest.approx(all_new / 10, rel=0.01)


def test_memory_makes_places_scarce_but_what_runs_is_possible() -> None:
    backlog = taught()
    ahead = Ahead(num_running=4, num_waiting=4, prompt_tokens=0, output_tokens=800, kv_tokens=8 * 200)
    assert backlog.until_start(ahead) == 0, "16 rows have room for all"
    backlog.kv_tokens = 400
    scarce = backlog.until_start(ahead)
    assert scarce > 0
    more = Ahead(num_running=8, num_waiting=0, prompt_tokens=0, output_tokens=800, kv_tokens=8 * 200)
    assert 0 < backlog.until_start(more) < scarce


@pytest.mark.parametrize("max_batch_size", [4, 12])
def test_waits_are_those_of_the_scheduler(max_batch_size: int) -> None:
    """Arrivals at twice what can be borne: what was said to each of the later ones, and what came of it."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    config = SchedulerConfig(
        policy=POLICIES["default"], max_batch_size=max_batch_size, max_batch_tokens=64, num_blocks=4000, block_size=16
    )
    scheduler, backlog = Scheduler(config), Backlog(max_batch_size, 64)
    lengths = {id: (rng.randint(5, 150), rng.randint(2, 80)) for id in range(250)}
    said: dict[int, tuple[float, float]] = {}
    started: dict[int, float] = {}
    now, due = 0.0, 0.0
    arrivals = iter(lengths)
    coming: int | None = next(arrivals)
    while len(started) < len(lengths):
        while coming is not None and due <= now:
            present = scheduler.requests.values()
            ahead = Ahead(
                num_running=len(scheduler.running),
                num_waiting=len(scheduler.waiting),
                prompt_tokens=sum(r.lag for r in present if r.num_generated == 0),
                output_tokens=sum(r.new.max_tokens for r in present),
            )
            said[coming] = (now, backlog.until_start(ahead))
            prompt, output = lengths[coming]
            tokens = tuple(rng.randrange(10**9) for _ in range(prompt))
            new = NewRequest(id=coming, token_ids=tokens, num_prompt=prompt, max_tokens=output, params=SamplingParams())
            scheduler.add(new, now)
            # A request takes its prompt, and its share of as many iterations as it has tokens.
            due += 0.5 * (prompt * PER_PROMPT_TOKEN + output * (FIXED / max_batch_size + PER_ROW))
            coming = next(arrivals, None)
        batch = scheduler.schedule(now)
        if batch is None:
            now = due
            continue
        for new in batch.new:
            started.setdefault(new.id, now)
        decodes = sum(row.num_tokens == 1 and row.start >= lengths[row.id][0] for row in batch.rows)
        seconds = seconds_of(batch.num_tokens - decodes, decodes)
        backlog.learn(batch.num_tokens - decodes, decodes, seconds)
        now += seconds
        results = tuple(RowResult(id=row.id, token_id=0 if row.samples else None) for row in batch.rows)
        scheduler.update(batch, StepResult(results), now)
    errors = [said[id][1] / (started[id] - said[id][0]) for id in list(lengths)[50:] if started[id] - said[id][0] > 0.1]
    assert len(errors) > 100
    assert 0.75 < statistics.median(errors) < 1.33
    assert all(0.4 < error < 2.5 for error in errors)
