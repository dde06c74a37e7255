"""`orcaserve bench parallel` on a small model: real processes, every figure there; not how large they are."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import kernel_sets
import psutil
import pytest
from click.testing import CliRunner

from orcaserve.cli import main
from orcaserve.engine.executor import WorkerLost
from orcaserve.executors import join_cost
from orcaserve.model.random_checkpoint import Shape, write_random
from orcaserve.sim.cost import StageCost
from orcaserve.sim.stages import share_layers, split_layers

pytestmark = kernel_sets.NEEDS_NATIVE
SHAPE = Shape(layers=2, hidden=64, mlp=64, heads=8, kv_heads=2, vocab=300, max_positions=160)


def test_every_way_is_measured_and_stages_are_foretold(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "parallel.json"
    model.mkdir()
    write_random(model, SHAPE)
    asked = ["bench", "parallel", str(model), "--requests", "4", "--batch", "4", "--rounds", "1", "--out", str(out)]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_bytes())
    runs = {run["name"]: run for run in found["runs"]}
    assert list(runs) == [
        "one stage", "two stages", "two ranks share the layers", "two stages, static microbatches", "one stage, static"
    ]  # fmt: skip
    for run in runs.values():
        assert run["rate"] > 0 and run["iterations"] > 0
        assert all(0 < share < 1.1 for share in run["busy"])
        assert run["predicted"] > 0 and run["learned"] > 0
    assert len(runs["two stages"]["busy"]) == 2
    assert [at["requests"] for at in found["iterations"]][:2] == [1, 16]
    assert [join["rows"] for join in found["joins"]] == [1, 4, 16, 64, 512]
    assert all(join["fixed"] > 0 and join["plain"] > 0 for join in found["joins"])
    assert "two stages" in result.output


def test_a_worker_that_dies_ends_it_by_one_line(tmp_path: Path) -> None:
    write_random(tmp_path, SHAPE)
    command = [sys.executable, "-m", "orcaserve", "bench", "parallel", str(tmp_path), "--requests", "4"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            for child in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "orcaserve.executors.worker_process" in child.cmdline():
                        child.kill()
            time.sleep(0.02)
        *_, last = process.stderr.read().splitlines()
    assert process.returncode == 1
    assert last.startswith("Error: worker 0 is gone (signal 9)")


def test_a_rank_that_fails_to_join_is_no_traceback_of_ours() -> None:
    with pytest.raises(WorkerLost, match="failed"):
        join_cost.measure(-1)


def test_the_stages_of_a_cut_cost_what_the_whole_did() -> None:
    whole = StageCost(fixed=1.0, weights=2.0, per_token=0.5, per_context=0.25, head=4.0, per_sample=0.125)
    stages = split_layers(whole, [3, 1])
    for name in StageCost.__struct_fields__:
        assert sum(getattr(stage, name) for stage in stages) == pytest.approx(getattr(whole, name))
    assert stages[0].head == 0 and stages[1].head == 4.0
    assert stages[0].weights == 1.5


def test_ranks_that_share_layers_halve_the_work_and_wait_for_each_other() -> None:
    whole = StageCost(fixed=1.0, weights=2.0, per_token=0.5, per_row=3.0, per_context=0.25, head=4.0, per_sample=0.125)
    rank = share_layers(whole, 4, 2, hop=0.01, per_row=0.001)
    assert (rank.weights, rank.per_token, rank.per_context, rank.head, rank.per_sample) == (1, 0.25, 0.125, 2, 0.0625)
    assert rank.per_row == 3.0
    assert rank.fixed == pytest.approx(1.0 + 8 * 0.01)
    assert rank.per_token_sent == pytest.approx(8 * 0.001)
