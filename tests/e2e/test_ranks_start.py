"""The ranks of a host are forked by one process that has imported what they need; the engine imports none of it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import kernel_sets
import psutil
import pytest
from serving import Serving, is_alive

from orcaserve.builtin import MODEL_DIR
from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.engine.executor import WorkerLost
from orcaserve.executors import workers
from orcaserve.executors.build import build
from orcaserve.executors.distributed import DistributedExecutor

pytestmark = kernel_sets.NEEDS_NATIVE


@contextlib.contextmanager
def two_ranks(lost: list[str], noticed: threading.Event) -> Iterator[DistributedExecutor]:
    def on_lost(why: str) -> None:
        lost.append(why)
        noticed.set()

    options = EngineOptions(model=str(MODEL_DIR), tensor_parallel=2, threads=2, kv_memory=8 << 20)
    executor, _ = build(options, on_lost=on_lost)
    assert isinstance(executor, DistributedExecutor)
    try:
        yield executor
    finally:
        executor.close()
    assert not any(map(is_alive, executor.pids))


def test_only_the_ranks_and_their_parent_have_torch() -> None:
    with Serving("--tensor-parallel-size", "2", "--kv-memory", "8MiB") as server:
        [parent] = server.engine.children()
        ranks = parent.children()
        assert len(ranks) == 2
        has_torch = [
            "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text()
            for process in (psutil.Process(server.process.pid), server.engine, parent, *ranks)
        ]
        assert has_torch == [False, False, True, True, True]


@pytest.mark.parametrize("is_parent_stopped", [False, True])
def test_a_rank_is_missed_whatever_its_parent_does(is_parent_stopped: bool) -> None:
    lost: list[str] = []
    noticed = threading.Event()
    with two_ranks(lost, noticed) as executor:
        if is_parent_stopped:
            psutil.Process(executor.pids[1]).parent().suspend()
        os.kill(executor.pids[1], signal.SIGKILL)
        assert noticed.wait(10)
    manner = "it closed its socket" if is_parent_stopped else "signal 9"
    assert lost == [f"worker 1 is gone ({manner})"]


def test_ranks_end_with_their_parent() -> None:
    lost: list[str] = []
    noticed = threading.Event()
    with two_ranks(lost, noticed) as executor:
        psutil.Process(executor.pids[0]).parent().kill()
        assert noticed.wait(10)
    [why] = lost
    assert why.endswith("is gone (signal 9)")


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ("sys.modules['orcaserve.executors.rank'] = None", ModelError, "the workers could not start: ModuleNotFound"),
        ("os.kill(os.getpid(), 9)", WorkerLost, r"worker . is gone \(signal 9\)"),
    ],
)
def test_what_keeps_ranks_from_being_forked_is_told(
    line: str, error: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys, msgspec\n"
        "from orcaserve.executors import worker_process\n"
        "from orcaserve.executors.messages import Ends\n"
        f"{line}\n"
        "os._exit(worker_process.main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=list[Ends])))\n"
    )
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, str(script)))
    before = time.monotonic()
    with pytest.raises(error, match=says):
        build(EngineOptions(model=str(MODEL_DIR), tensor_parallel=2, threads=2))
    print(f"told after {time.monotonic() - before:.2f} s")
