"""`orcaserve simulate`: figures as of bench serve, from a workload or a log, and one line for what is wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from orcaserve.bench import simulation
from orcaserve.bench.simulation import Fitted
from orcaserve.bench.workloads import spec
from orcaserve.cli import main
from orcaserve.core.config import SwapSpace
from orcaserve.core.policy import POLICIES
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.core.scheduler import Scheduler, SchedulerConfig
from orcaserve.engine.loop import EngineLoop
from orcaserve.engine.messages import Step, Stop, Submit
from orcaserve.engine.step_log import Arrived, Header, Log, Returned, StepLog, Submitted, log_clock, read
from orcaserve.sim.cost import CostModel, Door, StageCost
from orcaserve.sim.executor import SimExecutor, VirtualClock
from orcaserve.sim.run import Arrival, simulate

CONFIG = SchedulerConfig(
    policy=POLICIES["default"], max_batch_size=8, max_batch_tokens=64, num_blocks=300, block_size=16
)
COST = CostModel(stages=(StageCost(fixed=0.01, weights=0.02, per_token=0.001),), turn=0.001)
PAPER = ("--hardware", "A100-40GB", "--model", "175B", "--tensor-parallel", "8", "--pipeline-parallel", "2")
WORK = "poisson:rate=5,in=32-512,out=1-128,n=30"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["simulate", *map(str, arguments)])


def recorded(arrivals: list[Arrival]) -> bytes:
    """A step log of a simulated engine: the real loop and scheduler, with known costs."""
    clock, data = VirtualClock(), bytearray()
    left = list(arrivals)

    class Ends:
        def take(self, block: bool) -> list:
            if block:
                if not left:
                    return [Stop()]
                clock.advance_to(left[0].time)
            commands = []
            while left and left[0].time <= clock.now:
                arrival = left.pop(0)
                id = len(arrivals) - len(left)
                request = NewRequest(
                    id=id,
                    token_ids=(id,) * arrival.num_prompt,
                    num_prompt=arrival.num_prompt,
                    max_tokens=arrival.num_output,
                    params=SamplingParams(),
                )
                commands.append(Submit(request))
            return commands

        def put(self, step: Step) -> None:
            pass

    ends = Ends()
    log = StepLog(Header(config=CONFIG), data.extend)
    EngineLoop(Scheduler(CONFIG), SimExecutor(COST, clock, COST.host), ends, ends, log_clock(clock), log).run()
    return bytes(data)


def arrivals() -> list[Arrival]:
    return simulation.arrivals_of(spec.make(WORK, vocab=3072, seed=1))


def test_a_paper_model_under_a_workload(tmp_path: Path) -> None:
    done = run("--workload", WORK + ",tenant=a + burst:in=9,out=3,n=4", *PAPER, "--slo", "ttft=1", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    for word in ("34 answered, 0 failed", "normalised latency", "goodput", "TPOT", "tenant", "175B on A100-40GB"):
        assert word in done.output
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["summary"]["answered"] == 34 and report["simulated"]["config"]["depth"] == 2
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 34
    again = run("--workload", WORK + ",tenant=a + burst:in=9,out=3,n=4", *PAPER, "--slo", "ttft=1")
    assert again.output == done.output, "a simulation follows from its arguments"


def test_orders_know_whose_a_request_is_and_how_urgent(tmp_path: Path) -> None:
    flood = "burst:in=400,out=40-90,n=60,tenant=flood,priority=3"
    work = f"{flood} + poisson:rate=4,in=30,out=5,n=8,tenant=polite,deadline=0.5"
    first = {}
    for policy in ("default", "priority", "fair", "deadline", "mlfq,quantum=256"):
        done = run("--workload", work, *PAPER, "--policy", policy, "--max-batch-size", 4, "--out", tmp_path)
        assert done.exit_code == 0, done.output
        records = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
        polite = [record for record in records if record["tenant"] == "polite"]
        first[policy] = max(record["token_times"][0] - record["due"] for record in polite)
    slow = first.pop("default")
    assert all(wait < slow / 3 for wait in first.values()), (slow, first)


def test_record_fit_and_simulate(tmp_path: Path) -> None:
    """A fit to a log, and the log's own requests through it: what comes out is what was recorded."""
    log, cost = tmp_path / "steps.jsonl", tmp_path / "cost.json"
    log.write_bytes(recorded(arrivals()))
    assert "every one as recorded" in run("replay", log).output
    done = run("fit", log, "--out", cost)
    assert done.exit_code == 0, done.output
    done = run("--log", log, "--cost", cost, "--no-noise", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    simulated = json.loads((tmp_path / "out" / "report.json").read_bytes())["summary"]
    records, _ = simulate(arrivals(), CONFIG, COST, COST.host)
    wall = max(record.token_times[-1] for record in records) - min(record.arrival for record in records)
    assert simulated["wall"] == pytest.approx(wall, rel=0.02)


def test_what_goes_with_a_fitted_cost_and_what_does_not(tmp_path: Path) -> None:
    """The engine's swap space is kept; options that would say nothing are refused."""
    swap = SwapSpace(num_slots=64, copy_seconds=1e-6, token_seconds=1.0)
    config = msgspec.structs.replace(CONFIG, num_blocks=40, swap=swap)
    cost, log = tmp_path / "cost.json", tmp_path / "steps.jsonl"
    cost.write_bytes(msgspec.json.encode(Fitted(cost=COST, config=config)))
    work = ("--workload", "burst:in=100,out=60,n=7,tenant=a + burst:in=100,out=60,n=1,tenant=b", "--cost", cost)
    done = run(*work, "--step-log", log)
    assert done.exit_code == 0, done.output
    [life] = read(log.read_bytes())
    assert life.header.config.swap == swap
    assert any(event.swaps for event in life.events if isinstance(event, Submitted))
    again = run("--log", log, "--cost", cost)
    assert again.exit_code == 0 and "tenant" in again.output, "and a log's tenants are told"
    for options, said in (
        (("--pipeline-parallel", 2), "goes with --hardware"),
        (("--tensor-parallel", 2), "goes with --hardware"),
        (("--hardware", "H100"), "either --cost, or --hardware and --model"),
        (("--blocks", 9, "--kv-memory", "1MiB"), "either --blocks or --kv-memory"),
    ):
        refused = run(*work, *options)
        assert refused.exit_code == 2 and said in " ".join(refused.output.split()), refused.output


def test_a_row_that_was_ahead_of_the_end_gave_nothing() -> None:
    rows = ((1, 0, 2, True),), ((1, 2, 1, True),), ((1, 3, 1, True),)
    events = (
        Arrived(at=0.0, id=1, prompt=2, max_tokens=9),
        Submitted(0.0, rows[0]),
        Submitted(0.1, rows[1]),
        Returned(at=0.2, seconds=0.1),
        Submitted(0.2, rows[2]),
        Returned(at=0.3, seconds=0.1, stopped=(1,)),
        Returned(at=0.4, seconds=0.1),
    )
    [arrival] = simulation.arrivals_of_log(Log(Header(config=CONFIG), events))
    assert arrival.num_output == 2


def test_who_leaves_before_the_door_lets_it_in_is_not_computed() -> None:
    late = msgspec.structs.replace(COST, door=Door(arrive=1.0))
    gone, other = simulation.run([Arrival(0.0, 5, 3, leaves=0.5), Arrival(0.1, 5, 3)], CONFIG, late)
    assert (gone.output_tokens, gone.error_kind, other.output_tokens) == (0, "hung up", 3)


def test_replicas_share_the_requests() -> None:
    alone = simulation.run(arrivals() * 4, CONFIG, COST)
    shared = simulation.run(arrivals() * 4, CONFIG, COST, replicas=4)
    assert len(shared) == len(alone) == 120
    assert max(record.last for record in shared) < max(record.last for record in alone) / 2


def test_a_door_lets_one_in_after_the_other() -> None:
    burst = [Arrival(0.0, 5, 1)] * 3
    door = msgspec.structs.replace(COST, door=Door(arrive=0.5, busy=0.2, deliver=1.0, per_row=0.1))
    plain, late = (simulation.run(burst, CONFIG, cost) for cost in (COST, door))
    assert late[0].first == pytest.approx(plain[0].first + 1.5, abs=0.02)
    assert late[2].first > late[0].first + 0.39


def test_the_door_is_found_from_both_of_its_sides() -> None:
    """tools/predict.py: what a client saw and what the engine wrote down tell what passes between the two."""
    true = Door(arrive=0.006, busy=0.002, deliver=0.003, per_row=0.0002)
    cost = msgspec.structs.replace(COST, door=true)
    asked = arrivals() + [Arrival(9.0 + i / 1e6, 30, 5 + i) for i in range(90)]
    asked.sort(key=lambda arrival: arrival.time)
    seen = [
        msgspec.structs.replace(arrival, time=time)
        for arrival, time in zip(asked, simulation._through(true, asked), strict=True)
    ]
    [log] = read(recorded(seen))
    found = predict().door(simulation.run(asked, CONFIG, cost), log)
    # The clocks differ by nobody knows how much: only the sum of both ways can be told.
    assert found.arrive + found.deliver == pytest.approx(true.arrive + true.deliver, abs=0.0015)
    assert found.busy == pytest.approx(true.busy, abs=0.001)
    assert found.per_row == pytest.approx(true.per_row, rel=0.2)


def predict() -> Any:
    path = Path(__file__).parents[2] / "tools" / "predict.py"
    found = importlib.util.spec_from_file_location("predict", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_lives_before_the_last_are_left_out_aloud(tmp_path: Path) -> None:
    log, prices = tmp_path / "steps.jsonl", tmp_path / "prices.json"
    prices.write_text('{"A100-40GB": 1.0}')
    plan = ("plan", "--slo", "ttft=60", "--prices", prices, "--model", "13B", "--tensor-parallel", "1")
    for number in (1, 2):
        log.write_bytes(recorded(arrivals()[:2]) * number)
        for command in (PAPER, plan):
            done = run(*command, "--log", log)
            assert done.exit_code == 0, done.output
            assert ("1 before it are left out" in done.stderr) == (number == 2)


def test_a_limit_of_time_between_tokens_is_kept_and_written_down(tmp_path: Path) -> None:
    work = "burst:in=50,out=400,n=4 + poisson:rate=1,in=1500,out=2,n=12,start=1"
    found = []
    for name, options in (("free", ()), ("bound", ("--max-itl", "120"))):
        done = run("--workload", work, *PAPER, "--blocks", "2000", *options, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        found.append(json.loads((tmp_path / name / "report.json").read_text()))
    free, bound = (report["summary"]["times"]["itl"]["p99"] for report in found)
    assert free > 0.12 * 1.2 > bound, (free, bound)
    assert [report["simulated"]["config"].get("max_itl") for report in found] == [None, 0.12]


def test_a_recorded_limit_of_time_holds_unless_another_is_asked_for(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    costs = ("--hardware", "A100-40GB", "--model", "13B", "--out", tmp_path / "out")
    assert run("--workload", WORK, *costs[:4], "--max-itl", "120", "--step-log", log).exit_code == 0
    found = []
    for options in ((), ("--max-itl", "0"), ("--max-itl", "50"), ("--policy", "orca")):
        done = run("--log", log, *costs, *options)
        assert done.exit_code == 0, done.output
        found.append(json.loads((tmp_path / "out" / "report.json").read_text())["simulated"]["config"].get("max_itl"))
    assert found == [0.12, None, 0.05, None], "orca cannot have one"


def test_a_log_gives_back_what_was_asked_of_the_engine() -> None:
    [log] = read(recorded(arrivals()))
    found = simulation.arrivals_of_log(log)
    assert [(one.num_prompt, one.num_output) for one in found] == [
        (one.num_prompt, one.num_output) for one in arrivals()
    ]
    with pytest.raises(ValueError, match="no request that generated"):
        simulation.arrivals_of_log(Log(log.header, ()))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "either --workload or --log"),
        (("--workload", WORK), "either --cost, or --hardware and --model"),
        (("--workload", WORK, "--hardware", "abacus", "--model", "13B"), "no hardware is called 'abacus'"),
        (("--workload", WORK, "--hardware", "H100", "--model", "14B"), "no model is called '14B'"),
        (("--workload", "tides:n=1", *PAPER), "there is no workload"),
        (("--workload", "poisson:rate=1,in=1,out=1,n=0", *PAPER), "whole number from 1"),
        (("--workload", WORK, "--hardware", "H100", "--model", "175B"), "does not fit 1 x H100"),
        (("--workload", "burst:in=512,out=9,n=1", *PAPER, "--blocks", "2"), "the KV cache holds 32"),
        (("--workload", WORK, *PAPER, "--policy", "orca", "--max-itl", "50"), "'orca' takes them whole"),
        (("--log", "/nowhere", *PAPER), "/nowhere cannot be read"),
        (("--workload", WORK, "--cost", "/nowhere"), "/nowhere cannot be read"),
        (("replay", "/nowhere"), "/nowhere cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.exit_code != 0
    assert says in done.output.splitlines()[-1]


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"type":"abort","at":-1,"id":1}\n')
    assert "is no step log" in run("replay", path).output
    assert "is no cost model" in run("--workload", WORK, "--cost", path).output
    lines = recorded(arrivals()[:1]).splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] * 2 + b"".join(lines[2:]))
    assert "request 1 is here already" in run("replay", path).output
    path.write_bytes(lines[0].replace(b'"block_size":16', b'"block_size":0') + lines[1])
    assert "a KV block holds at least one token" in run("replay", path).output
    path.write_bytes(lines[0])
    assert "no request that generated a token" in run("--log", path, *PAPER).output
    assert "0 iterations are too few" in run("fit", path, "--out", tmp_path / "cost").output
