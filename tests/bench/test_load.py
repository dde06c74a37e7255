"""The load generator against a real socket, and what it reports: counts, times, errors, and its own lateness."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sse_server import DONE, FakeServer, Script, steady, text, usage

from orcaserve.bench import load_report, measures
from orcaserve.bench.client import BenchError, Record, Server
from orcaserve.bench.load import Plan, put
from orcaserve.bench.load_report import Errors, Report
from orcaserve.bench.report import Machine, Workload
from orcaserve.bench.workloads import load, spec
from orcaserve.cli import main

FIRST, STEP = 0.1, 0.02
VOCAB = 5000


def plan(server: FakeServer, workload: str, **changes: Any) -> Plan:
    work = spec.make(workload, vocab=VOCAB, seed=0)
    return Plan(Server("server", server.url), work, **{"vocab": VOCAB} | changes)


def run(server: FakeServer, workload: str, out: Path | None = None, **changes: Any) -> Report:
    return asyncio.run(put(plan(server, workload, **changes), out, Console(file=io.StringIO())))


def never(body: dict[str, Any]) -> Script:
    """Answers the warm-up, and then nobody."""
    return steady()(body) if body["max_tokens"] == 1 else [(3600.0, DONE)]


def record(due: float, *token_times: float, **changes: Any) -> Record:
    given = {"due": due, "sent": due, "max_tokens": len(token_times), "prompt_tokens": 10, "token_times": token_times}
    return Record(**given | changes)


def report(*records: Record, **changes: Any) -> Report:
    given = {
        "date": "today",
        "machine": Machine("a processor", 2, 24 << 30, "Linux", 0.0),
        "server": Server("server", "http://h", "m"),
        "workload": Workload("burst:…", "load", len(records), 10 * len(records), 7),
        "shares_prompts": False,
        "seed": 0,
        "vocab": VOCAB,
        "warm_up": 1,
        "limits": {"ttft": 1.0, "tpot": 1.0},
        "records": list(records),
        "is_interrupted": False,
        "client_cpu": 0.1,
    }
    return Report(**given | changes)


def shown(of: Report) -> str:
    terminal = Console(record=True, width=160, file=io.StringIO())
    load_report.show(of, terminal)
    return terminal.export_text()


def num_lines(out: Path) -> int:
    """How many requests have ended."""
    path = out / "requests.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_what_the_server_takes_is_measured(tmp_path: Path) -> None:
    workload = "poisson:rate=40,in=5-30,out=2-6,n=20,tenant=a + burst:in=9,out=3,n=4,tenant=b + burst:in=4,out=1,n=1"
    limits = {"ttft": 60.0, "itl": 60.0}
    with FakeServer(steady(first=FIRST, step=STEP)) as server:
        found = run(server, workload, tmp_path, limits=limits, warm_up=3)
    work = spec.make(workload, vocab=VOCAB, seed=0)
    assert len(server.bodies) == 3 + 25
    sent = [(body["prompt"], body["max_tokens"], body.get("user")) for body in server.bodies]
    for item in work.items:
        assert sent.count((list(item.prompt_ids), item.max_tokens, item.tenant)) == 1, "the warm-up has other prompts"
    assert sorted(len(body["prompt"]) for body in server.bodies[:3]) == sorted(
        len(item.prompt_ids) for item in work.items[:3]
    )
    for one, item in zip(found.records, work.items, strict=True):
        assert (one.due, one.tenant, one.error) == (item.at, item.tenant, None)
        assert one.due <= one.sent <= one.first - FIRST
        # from when it was sent: a client that is held up sees the first token late, and the others close behind it
        assert one.last - one.sent >= FIRST + STEP * (item.max_tokens - 1) * 0.9

    summary = load_report.summary(found.records, limits)
    assert (summary.requests, summary.answered, summary.failed) == (25, 25, 0)
    assert summary.prompt_tokens == sum(len(item.prompt_ids) for item in work.items)
    assert summary.output_tokens == sum(item.max_tokens for item in work.items)
    assert summary.wall and summary.wall >= FIRST
    assert summary.request_rate == pytest.approx(25 / summary.wall)
    assert summary.output_rate == pytest.approx(summary.output_tokens / summary.wall)
    assert summary.total_rate == pytest.approx((summary.output_tokens + summary.prompt_tokens) / summary.wall)
    assert summary.goodput is not None and (summary.goodput.met, summary.goodput.share) == (25, 1.0)
    for name, least in (("ttft", FIRST), ("tpot", STEP * 0.9), ("latency", FIRST), ("normalised", STEP)):
        quantiles = summary.times[name]
        assert quantiles.p50 and quantiles.p90 and quantiles.p99
        assert least <= quantiles.p50 <= quantiles.p90 <= quantiles.p99
    assert summary.normalised_latency == summary.times["normalised"].p50

    by_tenant = load_report.tenants(found)
    assert {name: of.requests for name, of in by_tenant.items()} == {"": 1, "a": 20, "b": 4}
    written = json.loads((tmp_path / "report.json").read_bytes())
    assert written["summary"] == json.loads(msgspec.json.encode(summary))
    assert written["tenants"]["b"]["output_tokens"] == 12
    assert (written["errors"], written["limits"], written["seed"], "records" in written) == ([], limits, 0, False)
    assert written["server"]["model"] == "fake" and written["workload"]["name"] == workload
    lines = (tmp_path / "requests.jsonl").read_bytes().splitlines()
    assert (
        sorted((msgspec.json.decode(line, type=Record) for line in lines), key=lambda one: (one.due, one.sent))
        == found.records
    )
    assert load(tmp_path / "workload.jsonl") == work
    page, terminal = (tmp_path / "report.md").read_text(), shown(found)
    for text_of in (page, terminal):
        assert "25 answered, 0 failed" in text_of and "goodput (ttft ≤ 60 s, itl ≤ 60 s)" in text_of
        assert "inter-token latency" in text_of and "The client sent requests" in text_of
    assert "| b | 4 | 0 |" in page


def test_a_server_that_never_answers_delays_nobody() -> None:
    with FakeServer(never) as server:
        found = run(server, "burst:in=3,out=1,n=1 + gamma:rate=100,cv=2,in=3,out=2,n=40,start=0.1", silence=1.5)
    assert server.most >= 40, "all are under way together"
    assert [one.error_kind for one in found.records] == [None] + ["silence"] * 40
    assert all(one.sent >= one.due for one in found.records)
    late = load_report.lag(found.records)
    assert late is not None and late.p50 < 1.0, "a client that waits for replies is 1.5 s late after the first"
    [errors] = load_report.errors(found.records)
    assert errors == Errors("silence", 40, "it has stopped answering; is the server stuck?")


def test_an_interruption_reports_what_there_is(tmp_path: Path) -> None:
    async def interrupted(server: FakeServer) -> Report:
        workload = "burst:in=3,out=1,n=2 + burst:in=3,out=2,n=3,start=0.2 + burst:in=3,out=1,n=5,start=3600"
        task = asyncio.create_task(put(plan(server, workload), tmp_path, Console(file=io.StringIO())))
        while len(server.bodies) < 1 + 2 + 3 or num_lines(tmp_path) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        return await task

    with FakeServer(never) as server:
        found = asyncio.run(interrupted(server))
    assert [one.error_kind for one in found.records] == [None] * 2 + ["interrupted"] * 3
    said = "Interrupted: 3 requests were under way and 5 had not been sent; none of them counts anywhere."
    assert load_report.problems(found)[0] == said and said in (tmp_path / "report.md").read_text()
    written = json.loads((tmp_path / "report.json").read_bytes())
    assert (written["summary"]["requests"], written["summary"]["answered"], written["errors"]) == (2, 2, [])
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 5


def test_errors_are_counted_by_kind_and_the_others_go_on() -> None:
    def answer(body: dict[str, Any]) -> Any:
        match body["max_tokens"]:
            case 2:
                return 429, {"error": {"message": "the queue is full"}}
            case 3:
                return [(0, text("x")), (0, {"error": {"message": "out of memory"}})]
            case 4:
                return [(0, text("x")), (0, None)]
            case 5:
                return [(0, text("x")), (0, usage(body, 1)), (0, DONE)]
        return steady()(body)

    with FakeServer(answer) as server:
        found = run(server, " + ".join(f"burst:in=3,out={out},n={out}" for out in (1, 2, 3, 4, 5)), warm_up=1)
    first, *others = load_report.errors(found.records)
    assert (first.kind, first.count) == ("connection cut", 4)
    assert [(one.kind, one.count) for one in others] == [("server gave up", 3), ("HTTP 429", 2)]
    assert (
        others[1].first == "HTTP 429: the queue is full (its queue is full; bench compare takes --concurrency NAME=16)"
    )
    summary = load_report.summary(found.records, {"latency": 100.0})
    assert (summary.requests, summary.answered, summary.failed) == (15, 6, 9)
    assert summary.goodput is not None and summary.goodput.share == 6 / 15, "who got no answer met no limit"
    assert "5 requests got another number of tokens than asked for: 1 instead of 5." in load_report.problems(found)
    assert "3 failed by 'server gave up'; the first one: the server gave up after 1 tokens: out of memory" in shown(
        found
    )


def test_a_figure_for_every_hand_and_pencil() -> None:
    records = [
        record(0, 1, 2, 3, 4),  # TTFT 1, TPOT 1, 1 a token
        record(1, 3, seen_prompt_tokens=12, cached_tokens=3),  # TTFT 2, no TPOT, 2 a token
        record(2, 3, 4, 9),  # TTFT 1, TPOT 3, 7/3 a token
        record(0, error="it broke", error_kind="HTTP 500", max_tokens=5),
    ]
    summary = load_report.summary(records, {"ttft": 1.0, "tpot": 1.0})
    assert (summary.wall, summary.prompt_tokens, summary.output_tokens, summary.cached_tokens) == (9, 32, 8, 3)
    assert (summary.request_rate, summary.output_rate, summary.total_rate) == (3 / 9, 8 / 9, 40 / 9)
    assert summary.normalised_latency == 2
    assert (summary.times["ttft"].p50, summary.times["tpot"].p50, summary.times["itl"].p50) == (1, 2, 1)
    assert summary.times["itl"].p99 == pytest.approx(4.84), "gaps 1, 1, 1, 1, 5"
    assert summary.goodput == load_report.Goodput(1, 1 / 4, 1 / 9)
    assert load_report.summary(records, {}).goodput is None
    nothing = load_report.summary(records[3:], {"ttft": 1.0})
    assert (nothing.answered, nothing.wall, nothing.times["ttft"].p50, nothing.goodput) == (
        *(0, None, None),
        load_report.Goodput(0, 0.0, None),
    )
    for page in (load_report.markdown(report(*records[3:])), shown(report(*records[3:])), shown(report())):
        assert "0 answered" in page


def test_time_in_which_nobody_is_answered_counts() -> None:
    """The server dies after ten of a hundred seconds; the last request finds nobody. Every tenant has the same wall."""
    records = [
        record(0, 1, 10, tenant="a"),
        record(5, 6, 9, tenant="b"),
        record(50, 51, error="connection cut", error_kind="connection cut", tenant="a", ended=60.0),
        record(100, error="nobody answers", error_kind="nobody answers", max_tokens=5, tenant="b", ended=100.0),
    ]
    whole = load_report.summary(records, {"ttft": 1.0})
    assert (whole.wall, whole.answered, whole.request_rate, whole.output_rate) == (100, 2, 2 / 100, 4 / 100)
    assert whole.total_rate == 24 / 100 and whole.goodput == load_report.Goodput(2, 2 / 4, 2 / 100)
    by_tenant = load_report.by_tenants(records, {})
    assert {(of.wall, of.output_rate) for of in by_tenant.values()} == {(100, 2 / 100)}
    assert "2 answered, 2 failed, in 100 s" in shown(report(*records))


@pytest.mark.parametrize(
    ("changes", "of_record", "problem"),
    [
        ({}, {"sent": 0.2}, "The client did not keep up: it sent requests up to 0.200 s late (p99 0.200 s), so that"),
        ({"client_cpu": 0.97}, {}, "The client was busy for 97% of the time"),
        ({}, {"max_tokens": 9}, "4 requests got another number of tokens than asked for: 2 instead of 9"),
        ({}, {"cached_tokens": 16}, "4 requests had a prompt that the server knew"),
    ],
)
def test_what_spoils_figures_is_loud(changes: dict[str, Any], of_record: dict[str, Any], problem: str) -> None:
    flawed = report(*[record(0, 1, 2, **of_record)] * 4, **changes)
    [found] = load_report.problems(flawed)
    assert found.startswith(problem)
    assert f"⚠ {found}" in shown(flawed) and f"- **{found}**" in load_report.markdown(flawed)
    assert not load_report.problems(report(*[record(0, 1, 2)] * 4))
    assert not load_report.problems(report(record(0, 1, cached_tokens=16), shares_prompts=True))


@given(
    st.dictionaries(st.sampled_from(sorted(measures.TIMES)), st.integers(0, 10**6).map(lambda i: i / 1000), min_size=1)
)
def test_limits_are_read_as_they_are_written(limits: dict[str, float]) -> None:
    assert measures.limits_from(", ".join(f"{name}={seconds:.3f}" for name, seconds in limits.items())) == limits


@given(st.lists(st.integers(0, 4000), min_size=2, max_size=9), st.sampled_from(sorted(measures.TIMES)))
def test_a_request_meets_a_limit_if_none_of_its_times_is_above(ticks: list[int], name: str) -> None:
    one = record(*(tick / 1024 for tick in sorted(ticks)))
    worst = max(measures.times(name, [one]), default=0.0)
    assert measures.meets(one, {name: worst}) and measures.meets(one, {})
    if worst:
        assert not measures.meets(one, {name: worst / 2})
    assert not measures.meets(msgspec.structs.replace(one, error="it broke"), {name: worst})


def test_the_progress_is_live() -> None:
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=100)
    with FakeServer(steady(first=0.5)) as server:
        asyncio.run(put(plan(server, "burst:in=3,out=2,n=7"), None, terminal))
    lines = file.getvalue()
    assert "7 requests: 7 sent, 0 answered" in lines


def test_a_key_goes_to_the_server_and_into_no_file(tmp_path: Path) -> None:
    with FakeServer(steady()) as server:
        run(server, "burst:in=3,out=1,n=1", tmp_path, api_key="sesame")
    assert all("sesame" not in path.read_text() for path in tmp_path.iterdir())


def test_a_server_that_cannot_do_the_warm_up_ends_the_run() -> None:
    said = pytest.raises(BenchError, match=r"^server: HTTP 503: loading \(wait until the server is ready\)$")
    with FakeServer(lambda body: (503, {"error": {"message": "loading"}})) as server, said:
        run(server, "burst:in=3,out=1,n=1")


def test_the_command_and_ctrl_c(tmp_path: Path) -> None:
    # Whoever runs the tests in the background passes on that Ctrl-C is ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import orcaserve.cli as c; c.main()"
    )
    with FakeServer(never) as server:
        command = [sys.executable, "-c", code, "bench", "serve", "--url", f"{server.url}/v1#mine", "--workload"]
        command += ["burst:in=3,out=1,n=2 + burst:in=3,out=2,n=3", "--slo", "ttft=60", "--out", str(tmp_path / "new")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while (len(server.bodies) < 1 + 5 or num_lines(tmp_path / "new") < 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "2 answered, 0 failed" in out and "Traceback" not in err
    assert "3 requests were under way" in re.sub(r"\s+", " ", out)
    assert {body["model"] for body in server.bodies} == {"mine"}
    names = ["report.json", "report.md", "requests.jsonl", "workload.jsonl"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--url", "here"], 2, "Error: here is not a URL, as http://127.0.0.1:8000 is"),
        (["--workload", "dance"], 2, "Error: there is no workload 'dance'"),
        (["--workload", "burst:in=1,out=1,n=0"], 2, "Error: n=0 cannot be read: n is a whole number from 1"),
        (["--workload", "azure:path=/nowhere"], 1, "Error: [Errno 2] No such file or directory: '/nowhere'"),
        (
            ["--slo", "ttft=fast"],
            2,
            "Error: 'ttft=fast' are no limits: they are some of ttft, tpot, itl, latency, norm",
        ),
        (["--slo", "ttft=1,ttft=2"], 2, "Error: 'ttft=1,ttft=2' are no limits"),
        (["--timeout", "0"], 2, "Error: Invalid value for '--timeout'"),
        (["--out", "/dev/null/x"], 1, "Error: [Errno"),
        ([], 1, "Error: server: nobody answers at http://127.0.0.1:9; is the server running there?"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], code: int, message: str) -> None:
    usual = ["--url", "http://127.0.0.1:9", "--workload", "burst:in=1,out=1,n=1"]
    done = CliRunner().invoke(main, ["bench", "serve", *usual, *arguments])
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1].startswith(message), done.stderr


def test_a_run_without_an_answer_fails() -> None:
    def answer(body: dict[str, Any]) -> Any:
        return steady()(body) if len(server.bodies) == 1 else (500, {"error": "no"})

    with FakeServer(answer) as server:
        command = ["bench", "serve", "--url", server.url, "--workload", "burst:in=3,out=1,n=4"]
        done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and "4 failed by 'HTTP 500'; the first one: HTTP 500: no" in done.stdout
    assert done.stderr.splitlines()[-1] == "Error: no request was answered; the lines above say why"


def test_the_help_explains_workloads() -> None:
    done = CliRunner().invoke(main, ["bench", "serve", "--help"])
    for line in spec.explained():
        assert line in done.stdout


def test_the_load_generator_needs_no_torch() -> None:
    code = "import sys, orcaserve.bench.load, orcaserve.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
