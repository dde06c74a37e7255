"""`orcaserve explain`: the story of a request in plain words, what most waited for, and a picture of all."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result
from logged_world import Logged

from orcaserve.cli import main
from orcaserve.core.policy import POLICIES
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.step_log import read
from orcaserve.sim.explain import because, reasons, tell
from orcaserve.sim.story import stories

RECORDED = Path(__file__).with_name("recorded.jsonl")
CONFIG = SchedulerConfig(policy=POLICIES["default"], max_batch_size=2, max_batch_tokens=40, num_blocks=5, block_size=4)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def told_world() -> Logged:
    """Every iteration takes a second."""
    return Logged(CONFIG, lambda: 1.0)


def crowd() -> bytes:
    """Three for two rows and too little memory: one waits for a row, one is preempted for another."""
    world = told_world()
    world.submit((1,) * 7, 12, name="cmpl-one")
    world.submit((2,) * 3, 12, name="cmpl-two")
    world.submit((3,) * 2, 2, name="chatcmpl-three")
    world.drain()
    return bytes(world.data)


def test_the_story_of_one_that_waited_and_of_one_that_was_preempted() -> None:
    [log] = read(crowd())
    one, two, three = (list(tell(story, CONFIG)) for story in stories(log))
    assert one[0] == "request 1 (cmpl-one): a prompt of 7 tokens, 12 more at most"
    assert one[1:3] == ["      0.000 s  arrived", "      0.000 s  ran for the first time at once"]
    assert "preempted" not in "".join(one)
    assert any("preempted for request 1: the K and V of" in line for line in two)
    assert any("had computed as much again" in line and line.endswith("lost") for line in two)
    assert any("ran again after" in line for line in two)
    assert any("because all 2 rows were taken" in line for line in three)
    assert any("KV blocks had just been taken away for request 1" in line for line in two + three)
    assert one[-2] == "   together    12.000 s = 0.000 s queue + 1.000 s prefill + 11.000 s decode"
    assert one[-1].strip() == "12 iterations beside 0.5 others on average (1 at most)"


def test_the_command_finds_a_request_by_number_by_response_and_by_request_id(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(crowd())
    told = run(path, "2")
    assert told.exit_code == 0 and told.output.startswith("request 2 (cmpl-two)")
    assert run(path, "cmpl-two").output == run(path, "two").output == told.output
    summary = run(path)
    assert summary.exit_code == 0, summary.output
    assert "3 requests, 3 of them answered" in summary.output
    for word in ("because all 2 rows were taken", "What was waited for", "The longest waits", "chatcmpl-three"):
        assert word in summary.output
    unknown = run(path, "9")
    assert unknown.exit_code == 1
    assert unknown.output == "Error: the step log knows no request '9'; its requests are 1 to 3\n"


def test_the_summary_adds_up() -> None:
    [log] = read(crowd())
    told = stories(log)
    assert sum(line.seconds for line in reasons(told)) == pytest.approx(sum(story.waited for story in told))
    assert all(line.longest <= line.seconds and line.requests >= 1 for line in reasons(told))


def test_several_engines_are_told_one_after_the_other(tmp_path: Path) -> None:
    """After a crash a request has another number and the same name."""
    world = told_world()
    world.submit((1,) * 7, 12, name="cmpl-one")
    world.step(4)
    after = told_world()
    after._ids = 6
    after.submit((1, 1, 1, 1, 1, 1, 1, 5, 5, 5, 5), 12, num_prompt=7, name="cmpl-one")
    after.drain()
    path = tmp_path / "steps.jsonl"
    path.write_bytes(bytes(world.data) + bytes(after.data))
    told = run(path, "cmpl-one").output
    assert "engine 1\nrequest 1 (cmpl-one)" in told and "engine 2\nrequest 7 (cmpl-one)" in told
    assert "the log ends here" in told and "of which 4 were generated before a crash" in told
    assert run(path).output.count("The longest waits") == 2


def test_a_recorded_life_is_told_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "all.png"
    done = run(RECORDED, "--figure", picture)
    assert done.exit_code == 0, done.output
    assert "for reasons that this log does not hold" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    one = tmp_path / "one.png"
    assert run(RECORDED, "5", "--figure", one).exit_code == 0
    assert one.read_bytes().startswith(b"\x89PNG")
    nowhere = run(RECORDED, "--figure", tmp_path / "no" / "all.png")
    assert nowhere.exit_code == 1 and "cannot be written: No such file or directory" in nowhere.output


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "without a line"),
        (b'{"type":"abort","at":1,"id":2}\n', "names the engine"),
        (b'{"type":"engine","version":99,"config":{}}\n\n', "none of a step log"),
        (b"\x00\xff\n{}\n", "line 1 is none of a step log"),
    ],
)
def test_what_is_no_log_is_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_bytes(data)
    done = run(path)
    assert done.exit_code == 1
    assert says in done.output and done.output.count("\n") == 1
    assert run(tmp_path / "none").output.endswith("cannot be read: No such file or directory\n")


def test_a_log_damaged_anywhere_is_one_line_or_a_story(tmp_path: Path) -> None:
    """Lines lost, doubled, exchanged: whatever is told, it is no traceback."""
    seed = random.SystemRandom().randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    lines = crowd().splitlines(keepends=True)
    path = tmp_path / "steps.jsonl"
    for _ in range(40):
        damaged = list(lines)
        for _ in range(rng.randint(1, 4)):
            at, other = rng.randrange(len(damaged)), rng.randrange(len(damaged))
            damage = rng.choice(["lose", "double", "swap"])
            if damage == "lose" and len(damaged) > 2:
                del damaged[at]
            elif damage == "double":
                damaged.insert(at, damaged[at])
            else:
                damaged[at], damaged[other] = damaged[other], damaged[at]
        path.write_bytes(b"".join(damaged))
        done = run(path)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == 0 or done.output.count("\n") == 1, done.output


def test_a_simulation_can_be_explained(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    work = ("--workload", "burst:in=64-256,out=16-64,n=40", "--hardware", "A100-40GB", "--model", "13B")
    short = ("--max-batch-size", "8", "--blocks", "90")
    done = CliRunner().invoke(main, ["simulate", *work, *short, "--step-log", str(path)])
    assert done.exit_code == 0, done.output
    summary = run(path).output
    assert "40 requests, 40 of them answered" in summary
    assert "because all 8 rows were taken" in summary or "because KV blocks were lacking" in summary
    assert CliRunner().invoke(main, ["simulate", "replay", str(path)]).output.endswith("every one as recorded\n")
    two = CliRunner().invoke(main, ["simulate", *work, *short, "--replicas", "2", "--step-log", str(path)])
    assert two.exit_code == 0
    assert sum(len(stories(read(Path(f"{path}.{i}").read_bytes())[0])) for i in (0, 1)) == 40
    first = path.read_bytes()
    CliRunner().invoke(main, ["simulate", *work, *short, "--step-log", str(path)])
    assert path.read_bytes() == first, "a simulation follows from its arguments"


def test_every_reason_has_words() -> None:
    known = {"rows", "tokens", "blocks", "memory", "preemption", "closed", "shape", "iteration", "unknown"}
    texts = {because(why, CONFIG) for why in known}  # type: ignore[arg-type]
    assert len(texts) == len(known) and all(texts)
    [log] = read(RECORDED.read_bytes())
    orca = msgspec.structs.replace(log.header.config, policy=POLICIES["orca"])
    assert all("\n" not in line for story in stories(log) for line in tell(story, orca))


def test_one_that_waits_for_anothers_beginning_is_drawn_too(tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, max_batch_size=4, max_batch_tokens=8, num_blocks=40)
    world = Logged(config, lambda: 1.0)
    for last in (1, 2):
        world.submit((7,) * 24 + (last,), 2)
    world.drain()
    path, picture = tmp_path / "steps.jsonl", tmp_path / "all.png"
    path.write_bytes(world.data)
    assert b'"prefix"' in path.read_bytes()
    done = run(path, "--figure", picture)
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
