"""`orcaserve bench paper`: every part on a tiny checkpoint through the command line, and what its sentences rest on."""

from __future__ import annotations

import itertools
import json
import struct
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from orcaserve.bench.client import BenchError, Record
from orcaserve.bench.paper import PARTS, alone, curves, ladder, memory, variance
from orcaserve.bench.paper.curves import Curves, capacity
from orcaserve.bench.paper.drive import Sample, Trial, drive
from orcaserve.bench.paper.ends import ANOTHER, END
from orcaserve.bench.paper.engine import Engine, Setup, default, orca, static
from orcaserve.bench.paper.in_turn import drive_in_turn
from orcaserve.bench.workloads.spec import make
from orcaserve.cli import main
from orcaserve.core.batch import Batch
from orcaserve.core.policy import POLICIES
from orcaserve.engine.executor import Pending
from orcaserve.engine.ledger import LedgerExecutor
from orcaserve.model.random_checkpoint import Shape, write_random

SHAPE = Shape(layers=1, hidden=32, mlp=32, heads=2, kv_heads=1, vocab=300, max_positions=160)


def bench_paper(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", "paper", "--threads", "1", *map(str, arguments)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    write_random(folder, SHAPE)
    return folder


@pytest.fixture(scope="module")
def written(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("report")
    done = bench_paper(tiny, "--quick", "--requests", "2", "--out", out)
    assert done.exit_code == 0, done.output
    assert "The report is" in done.output
    return out


@pytest.fixture(scope="module")
def report(written: Path) -> dict[str, Any]:
    return json.loads((written / "report.json").read_bytes())


def test_every_part_has_a_section_a_figure_and_a_time(written: Path, report: dict[str, Any]) -> None:
    page = (written / "report.md").read_text()
    assert tuple(report["sections"]) == tuple(report["figures"]) == tuple(report["seconds"]) == PARTS
    for part in PARTS:
        section = report["sections"][part]
        assert section["found"] and section["rows"]
        assert all(len(row) == len(section["head"]) for row in section["rows"])
        assert f"## {section['title']}" in page and f"({report['figures'][part]})" in page
        assert all(line in page for line in section["surprises"]), "what came out otherwise is said"
        png = (written / report["figures"][part]).read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", png[16:24])
        assert min(width, height) > 300
    assert "What to see" in page and "What was found" in page


def test_the_report_says_what_ran(report: dict[str, Any], tiny: Path) -> None:
    assert report["model"]["name"] == tiny.name
    assert (report["model"]["vocab_size"], report["model"]["max_model_len"]) == (300, 160)
    # a head of 16 for keys and one for values, two bytes each
    assert report["model"]["kv_bytes_per_token"] == 2 * 16 * 2
    assert (report["effort"], report["requests"], report["seed"], report["threads"]) == ("quick", 2, 0, 1)
    assert {"Python", "torch"} <= set(report["versions"]) and report["machine"]["cpu"]


def test_json_has_the_numbers_behind_the_tables(report: dict[str, Any]) -> None:
    found = report["found"]
    assert {point["batch"] for point in found["alone"]["points"]} == set(alone.BATCHES)
    names = {point["setup"] for point in found["mixed"][0]["points"]}
    assert {"static(1)", "static(8)", "orca(1)", "orca(8)", "orca(32)", "default(32)"} <= names
    assert [curves["lengths"] for curves in found["equal"]] == ["in=10,out=10", "in=80,out=80"], "160 tokens for 512"
    assert [row["note_limit"] for row in found["variance"]["rows"]] == list(variance.LIMITS)
    assert all(len(row["rates"]) == 3 and min(row["rates"]) > 0 for row in found["variance"]["rows"])
    assert [rung["name"] for rung in found["ladder"]["rungs"]] == list(ladder.RUNGS)
    assert found["ladder"]["rungs"][-1]["cached"] > 0 == found["ladder"]["rungs"][-2]["cached"]
    assert [line["name"] for line in found["memory"]["lines"]] == list(memory.KINDS)
    for line in found["memory"]["lines"]:
        assert 0 < line["stored"] <= line["held"] <= 1


def test_one_part_alone(tiny: Path, tmp_path: Path) -> None:
    done = bench_paper(tiny, "--quick", "--requests", "2", "--part", "memory", "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.png", "report.json", "report.md"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no/such/folder", "--out", "{out}"], "no/such/folder"),
        (["{tiny}", "--out", "{file}/below"], "file"),
        (["{tiny}", "--out", "{out}", "--requests", "0"], "0 is not in the range x>=1"),
        (["{tiny}", "--out", "{out}", "--part", "fig12"], "fig12"),
        (["{wordless}", "--out", "{out}", "--quick"], "the model knows 90 tokens; prompts are of ids from 100 on"),
        (["{empty}", "--out", "{out}"], "empty"),
        (["{garbled}", "--out", "{out}"], "garbled"),
        (["{short}", "--out", "{out}", "--quick"], "too short for the paper's requests: take one of at least 64"),
        (["{tiny}"], "--out"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: list[str], said: str, tiny: Path, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("short", "wordless", "empty", "garbled", "out", "file")} | {
        "tiny": tiny
    }
    for name in ("short", "wordless", "empty", "garbled"):
        places[name].mkdir()
    write_random(places["short"], msgspec.structs.replace(SHAPE, max_positions=40))
    write_random(places["wordless"], msgspec.structs.replace(SHAPE, vocab=90))
    (places["garbled"] / "config.json").write_text("{")
    places["file"].touch()
    done = bench_paper(*(argument.format(**places) for argument in arguments))
    assert done.exit_code in (1, 2)
    *_, last = done.output.strip().splitlines()
    assert last.startswith("Error: ") and said in last


class Device(LedgerExecutor):
    """A ledger that can begin anew."""

    def forget_all(self) -> None:
        self.known.clear()


def ledger(num_blocks: int = 40) -> Engine:
    return Engine(
        device=Device(num_blocks, 4, 300),
        model="ledger",
        architecture="ledger",
        dtype="int64",
        profile="",
        weight_bytes=0,
        bytes_per_token=8,
        vocab_size=300,
        max_model_len=100,
        num_blocks=num_blocks,
        block_size=4,
        threads=1,
    )


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("max_tokens", [None, 30])
def test_everybody_gets_the_tokens_that_are_due_whatever_is_declared(policy: str, max_tokens: int | None) -> None:
    work = make("burst:in=5-20,out=exp6max30,n=12", vocab=300, seed=1)
    setup = Setup(name=policy, policy=POLICIES[policy], max_batch_size=4, max_tokens=max_tokens)
    engine, ended = ledger(), []
    for _ in range(2):  # the second run finds an engine that knows nothing of the first
        trial = drive(engine, work, setup, lambda: ended.append(1))
        assert [record.output_tokens for record in trial.records] == [item.max_tokens for item in work.items]
    assert len(ended) == 24
    assert all(sample.stored <= sample.held <= trial.slots for sample in trial.samples if policy != "default")


def test_setups_in_turn_schedule_as_they_do_alone() -> None:
    """Each has KV blocks and ids of its own on the one device, whose ledger tells if they meet."""
    work = make("burst:in=5-20,out=exp6max30,n=12", vocab=300, seed=1)
    setups = [
        Setup(name=name, policy=POLICIES[name], max_batch_size=size, slots=slots, max_tokens=30)
        for name, size, slots in (("static", 2, 100), ("orca", 4, 112), ("default", 4, 80))
    ]
    ended: list[int] = []
    found = drive_in_turn(ledger(80), work, setups, lambda: ended.append(1))
    assert len(ended) == 36 and [trial.setup for trial in found] == ["static", "orca", "default"]
    for trial, setup in zip(found, setups, strict=True):
        alone = drive(ledger(80), work, setup)
        assert [(one.rows, one.stored, one.held) for one in trial.samples] == [
            (one.rows, one.stored, one.held) for one in alone.samples
        ]
        assert [len(record.token_times) for record in trial.records] == [item.max_tokens for item in work.items]
        assert trial.preemptions == alone.preemptions and trial.slots == alone.slots


def test_a_clock_stands_still_while_it_is_anothers_turn() -> None:
    work = make("burst:in=5,out=4,n=6", vocab=300, seed=1)

    class Slow(Device):
        def submit(self, batch: Batch) -> Pending:
            time.sleep(0.02)
            return super().submit(batch)

    engine = msgspec.structs.replace(ledger(), device=Slow(40, 4, 300))
    began = time.perf_counter()
    trials = drive_in_turn(engine, work, [msgspec.structs.replace(orca(size), slots=80) for size in (2, 6)])
    wall = time.perf_counter() - began
    own = [max(record.token_times[-1] for record in trial.records) for trial in trials]
    for seconds, trial in zip(own, trials, strict=True):
        assert 0.02 * len(trial.samples) <= seconds
    assert sum(own) <= wall


def test_setups_that_overlap_go_one_after_the_other() -> None:
    work = make("burst:in=5,out=4,n=6", vocab=300, seed=1)
    engine = msgspec.structs.replace(ledger(), overlap=True)
    trials = drive_in_turn(engine, work, [orca(2), orca(6)])  # each with all of the memory
    assert [trial.slots for trial in trials] == [160, 160]


def test_memory_that_is_too_small_for_all_is_told() -> None:
    work = make("burst:in=5,out=4,n=6", vocab=300, seed=1)
    with pytest.raises(BenchError, match=r"orca\(2\), orca\(6\) are to use KV memory for 320 tokens together, but"):
        drive_in_turn(ledger(), work, [orca(2), orca(6)])


def test_arrivals_are_waited_for() -> None:
    work = make("poisson:rate=100,in=5,out=2,n=5", vocab=300, seed=3)
    for record, item in zip(drive(ledger(), work, orca(4)).records, work.items, strict=True):
        assert record.due == item.at <= record.first


def test_end_tokens_come_at_the_end_and_nowhere_else() -> None:
    from orcaserve.bench.paper.ends import EndsAt
    from orcaserve.core.batch import RowResult

    ends = EndsAt(Device(1, 1, 2), {7: 3})
    tokens = [ends.end(RowResult(id=7, token_id=token)).token_id for token in (END, 5, 5)]
    assert tokens == [ANOTHER, 5, END]
    assert ends.end(RowResult(id=7)).token_id is None


def test_who_cannot_fit_is_named() -> None:
    with pytest.raises(BenchError, match="requests of 120 tokens, but the model takes 100"):
        drive(ledger(), make("burst:in=100,out=20,n=1", vocab=300, seed=0), orca(1))
    setup = msgspec.structs.replace(orca(1), slots=200)
    with pytest.raises(BenchError, match="for 200 tokens, but the machine has room for 160"):
        drive(ledger(), make("burst:in=50,out=20,n=1", vocab=300, seed=0), setup)
    with pytest.raises(BenchError, match="the KV cache holds 40"):
        drive(ledger(10), make("burst:in=50,out=20,n=1", vocab=300, seed=0), orca(1))


def point(throughput: float, latency: float, setup: str = "orca(8)") -> curves.Point:
    return curves.Point(setup, rate=throughput, throughput=throughput, latency=latency, ttft=None)


def test_capacity_is_read_off_straight_lines() -> None:
    crossing = capacity([point(1, 0.1), point(2, 0.2), point(4, 0.6)], 0.3)
    assert (crossing.rate, crossing.is_least) == (pytest.approx(2.5), False)
    assert capacity([point(1, 0.1), point(2, 0.2)], 0.3) == curves.Capacity(2, is_least=True)
    assert capacity([point(1, 0.4)], 0.3) == curves.Capacity(None, is_least=False)


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.001, 10)), min_size=1, max_size=8),
    st.floats(0.001, 10),
    st.floats(0.001, 10),
)
def test_a_looser_bound_never_lowers_capacity(pairs: list[tuple[float, float]], a: float, b: float) -> None:
    points = [point(*pair) for pair in pairs]
    tight, loose = (capacity(points, bound).rate or 0.0 for bound in sorted((a, b)))
    assert tight <= loose * (1 + 1e-9)
    assert loose <= max(pair[0] for pair in pairs) * (1 + 1e-9)


