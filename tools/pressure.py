"""Runs one workload on a real model with a share of the KV memory that it wants, under several ways to do with less.

    python tools/pressure.py --requests 48 --threads 1

All requests come at once and are greedy. First the workload runs with enough memory; the most KV that it holds is what
it wants. Then every setup gets --share of that. Printed: throughput, preemptions, and how many tokens were computed for
each that had to be. Every answer is compared with the one given with enough memory, token by token.

`reserve-max` and `reserve-exact` are the paper's admission, told --limit or the length that nobody can know; the others
are told --limit. `paged` takes blocks as tokens come and computes again what was preempted; `swap` moves it to memory
and back, or to a file of --swap-dir, where that is cheaper; `risk` admits by the lengths of the answers before.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import msgspec

from orcaserve.bench import measures
from orcaserve.bench.paper.drive import Trial, drive
from orcaserve.bench.paper.ends import ANOTHER, END
from orcaserve.bench.paper.engine import Device, Engine, Setup
from orcaserve.bench.workloads import Work, spec
from orcaserve.core.batch import Batch, StepResult
from orcaserve.core.policy import DEFAULT, ORCA
from orcaserve.engine.executor import Pending
from orcaserve.executors.experiment import RANDOM, ROWS, engine_for, random_model


class Noted:
    """A device that notes what it computes and answers. No request ends by the model's own end token."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.num_tokens = 0
        self.answers: dict[int, list[int]] = defaultdict(list)

    def submit(self, batch: Batch) -> Pending:
        self.num_tokens += batch.num_tokens
        return _Noting(self, self._device.submit(batch))

    def forget_all(self) -> None:
        self._device.forget_all()

    def note(self, result: StepResult) -> StepResult:
        rows = [msgspec.structs.replace(row, token_id=ANOTHER) if row.token_id == END else row for row in result.rows]
        for row in rows:
            if row.token_id is not None:
                self.answers[row.id].append(row.token_id)
        return StepResult(tuple(rows))


class _Noting:
    def __init__(self, noted: Noted, pending: Pending) -> None:
        self._noted, self._pending = noted, pending

    def result(self) -> StepResult:
        return self._noted.note(self._pending.result())


def run(engine: Engine, work: Work, setup: Setup) -> tuple[Trial, Noted]:
    noted = Noted(engine.device)
    return drive(msgspec.structs.replace(engine, device=noted), work, setup), noted


def setups(slots: int, limit: int) -> list[Setup]:
    base = Setup(name="paged", policy=DEFAULT, max_batch_size=ROWS, slots=slots, max_tokens=limit)
    risky = msgspec.structs.replace(DEFAULT, risk=0.5)
    change = msgspec.structs.replace
    return [
        change(base, name="reserve-max", policy=ORCA),
        change(base, name="reserve-exact", policy=ORCA, max_tokens=None),
        base,
        change(base, name="paged, swap", swap=True),
        change(base, name="paged, risk 0.5", policy=risky),
        change(base, name="paged, risk 0.5, swap", policy=risky, swap=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint; else random weights")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompts", default="16-256")
    parser.add_argument("--mean", type=int, default=96, help="tokens of an answer, exponential")
    parser.add_argument("--limit", type=int, default=384, help="the longest answer")
    parser.add_argument("--share", type=float, default=0.25, help="of the KV memory that the workload wants")
    parser.add_argument("--swap-space", type=int, default=256 << 20, help="bytes")
    parser.add_argument("--swap-dir")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=2, help="of which the quicker counts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.model is None:
        with random_model() as folder:
            compare(arguments, RANDOM, folder)
    else:
        compare(arguments, arguments.model.name, arguments.model)


def compare(arguments: argparse.Namespace, name: str, folder: Path) -> None:
    engine = engine_for(name, folder, arguments.threads, arguments.swap_space, arguments.swap_dir)
    text = f"burst:in={arguments.prompts},out=exp{arguments.mean}max{arguments.limit},n={arguments.requests}"
    work = spec.make(text, vocab=engine.vocab_size, seed=arguments.seed)
    roomy = Setup(name="enough memory", policy=DEFAULT, max_batch_size=ROWS, max_tokens=arguments.limit)
    trial, alone = run(engine, work, roomy)
    peak = max(sample.held for sample in trial.samples)
    slots = int(peak * arguments.share)
    swap = engine.swap
    print(f"{engine.model}, {engine.threads} threads, {work.name}, seed {arguments.seed}")
    print(f"KV for {slots} tokens, {arguments.share:.0%} of the {peak} that it holds at most, {ROWS} at a time")
    if swap is not None:
        copied, computed = swap.copy_seconds * 1e6, swap.token_seconds * engine.block_size * 1e6
        print(f"a block of {engine.block_size} tokens is copied in {copied:.0f} µs, computed in {computed:.0f} µs")
    print(f"{'':24} {'tokens/s':>9} {'wall s':>8} {'preempted':>10} {'swapped':>8} {'computed':>9}  answers")
    lines = [run(engine, work, roomy) for _ in range(arguments.rounds - 1)]
    show(roomy.name, min([(trial, alone), *lines], key=_wall), alone)
    for setup in setups(slots, arguments.limit):
        show(setup.name, min((run(engine, work, setup) for _ in range(arguments.rounds)), key=_wall), alone)


def show(name: str, found: tuple[Trial, Noted], alone: Noted) -> None:
    trial, noted = found
    same = sum(noted.answers[id] == answer for id, answer in alone.answers.items())
    print(
        f"{name:24} {measures.total_rate(trial.records) or 0:9.0f} {_wall(found):8.2f} {trial.preemptions:10} "
        f"{trial.swapped:8} {noted.num_tokens / alone.num_tokens:9.3f}  {same} of {len(alone.answers)} the same",
        flush=True,
    )


def _wall(found: tuple[Trial, Noted]) -> float:
    return measures.wall(found[0].records)


if __name__ == "__main__":
    main()
