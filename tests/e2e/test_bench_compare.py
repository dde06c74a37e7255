"""`orcaserve bench compare` over our own server and the built-in model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from serving import Serving


def test_our_own_server_does_every_work(served: Serving, tmp_path: Path) -> None:
    works = ["--works", "decode-2,trace,poisson", "--rate", "20", "--requests", "3", "--rounds", "1", "--vocab", "3072"]
    command = [sys.executable, "-m", "orcaserve", "bench", "compare", "--server", f"one={served.url}", *works]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    too_high = subprocess.run([*command, "--vocab", "151936"], capture_output=True, text=True, timeout=60, check=False)
    small = [*command[:-2], "--works", "decode-2", "--seed", "5"]
    once, again = (subprocess.run(small, capture_output=True, text=True, timeout=60, check=False) for _ in range(2))
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["problems"] == []
    assert [server["model"] for server in report["servers"]] == ["orcaserve-tiny"]
    assert [work["name"] for work in report["works"]] == ["decode-2", "trace", "poisson-20"]
    records = [record for run in report["runs"] for record in run["records"]]
    assert len(records) == 2 + 3 + 3
    for record in records:
        assert len(record["token_times"]) == record["max_tokens"]
        assert record["seen_prompt_tokens"] == record["prompt_tokens"]
        assert record["counted"] == "ids"
    assert all(
        cell["median"] > 0 for line in report["summary"] for cell in line["cells"] if "TPOT" not in line["figure"]
    )
    page = (tmp_path / "report.md").read_text()
    assert "| trace | output, tokens/s |" in page and "Flawed" not in page
    assert "round 1  trace" in done.stderr and "normalised latency" in done.stdout
    assert too_high.returncode == 1
    assert too_high.stderr.splitlines()[-1].startswith("Error: one: HTTP 400") and "--vocab" in too_high.stderr
    assert once.returncode == 0, once.stdout
    assert again.returncode == 1 and "2 of 2 requests had a known prompt" in again.stdout
