"""An engine process of the tests: the real one in everything but the model, which is the ledger.

Options stand before the two file descriptors. What a batch that brings the token TOKEN does: `--crash-on TOKEN` ends
the process, `--raise-on TOKEN` raises, `--hang-on TOKEN` never returns, `--seize-on TOKEN` keeps Python's lock too,
`--wait-on TOKEN` waits for a worker that hangs.
`--stall-while FILE` makes iterations wait while it exists, and FILE.stalled tells that one does; `--step-seconds S`
makes them last. `--fail MESSAGE` and `--die-loading` end the start, and `--die-while FILE` does while it exists;
`--lose-while FILE` loses a worker of the start that finds it, and removes it; `--load-while FILE` makes it wait.
`--profiles FOLDER` gives every start a profile of its own, counted in that folder.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from orcaserve.core.batch import Batch
from orcaserve.core.config import EngineInfo, EngineOptions, ModelError
from orcaserve.engine.executor import Executor, Pending, WorkerLost
from orcaserve.engine.ledger import LedgerExecutor
from orcaserve.serve.engine_process import Lost, Progress, main

VOCAB = 1000


class Misbehaving:
    """A ledger that does what its options say when a batch brings their token."""

    def __init__(self, ledger: LedgerExecutor, options: argparse.Namespace) -> None:
        self.ledger = ledger
        self.options = options

    def submit(self, batch: Batch) -> Pending:
        tokens = {token for new in batch.new for token in new.token_ids}
        tokens |= {token for row in batch.rows for token in row.token_ids}
        if self.options.crash_on in tokens:
            os._exit(11)
        if self.options.hang_on in tokens:
            time.sleep(3600)
        if self.options.seize_on in tokens:
            print("seized", flush=True)
            sum(range(10**15))  # one call, in which no other thread of Python's runs
        if self.options.wait_on in tokens:
            subprocess.run([sys.executable, Path(__file__).with_name("hanging_worker.py")], check=True)
        if self.options.raise_on in tokens:
            raise ValueError("an executor's bug\nin two lines")
        stall = self.options.stall_while
        while stall is not None and stall.exists():
            stall.with_suffix(".stalled").touch()
            time.sleep(0.005)
        time.sleep(self.options.step_seconds)
        return self.ledger.submit(batch)


def build(options: EngineOptions, progress: Progress, on_lost: Lost) -> tuple[Executor, EngineInfo]:
    given = parser.parse_args(sys.argv[1:])
    progress("weights", 0, 2)
    if given.fail is not None:
        raise ModelError(given.fail)
    if given.die_loading or (given.die_while is not None and given.die_while.exists()):
        os._exit(12)
    if given.lose_while is not None and given.lose_while.exists():
        given.lose_while.unlink()
        raise WorkerLost("worker 1 is gone (signal 9), while the model was loading")
    while given.load_while is not None and given.load_while.exists():
        time.sleep(0.005)
    progress("weights", 2, 2)
    profile = "ledger"
    if given.profiles is not None:
        profile = next(name for name in map(str, itertools.count()) if claimed(given.profiles / name))
    info = EngineInfo(
        architecture="ledger",
        dtype="int64",
        vocab_size=VOCAB,
        max_model_len=given.max_model_len,
        block_size=options.block_size,
        num_blocks=given.blocks,
        profile=profile,
    )
    return Misbehaving(LedgerExecutor(given.blocks, options.block_size, VOCAB), given), info


def claimed(path: Path) -> bool:
    """Makes a file, unless somebody has made it already."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


parser = argparse.ArgumentParser()
parser.add_argument("--crash-on", type=int)
parser.add_argument("--hang-on", type=int)
parser.add_argument("--seize-on", type=int)
parser.add_argument("--wait-on", type=int)
parser.add_argument("--raise-on", type=int)
parser.add_argument("--stall-while", type=Path)
parser.add_argument("--fail")
parser.add_argument("--die-loading", action="store_true")
parser.add_argument("--die-while", type=Path)
parser.add_argument("--lose-while", type=Path)
parser.add_argument("--load-while", type=Path)
parser.add_argument("--profiles", type=Path)
parser.add_argument("--blocks", type=int, default=1024)
parser.add_argument("--max-model-len", type=int, default=4096)
parser.add_argument("--step-seconds", type=float, default=0.0)
parser.add_argument("fds", type=int, nargs=2)

if __name__ == "__main__":
    os._exit(main(*parser.parse_args().fds, build=build))