def curve(setup: str, *pairs: tuple[float, float]) -> list[curves.Point]:
    return [point(*pair, setup) for pair in pairs]


def mixed(*of: list[curves.Point]) -> Curves:
    """Bounds are 2, 3, 4, 6 and 8 times 0.1."""
    return Curves("in=1-2,out=1-2", 3, 9.0, 0.2, list(itertools.chain(*of)))


def test_a_static_curve_that_wins_is_said_plainly() -> None:
    end = (9, 9.0)
    found = mixed(
        curve("static(8)", (4, 0.2), (4, 1.0)), curve("orca(8)", (1, 0.2), (1, 1.0)), curve("default(8)", (5, 0.1), end)
    )
    section = curves.section("mixed", [found])
    assert section.surprises == ["Over all bounds the best static setup answers more requests than orca(8)."]
    assert section.found[1] == "At 200 ms per token, orca(8) answers 1 requests/s, 0.25× what static(8) does."


def test_a_curve_that_is_behind_at_one_bound_alone_is_no_surprise() -> None:
    found = mixed(
        curve("static(8)", (3, 0.2), (4, 1.0)), curve("orca(8)", (2, 0.2), (8, 0.3), (9, 1.0))
    )  # fmt: skip
    assert curves.ratios(found, "orca(8)")[2.0].factor == pytest.approx(2 / 3)
    assert min(of.factor or 0.0 for bound, of in curves.ratios(found, "orca(8)").items() if bound > 2) > 2
    section = curves.section("mixed", [found])
    assert not section.surprises
    assert "0.67× to 2.56×" in section.found[0]


