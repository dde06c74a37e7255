"""`orcaserve bench scheduler`: every case really has the rows and the queue that it says."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from orcaserve.bench import scheduler
from orcaserve.bench.scheduler import Case
from orcaserve.cli import main
from orcaserve.core.batch import Batch
from orcaserve.core.scheduler import Scheduler


def test_all_policies_are_measured() -> None:
    done = CliRunner().invoke(main, ["bench", "scheduler", "--rows", "3", "--waiting", "5", "--iterations", "10"])
    assert done.exit_code == 0, done.output
    for name in (*scheduler.policies(), "default, max-itl", "decode", "mixed"):
        assert name in done.output


@pytest.mark.parametrize("policy", ["default", "orca"])
@pytest.mark.parametrize("waiting", [0, 40])
def test_rows_and_queue_are_as_said(policy: str, waiting: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []
    schedule = Scheduler.schedule

    def spied(self: Scheduler, now: float = 0.0) -> Batch | None:
        batch = schedule(self, now)
        assert batch is not None
        seen.append((len(batch.rows), batch.num_tokens, len(self.waiting)))
        return batch

    monkeypatch.setattr(Scheduler, "schedule", spied)
    scheduler.measure(Case(policy, 8, waiting, "decode"), 20)
    assert seen[-20:] == [(8, 8, waiting)] * 20
    seen.clear()
    found = scheduler.measure(Case(policy, 8, waiting, "mixed"), 100)
    assert len(found.both) == 100 and min(found.both) > 0
    assert any(tokens > 8 for _, tokens, _ in seen[-100:]) and any(tokens == 8 for _, tokens, _ in seen[-100:])
    assert {rows for rows, _, _ in seen[-100:]} == {8}
