"""Hidden values between real stages: they travel before the next one asks, and whatever rows make no sense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kernel_sets
import pytest

from orcaserve.core.batch import Batch, ScheduledRequest
from orcaserve.core.config import EngineOptions
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.executors.build import build
from orcaserve.executors.distributed import DistributedExecutor
from orcaserve.model.random_checkpoint import Shape, write_random

SHAPE = Shape(layers=4, hidden=64, mlp=96, heads=8, kv_heads=4, vocab=97, max_positions=256)

# More values than a socket holds: without a peer that has made room, they do not leave.
EXPECTED = """
import sys, torch, torch.distributed as dist
from orcaserve.parallel.world import Hidden, World
store = dist.FileStore(sys.argv[1], 2)
rank, counts = int(sys.argv[2]), (40_000, 3, 20_000)
hidden = Hidden(World(store, rank, 1, 2), 64, torch.float32)
values = [torch.arange(64.0 * count).view(count, 64) + 7 * count for count in counts]
if rank:
    for count in counts:
        hidden.expect(count)
    store.set("expected", b"")
    store.wait(["sent"])
    assert all(torch.equal(hidden.receive(count), value) for count, value in zip(counts, values))
    store.set("received", b"")
else:
    store.wait(["expected"])
    for work in [dist.isend(value.view(-1).view(torch.uint8), 1) for value in values]:
        work.wait()
    store.set("sent", b"")
    store.wait(["received"])
"""


def test_what_is_expected_comes_before_it_is_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EXPECTED, str(tmp_path / "store")]
    with subprocess.Popen([*command, "1"]) as other:
        try:
            assert subprocess.run([*command, "0"], timeout=120, check=False).returncode == 0
            assert other.wait(60) == 0
        finally:
            other.kill()


@kernel_sets.NEEDS_NATIVE
@pytest.mark.parametrize("control_plane", ["separate", "mixed"])
def test_rows_that_make_no_sense_fail_alone_in_every_stage(tmp_path: Path, control_plane: str) -> None:
    write_random(tmp_path, SHAPE)

    def sound(id: int) -> tuple[ScheduledRequest, NewRequest]:
        ids = tuple(range(3, 11))
        params = SamplingParams(temperature=0.0, logprobs=1)
        return (
            ScheduledRequest(id, 0, len(ids), (id,), (), True),
            NewRequest(id=id, token_ids=ids, num_prompt=len(ids), max_tokens=3, params=params),
        )

    def senseless(id: int) -> ScheduledRequest:
        return ScheduledRequest(id, 0, 5, (0,), (), True)  # never described

    batches = []
    for step, ids in enumerate(((1,), (90, 2, 91), (92,), (3, 93))):
        told = [sound(id) for id in ids if id < 90]
        rows = [senseless(id) if id >= 90 else sound(id)[0] for id in ids]
        batches.append(Batch(step, tuple(rows), tuple(new for _, new in told)))
    options = EngineOptions(
        model=str(tmp_path), kv_memory=1 << 21, max_model_len=200, pipeline_parallel=2, control_plane=control_plane
    )
    executor, _ = build(options, None, None)
    assert isinstance(executor, DistributedExecutor)
    try:
        pending = [executor.submit(batch) for batch in batches]  # all in flight at once
        results = [one.result().rows for one in pending]
    finally:
        executor.close()
    assert [[row.id for row in rows] for rows in results] == [[1], [90, 2, 91], [92], [3, 93]]
    [[alone], (first, second, third), [fourth], (fifth, sixth)] = results
    assert alone.token_id is not None and alone.logprobs is not None
    for row in (second, fifth):
        assert (row.token_id, row.logprobs) == (alone.token_id, alone.logprobs)
    for row in (first, third, fourth, sixth):
        assert row.token_id is None and row.error