def test_an_average_is_of_the_bounds_that_static_curves_came_to() -> None:
    """At 0.6 and 0.8 the static curve could do more than was offered, and the ratio would be the one of its end."""
    found = mixed(curve("static(8)", (2, 0.1), (4, 0.5)), curve("orca(8)", (2, 0.1), (8, 1.0)))
    assert list(curves.ratios(found, "orca(8)")) == [2.0, 3.0, 4.0]
    assert "on average over bounds of 2, 3 and 4 times the least latency" in curves.section("mixed", [found]).found[0]
    assert curves.ratio(found, "orca(8)", 0.6).says == "at most "


def test_a_curve_that_never_came_to_the_bound_can_do_more() -> None:
    found = mixed(curve("static(8)", (1, 0.1), (1, 1.0)), curve("orca(8)", (4, 0.1)))
    said = curves.section("mixed", [found]).found
    assert said[0].startswith("Under the same bound of latency, orca(8) answers at least 4.00× what")
    assert said[1] == "At 200 ms per token, orca(8) answers at least 4 requests/s, at least 4.00× what static(8) does."


def test_a_rival_that_never_came_to_the_bound_makes_a_ratio_the_most() -> None:
    found = mixed(
        curve("static(1)", (1, 0.1)), curve("static(8)", (2, 0.2), (3, 1.0)), curve("orca(8)", (4, 0.2), (5, 9))
    )
    assert curves.section("mixed", [found]).found[0] == (
        "At 200 ms per token, orca(8) answers 4 requests/s, at most 2.00× what static(8) does."
    ), "of static(1) it is not known what it can do"


