"""Rounds, ratios and reports: who works when, what is compared with what, and that flaws cannot be overlooked."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sse_server import DONE, FakeServer, Script, steady, text, usage

from orcaserve.bench import report, workloads
from orcaserve.bench.client import BenchError, Record, Server
from orcaserve.bench.compare import Plan, compare
from orcaserve.bench.report import Machine, Report, Run, Workload

MACHINE = Machine("a processor", 2, 24 << 30, "Linux", 0.0)


def too_few(body: dict[str, Any]) -> Script:
    count = min(body["max_tokens"], 8)
    return [*[(0.0, text("x"))] * count, (0, usage(body, count)), (0, DONE)]


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orcaserve", "bench", "compare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def made(works: list[str], step: dict[str, float], rounds: int = 2, **changes: Any) -> Report:
    """A report of servers that need `step` seconds a token and twice that to the first; changes: of every record."""
    servers = [Server(name, "http://h") for name in step]
    plan = Plan(tuple(servers), tuple(works), requests=4, vocab=300)
    runs = []
    for round in range(1, rounds + 1):
        for name in works:
            for server in servers:
                records = []
                for item in plan.work(name, round).items:
                    times = tuple(item.at + step[server.name] * (2 + i) for i in range(item.max_tokens))
                    asked = {"max_tokens": item.max_tokens, "prompt_tokens": len(item.prompt_ids)}
                    records.append(Record(due=item.at, sent=item.at, token_times=times, counted="chunks", **asked))
                if server is servers[-1]:
                    records = [msgspec.structs.replace(record, **changes) for record in records]
                runs.append(Run(round, name, server.name, 0.01, records))
    sizes = [Workload.of(plan.work(name, 1)) for name in works]
    return Report("today", MACHINE, 0, 300, servers, sizes, runs)


def test_every_server_does_every_work_in_turn_and_alone() -> None:
    log: list[str] = []

    def answer(body: dict[str, Any]) -> Script:
        log.append("begins")
        yield from steady(step=0.0001)(body)
        log.append("ends")

    with ExitStack() as stack:
        fakes = {name: stack.enter_context(FakeServer(answer)) for name in "abc"}
        plan = Plan(
            tuple(Server(name, fake.url) for name, fake in fakes.items()), ("decode-1", "trace"), rounds=4, requests=1
        )
        found = asyncio.run(compare(plan, None, Console(file=io.StringIO())))
        prompts = {name: [tuple(body["prompt"]) for body in fake.bodies] for name, fake in fakes.items()}
    assert log == ["begins", "ends"] * (len(log) // 2)
    order = ["abc", "bca", "cab", "abc"]
    assert [(run.round, run.work, run.server) for run in found.runs] == [
        (i + 1, work, name) for i in range(4) for work in ("decode-1", "trace") for name in order[i]
    ]
    assert prompts["a"] == prompts["b"] == prompts["c"], "all get the same"
    measured = [prompt for prompt in prompts["a"] if prompts["a"].count(prompt) == 1]
    assert len(measured) == 8, "no prompt comes twice, but that of the warm-up"
    assert found.servers[0].model == "fake" and found.servers[0].version is None


@given(factor=st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_ratios_say_how_many_times_as_good(factor: float) -> None:
    found = made(["decode-4", "trace", "poisson-1000"], {"base": 1.0, "other": factor})
    for line in report.summary(found):
        base, other = line.cells
        assert base.ratio is None and not other.is_flawed
        if line.kind != "poisson" or "TPOT" in line.figure:  # arrivals do not scale with the server
            assert other.ratio == pytest.approx(1 / factor)
    assert not report.problems(found)
    assert "Flawed" not in report.markdown(found)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"error": "it broke"}, "bad, trace: 8 of 8 requests failed: it broke"),
        (
            {"token_times": (1.0, 2.0)},
            "bad, trace: 8 of 8 requests got another number of tokens than asked for: 2 inst",
        ),
        ({"cached_tokens": 16}, "bad, trace: 8 of 8 requests had a known prompt (restart the servers, or give another"),
        ({"seen_prompt_tokens": 7}, "bad, trace: 8 of 8 requests had another number of prompt tokens than was sent: 7"),
    ],
)
def test_a_flawed_work_is_loud_and_has_no_ratio(changes: dict[str, Any], problem: str) -> None:
    found = made(["trace"], {"good": 0.01, "bad": 0.01}, **changes)
    [said] = report.problems(found)
    assert said.startswith(problem)
    page = report.markdown(found)
    assert page.index("Flawed: do not quote") < page.index(said) < page.index("## Figures")
    for line in report.summary(found):
        good, bad = line.cells
        assert (good.is_flawed, bad.is_flawed, bad.ratio) == (False, True, None)
        assert (bad.median is None) == ("error" in changes)


def test_nothing_is_compared_with_a_flawed_baseline() -> None:
    found = made(["trace"], {"base": 0.01, "other": 0.01})
    runs = [
        msgspec.structs.replace(run, records=[msgspec.structs.replace(record, error="no") for record in run.records])
        if run.server == "base"
        else run
        for run in found.runs
    ]
    for line in report.summary(msgspec.structs.replace(found, runs=runs)):
        assert line.cells[1].median is not None and line.cells[1].ratio is None


def test_how_tokens_were_counted_is_noted() -> None:
    said = report.notes(made(["trace"], {"a": 0.01, "b": 0.01}, counted="usage"))
    assert said[0].startswith("b: in 8 of 8 replies the chunks did not show as many tokens as `usage` counts")
    said = report.notes(made(["trace"], {"a": 0.01, "b": 0.01}, counted="guess"))
    assert said[0].startswith("b: 8 of 8 replies came without `usage`")


def test_the_command_writes_a_report(tmp_path: Path) -> None:
    with FakeServer(steady(step=0.001)) as a, FakeServer(steady(step=0.002)) as b:
        servers = ["--server", f"quick={a.url}", "--server", f"slow={b.url}/v1#named", "--concurrency", "slow=2"]
        sizes = ["--works", "decode-4,trace,poisson", "--rate", "100", "--requests", "3", "--rounds", "2"]
        done = cli(*servers, *sizes, "--out", str(tmp_path / "new" / "folder"))
    assert done.returncode == 0, done.stderr
    assert "quick" in done.stdout and "Medians over rounds" in done.stdout
    assert done.stderr.count("round 2") == 6
    folder = tmp_path / "new" / "folder"
    found = json.loads((folder / "report.json").read_bytes())
    assert [server["model"] for server in found["servers"]] == ["fake", "named"]
    assert (found["problems"], len(found["runs"])) == ([], 12)
    for run in found["runs"]:
        work = workloads.load(folder / "works" / f"{run['work']}.round-{run['round']}.jsonl")
        assert [len(record["token_times"]) for record in run["records"]] == [item.max_tokens for item in work.items]
    [decode] = [line for line in found["summary"] if line["figure"] == "decode"]
    assert len(decode["cells"][1]["by_round"]) == 2 and decode["cells"][1]["ratio"] > 0
    assert "| decode-4 | decode, tokens/s |" in (folder / "report.md").read_text()
    assert b.most == 2


OFFLINE = """
import json, sys
print("loading", flush=True)
print("READY", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    head, *items = [json.loads(line) for line in open(job["work"])]
    times = [{"token_times": [item["at"] + 0.01 * (1 + i) for i in range(item["max_tokens"])]} for item in items]
    json.dump(times[:HOW_MANY], open(job["out"], "w"))
    print("DONE", flush=True)
"""


def offline(folder: Path, how_many: str = "len(times)", code: str = OFFLINE) -> str:
    (folder / "engine.py").write_text(code.replace("HOW_MANY", how_many))
    return f"lib={sys.executable} {folder / 'engine.py'}"


def test_an_engine_without_a_server_takes_part(tmp_path: Path) -> None:
    with FakeServer(steady(step=0.001)) as server:
        arguments = ["--server", f"ours={server.url}", "--offline", offline(tmp_path), "--rounds", "2"]
        done = cli(*arguments, "--works", "decode-4,trace", "--requests", "3", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report.json").read_bytes())
    assert [(run["round"], run["work"], run["server"]) for run in found["runs"]] == [
        (1, "decode-4", "ours"), (1, "decode-4", "lib"), (1, "trace", "ours"), (1, "trace", "lib"),
        (2, "decode-4", "lib"), (2, "decode-4", "ours"), (2, "trace", "lib"), (2, "trace", "ours"),
    ]  # fmt: skip
    [decode] = [line for line in found["summary"] if line["figure"] == "decode"]
    assert decode["cells"][1]["by_round"] == pytest.approx([400.0, 400.0])
    assert f"| lib | {sys.executable} {tmp_path / 'engine.py'} |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("lib=/no/such/program", 1, "Error: lib: /no/such/program cannot be started"),
        ("lib='", 1, "Error: lib: ' cannot be started: No closing quotation"),
        ("lib=false", 1, "Error: lib: the command ended (exit code 1) before it said READY"),
        ("ours=false", 2, "Error: two servers are called 'ours'"),
        ("false", 2, "Error: 'false' is not NAME=COMMAND"),
    ],
)
def test_a_command_that_is_no_engine_is_one_line(command: str, code: int, message: str) -> None:
    with FakeServer(steady()) as server:
        done = cli("--server", f"ours={server.url}", "--offline", command, "--works", "decode-1")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1].startswith(message), done.stderr


@pytest.mark.parametrize(
    ("how_many", "message"),
    [
        ("0", "lib: token_times of 0 requests instead of 1"),
        ("'x'", "lib: the command ended (exit code 1) before it said DONE"),
    ],
)
def test_a_command_that_answers_badly_ends_the_comparison(tmp_path: Path, how_many: str, message: str) -> None:
    with FakeServer(steady()) as server:
        done = cli("--server", f"ours={server.url}", "--offline", offline(tmp_path, how_many), "--works", "decode-1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"Error: {message}"


def test_too_few_tokens_end_the_command_with_an_error(tmp_path: Path) -> None:
    with FakeServer(too_few) as server:
        arguments = ["--server", f"short={server.url}", "--works", "decode-4", "--rounds", "1", "--out", str(tmp_path)]
        done = cli(*arguments)
    problem = "short, decode-4: 4 of 4 requests got another number of tokens than asked for: 8 instead of 128"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: the comparison is flawed; the lines above say where"
    assert problem in done.stdout and f"**{problem}**" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_bytes())["problems"] == [problem]


def test_a_server_that_fails_on_the_way_spoils_its_own_figures_only() -> None:
    def breaks(body: dict[str, Any]) -> Any:
        return (500, {"error": {"message": "out of memory"}}) if body["max_tokens"] > 8 else steady()(body)

    with FakeServer(steady()) as good, FakeServer(breaks) as bad:
        plan = Plan((Server("good", good.url), Server("bad", bad.url)), ("decode-4",), rounds=2)
        found = asyncio.run(compare(plan, None, Console(file=io.StringIO())))
    [line] = report.summary(found)
    assert line.cells[0].median is not None and line.cells[1].median is None
    [said] = report.problems(found)
    assert said.startswith("bad, decode-4: 8 of 8 requests failed: HTTP 500: out of memory")


def test_a_server_that_cannot_do_a_small_request_ends_the_comparison() -> None:
    said = pytest.raises(BenchError, match=r"^x: HTTP 503: loading \(wait until the server is ready\)$")
    with FakeServer(lambda body: (503, {"error": {"message": "loading"}})) as server, said:
        asyncio.run(compare(Plan((Server("x", server.url),), ("trace",)), None, Console(file=io.StringIO())))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--server", "a=http://127.0.0.1:9"], 1, "Error: a: nobody answers at http://127.0.0.1:9; is the server"),
        (["--server", "http://127.0.0.1:9"], 2, "Error: 'http://127.0.0.1:9' is not NAME=URL"),
        (["--server", "a=http://127.0.0.1:9", "--works", "dance"], 2, "Error: there is no work 'dance'"),
        (["--server", "a=http://127.0.0.1:9", "--concurrency", "b=1"], 2, "Error: 'b=1' is not NAME=16"),
        (["--server", "a=http://127.0.0.1:9", "--out", "/dev/null/x"], 1, "Error: [Errno"),
        ([], 2, "Error: Missing option '--server'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(arguments: list[str], code: int, message: str) -> None:
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(message), done.stderr


def test_the_client_needs_no_torch() -> None:
    code = "import sys, orcaserve.bench.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("works", [["decode-1", "decode-4", "trace", "poisson-0.63"], ["trace"]])
def test_the_figure_is_a_picture(works: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figure needs the extra `plots`")
    from orcaserve.bench.draw import draw

    for changes in ({}, {"error": "it broke"}):
        draw(made(works, {"a": 0.01, "b": 0.02}, **changes), tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
