"""A fleet from a sample of it, and the cheapest configuration within limits."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from orcaserve.bench import fleet, planner, simulation
from orcaserve.bench.fleet import Fleet
from orcaserve.bench.workloads import spec
from orcaserve.bench.workloads.traces import Row
from orcaserve.cli import main
from orcaserve.core.policy import POLICIES
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.sim.cost import CostModel, StageCost
from orcaserve.sim.hardware import Parallel
from orcaserve.sim.shape import SHAPES

ROWS = [Row(i * 3.0, 20 + i % 70, 1 + i % 30) for i in range(1200)]
CONFIG = SchedulerConfig(
    policy=POLICIES["default"], max_batch_size=16, max_batch_tokens=256, num_blocks=900, block_size=16
)
COST = CostModel(stages=(StageCost(fixed=0.05, per_token=0.001),))
WORK = "poisson:rate=6,in=32-512,out=1-128,n=60"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)])


def test_engines_share_the_hour_evenly() -> None:
    of = Fleet(engines=50, requests=60_000, sampled=20)
    counts = [len(fleet.thinned(ROWS, of, engine)) for engine in range(20)]
    assert sum(counts) / 20 == pytest.approx(60_000 / 50, rel=0.05)
    assert len(set(counts)) > 5, "the shares are independent"
    assert fleet.thinned(ROWS, of, 3) == fleet.thinned(ROWS, of, 3)


def test_a_short_excerpt_stands_for_as_many_as_are_asked_for() -> None:
    got = fleet.thinned(ROWS[:10], Fleet(engines=1, requests=1_000_000, sampled=1), 0)
    assert len(got) == pytest.approx(1_000_000 * 27 / 3600, rel=0.03)


def test_a_sample_stands_for_all() -> None:
    """The interval of a few engines holds what many more of them give, and a larger sample's is narrower."""
    many = fleet.simulate(ROWS, Fleet(engines=60, requests=40_000, sampled=12), CONFIG, COST)
    of_all, of_few = fleet.estimates(many), fleet.estimates(many[:6])
    assert [one.name for one in of_all][:3] == ["ttft p50", "ttft p90", "ttft p99"]
    for whole, few in zip(of_all, of_few, strict=True):
        assert few.low <= few.value <= few.high
        # Half as much again on either side: six engines tell little about their own spread.
        slack = (few.high - few.low) / 2 + 0.02 * few.value
        assert few.low - slack <= whole.value <= few.high + slack
        assert whole.high - whole.low <= (few.high - few.low) * 1.5
    with pytest.raises(ValueError, match="a sample of 1 engine up to all"):
        fleet.simulate(ROWS, Fleet(engines=2, requests=10, sampled=3), CONFIG, COST)


def test_the_command_says_how_sure_it_is(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:{i // 60:02}:{i % 60:02}.0,100,9" for i in range(300)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]))
    options = ("--hardware", "H100", "--model", "13B", "--devices", 100, "--sampled", 3, "--hourly", 90_000)
    done = run("fleet", "--azure", trace, *options)
    assert done.exit_code == 0, done.output
    assert "100 engines of 1 x H100" in done.output and "ttft p99" in done.output
    assert run("fleet", "--azure", trace, *options).output == done.output
    assert "cannot" in run("fleet", "--azure", trace, *options, "--tensor-parallel", 7).output
    assert "is no trace of Azure" in run("fleet", "--azure", __file__, *options).output


def test_the_cheapest_that_meets_the_limits_comes_first(tmp_path: Path) -> None:
    arrivals = simulation.arrivals_of(spec.make(WORK, vocab=3072, seed=0))
    among = list(planner.candidates(["A100-40GB", "H100"], [1, 2], [1], [32], ["default"]))
    prices = {"A100-40GB": 2.0, "H100": 4.0}
    lax = planner.choose(arrivals, SHAPES["13B"], {"ttft": 5, "tpot": 0.5}, prices, among)
    assert [choice.price for choice in lax] == sorted(choice.price for choice in lax)
    assert lax[0].candidate == planner.Candidate("A100-40GB", Parallel(1, 1), 32, "default")
    strict = planner.choose(arrivals, SHAPES["13B"], {"tpot": 0.014}, prices, among)
    assert strict[0].candidate.hardware == "H100" and strict[0].replicas is not None
    assert strict[-1].price is None and "even with 60 replicas" in strict[-1].why


def test_more_load_takes_more_replicas() -> None:
    among = [planner.Candidate("A100-40GB", Parallel(1, 1), 8, "default")]
    replicas = []
    for rate in (2, 20, 60):
        text = f"poisson:rate={rate},in=32-512,out=1-128,n=120"
        arrivals = simulation.arrivals_of(spec.make(text, vocab=3072, seed=0))
        [choice] = planner.choose(arrivals, SHAPES["13B"], {"ttft": 1.0}, {"A100-40GB": 1.0}, among)
        replicas.append(choice.replicas)
    assert replicas == sorted(replicas) and replicas[0] < replicas[-1]


def test_the_plan_command(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("A100-40GB = 2.0\nH200 = 5\n")
    options = ("--workload", WORK, "--prices", prices, "--model", "13B", "--tensor-parallel", "1")
    done = run("plan", *options, "--slo", "ttft=1,tpot=0.1")
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].startswith("The cheapest: 1 x (A100-40GB")
    done = run("plan", *options, "--slo", "tpot=0.000001")
    assert done.exit_code == 1 and "nothing meets the limits" in done.output
    assert "is no list of whole numbers" in run("plan", *options, "--slo", "ttft=1", "--max-batch-size", "x").output
    prices.write_text("abacus = 1")
    assert "no hardware is called 'abacus'" in run("plan", *options, "--slo", "ttft=1").output
    prices.write_text("H100 = -1")
    assert "it is above 0" in run("plan", *options, "--slo", "ttft=1").output
    prices.write_text("H100")
    assert "is no price table" in run("plan", *options, "--slo", "ttft=1").output


def test_the_plan_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arrivals = simulation.arrivals_of(spec.make(WORK, vocab=3072, seed=0))
    among = list(planner.candidates(["H100"], [1], [1], [32], ["default", "orca"]))
    planner.draw(planner.choose(arrivals, SHAPES["13B"], {"ttft": 1}, {"H100": 4.0}, among), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
