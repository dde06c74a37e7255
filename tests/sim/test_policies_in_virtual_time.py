"""The simulator runs the real scheduler: what the policies cost and gain on the paper's workload, in virtual time."""

from __future__ import annotations

import itertools
import random
import statistics

import msgspec
import pytest

from orcaserve.core.policy import POLICIES
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.sim.executor import LinearCost
from orcaserve.sim.run import Arrival, Record, simulate

COST = LinearCost(per_iteration=0.1, per_token=0.001)


def orca_workload(rate: float, count: int = 200) -> list[Arrival]:
    """U(32,512) in, U(1,128) out, Poisson arrivals (paper, section 6)."""
    rng = random.Random(7)
    time = 0.0
    arrivals = []
    for _ in range(count):
        time += rng.expovariate(rate)
        arrivals.append(Arrival(time, rng.randint(32, 512), rng.randint(1, 128)))
    return arrivals


def run(policy: str, arrivals: list[Arrival], **changes: int) -> list[Record]:
    fields = {"max_batch_size": 16, "max_batch_tokens": 512, "num_blocks": 1000, "block_size": 16, "depth": 1}
    records, _ = simulate(arrivals, SchedulerConfig(policy=POLICIES[policy], **(fields | changes)), COST)
    return records


def test_every_request_gets_its_tokens_after_it_arrived() -> None:
    arrivals = orca_workload(rate=1)
    for policy in POLICIES:
        for arrival, record in zip(arrivals, run(policy, arrivals), strict=True):
            assert len(record.token_times) == arrival.num_output
            assert record.token_times[0] > arrival.time
            assert list(record.token_times) == sorted(record.token_times)


def test_iteration_level_scheduling_beats_request_level_where_lengths_vary() -> None:
    arrivals = orca_workload(rate=1.2)
    latency = {
        policy: statistics.median(record.normalised_latency for record in run(policy, arrivals)) for policy in POLICIES
    }
    assert latency["orca"] < latency["static"] / 5, latency
    assert latency["default"] <= latency["orca"] * 1.2, latency


def test_equal_requests_all_at_once_gain_nothing() -> None:
    """The paper's Fig. 11: where all lengths are equal, request-level batching is as good."""
    arrivals = [Arrival(0.0, 32, 32)] * 64
    ends = {policy: max(record.token_times[-1] for record in run(policy, arrivals)) for policy in ("static", "orca")}
    assert ends["orca"] == pytest.approx(ends["static"], rel=0.02)


def test_chunked_prefill_keeps_running_streams_going() -> None:
    """A long prompt that goes whole makes the others wait; cut to the budget it cannot."""
    arrivals = [Arrival(0.0, 32, 100)] * 4 + [Arrival(1.0, 4000, 1)]
    longest = {}
    for policy in ("orca", "default"):
        times = run(policy, arrivals)[0].token_times
        longest[policy] = max(after - before for before, after in itertools.pairwise(times))
    assert longest["orca"] > 4
    assert longest["default"] < 0.7


@pytest.mark.parametrize(("host", "seconds"), [(0.02, 0.1), (0.15, 0.15)])
def test_overlap_hides_the_host_behind_the_device(host: float, seconds: float) -> None:
    """An iteration takes as long as the longer of the two, not both; with either way every token comes."""
    config = SchedulerConfig(
        policy=POLICIES["default"], max_batch_size=4, max_batch_tokens=64, num_blocks=99, block_size=4, depth=1
    )
    arrivals = [Arrival(0.0, 4, 41)] * 4
    cost = LinearCost(per_iteration=0.1, per_token=0.0)
    apace = {}
    for one in (config, msgspec.structs.replace(config, depth=2, overlap=True)):
        [record, *_], iterations = simulate(arrivals, one, cost, lambda batch: host)
        assert len(record.token_times) == len(iterations) == 41
        apace[one.overlap] = (record.token_times[-1] - record.token_times[0]) / 40
    assert apace == {False: pytest.approx(0.1 + host), True: pytest.approx(seconds, rel=0.05)}


def test_a_request_that_can_never_fit_is_named() -> None:
    with pytest.raises(ValueError, match="the KV cache holds 16"):
        run("default", [Arrival(0.0, 100, 1)], num_blocks=1)


def test_a_static_batch_in_microbatches_comes_to_its_end() -> None:
    """Its ended members keep their rows busy, but not beyond the last one's end."""
    arrivals = orca_workload(rate=1, count=60)
    policy = msgspec.structs.replace(POLICIES["static"], deal=True)
    for depth in (2, 3):
        config = SchedulerConfig(
            policy=policy, max_batch_size=8, max_batch_tokens=512, num_blocks=1000, block_size=16, depth=depth
        )
        records, _ = simulate(arrivals, config, COST)
        assert [len(record.token_times) for record in records] == [arrival.num_output for arrival in arrivals]
