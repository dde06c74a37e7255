"""`orcaserve batch`: the answers of the server, in a file, whatever interrupts it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import Serving

from orcaserve import builtin
from orcaserve.core.config import EngineOptions
from orcaserve.engine.messages import Step
from orcaserve.serve import batch
from orcaserve.serve.batch import run_batch
from orcaserve.serve.pool import EngineFailed, Pool
from orcaserve.serve.replica import Replica

COUNT = 24


def lines(count: int = COUNT) -> list[dict]:
    asked = []
    for number in range(count):
        body = {"max_tokens": 12, "seed": number}
        if number % 2:
            body |= {"messages": [{"role": "user", "content": f"Tell me about {number} cats"}]}
        else:
            body |= {"prompt": f"Once there were {number} cats", "n": 2}
        url = "/v1/chat/completions" if number % 2 else "/v1/completions"
        asked.append({"custom_id": f"ask-{number}", "method": "POST", "url": url, "body": body})
    return asked


def write(path: Path, asked: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in asked))
    return path


def command(source: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "orcaserve", "batch", str(source), str(target)]


def answers(path: Path) -> dict[str, dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found), "an answer came twice"
    return {line["custom_id"]: line["response"] for line in found}


def test_a_batch_is_answered_as_by_the_server_and_goes_on_after_a_kill(served: Serving, tmp_path: Path) -> None:
    asked = lines()
    asked[3]["body"]["temperature"] = 9
    source, target = write(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl"
    first = subprocess.Popen(command(source, target), stderr=subprocess.DEVNULL)
    while first.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with target.open("ab") as file:
        file.write(b'{"custom_id": "ask-')  # a line that a crash has cut off
    is_told = b'"ask-3"' in target.read_bytes()
    second = subprocess.run(command(source, target), capture_output=True, text=True, check=False)
    assert second.returncode == (0 if is_told else 1), second.stderr
    assert is_told or "1 answers are errors" in second.stderr
    got = answers(target)
    assert set(got) == {line["custom_id"] for line in asked}
    for line in asked:
        response = served.client.post(line["url"], json=line["body"])
        assert got[line["custom_id"]]["status_code"] == response.status_code
        theirs = response.json()
        if response.status_code == 200:
            assert [c.get("text", c.get("message")) for c in got[line["custom_id"]]["body"]["choices"]] == [
                c.get("text", c.get("message")) for c in theirs["choices"]
            ]
        else:
            assert got[line["custom_id"]]["body"] == theirs and response.status_code == 400
    third = subprocess.run(command(source, target), capture_output=True, text=True, check=False)
    assert third.returncode == 0 and answers(target) == got, "nothing is left to do"


def test_without_an_engine_nothing_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up in the middle: what is left is still to be asked by the next run."""

    ended: list[int] = []

    class Doomed(Pool):
        """Gives its engine up for good after the first answers."""

        def on_step(self, replica: Replica, step: Step) -> None:
            super().on_step(replica, step)
            ended.extend(output.id for output in step.outputs if output.finish_reason)
            if len(ended) >= COUNT // 2 and self.failure is None:
                replica._supervisor._give_up("it is broken")

    monkeypatch.setattr(batch, "Pool", Doomed)
    source, target = write(tmp_path / "in.jsonl", lines()), tmp_path / "out.jsonl"
    told: list[tuple[int, int]] = []
    options = EngineOptions(model=str(builtin.MODEL_DIR), threads=1)

    async def main() -> None:
        await run_batch("m", options, source, target, at_once=3, on_answer=lambda *done: told.append(done))

    with pytest.raises(EngineFailed, match="it is broken"):
        asyncio.run(main())
    got = answers(target)
    assert 0 < len(got) < COUNT and told[-1] == (len(got), COUNT)
    assert {answer["status_code"] for answer in got.values()} == {200}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"url": "/v1/nothing"}, "line 2 asks for '/v1/nothing'"),
        ({"custom_id": "ask-0"}, "line 2 has the custom_id 'ask-0'"),
        ({"body": {"stream": True}}, "line 2 asks for a stream"),
        ({"method": "GET"}, "line 2 is no request of a batch"),
        ({"body": 3}, "line 2 is no request of a batch"),
    ],
    ids=str,
)
def test_a_batch_that_cannot_be_run_says_why(tmp_path: Path, change: dict, said: str) -> None:
    asked = lines(3)
    asked[1] |= change
    source = write(tmp_path / "in.jsonl", asked)
    result = subprocess.run(command(source, tmp_path / "out"), capture_output=True, text=True, check=False)
    assert result.returncode == 1 and said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_is_no_output_is_left_alone(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", lines(2)), tmp_path / "diary"
    target.write_text("Dear diary\n")
    result = subprocess.run(command(source, target), capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "line 1 of the output is no answer" in result.stderr
    assert target.read_text() == "Dear diary\n"
