"""The order of docs/policies.md, installed as another package would be: the page's own lines, word for word."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from ledger_world import World, random_life

from orcaserve.cli import main
from orcaserve.core.order import Order, OrderError
from orcaserve.core.policy import parse_policy
from orcaserve.core.scheduler import SchedulerConfig

PAGE = Path(__file__).parents[2] / "docs" / "policies.md"


def block(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return found


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path that looks as pip leaves it."""
    (tmp_path / "members_first.py").write_text(block("python"), encoding="utf-8")
    info = tmp_path / "members_first-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: members-first\nVersion: 1.0\n")
    point = re.search(r'(\w+) = "(\w+:\w+)"', block("toml"))
    assert point is not None
    (info / "entry_points.txt").write_text(
        f"[orcaserve.orders]\n{point[1]} = {point[2]}\nnone = members_first:MembersOptions\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return tmp_path


def test_it_is_short() -> None:
    assert len(block("python").splitlines()) < 40


def test_it_decides_who_goes_next(installed: Path) -> None:
    policy = parse_policy("members,names=alice+bob")
    w = World(SchedulerConfig(policy=policy, max_batch_size=1, max_batch_tokens=8, num_blocks=9, block_size=4))
    ended: list[int] = []
    put = w.loop._outbox.put
    w.put = lambda step: (ended.extend(o.id for o in step.outputs if o.finish_reason), put(step))
    ids = [w.submit((1, 2), 2, tenant=tenant) for tenant in ("eve", "bob", "eve", "alice")]
    w.drain()
    assert ended == [ids[1], ids[3], ids[0], ids[2]]
    for seed in range(30):
        random_life(seed, policy="members,names=a")


def test_the_command_line_knows_it(installed: Path) -> None:
    engine = ("--hardware", "A100-40GB", "--model", "13B")
    work = "burst:in=9,out=3,n=4,tenant=alice + burst:in=9,out=3,n=4"
    done = CliRunner().invoke(main, ["simulate", "--workload", work, *engine, "--policy", "members,names=alice"])
    assert done.exit_code == 0, done.output
    assert "8 answered" in done.output and "policy members,names=alice" in done.output
    done = CliRunner().invoke(main, ["simulate", "--workload", work, *engine, "--policy", "members,patience=x"])
    assert done.exit_code == 2 and "its options: names, patience" in done.output


def test_what_is_no_order_is_said(installed: Path) -> None:
    with pytest.raises(OrderError, match="'none' is no subclass"):
        parse_policy("none")
    assert issubclass(type(parse_policy("members").make_order()), Order)