def test_two_curves_that_never_came_to_the_bound_have_no_ratio() -> None:
    found = mixed(curve("static(8)", (4, 0.1)), curve("orca(8)", (5, 0.1)))
    section = curves.section("mixed", [found])
    assert section.found[0] == (
        "At 200 ms per token, orca(8) answers at least 5 requests/s, and static(8) at least 4: as orca(8) and a static "
        "setup never came to the bound, no ratio can be told."
    )
    assert not section.surprises


def test_shares_of_memory_are_weighted_by_time() -> None:
    record = Record(due=0, sent=0, token_times=(1.0,), max_tokens=1, prompt_tokens=1)
    samples = [Sample(0.0, 9.0, 0, 0, 1, 1), *(Sample(1.0, seconds, stored, 80, 1, 1) for seconds, stored in
               ((1.0, 20), (3.0, 60), (1.0, 20))), Sample(2.0, 9.0, 0, 0, 0, 1)]  # fmt: skip
    trial = Trial("any", 100, [record], samples, 0, 0)
    # the first of four fills the memory; in the last nobody waits
    assert memory.means(trial) == (pytest.approx(0.44), pytest.approx(0.8))


def test_setups_are_called_as_in_the_paper() -> None:
    assert [setup(8).name for setup in (static, orca, default)] == ["static(8)", "orca(8)", "default(8)"]
