"""`orcaserve bench serve` over our own server and the built-in model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from serving import Serving


def test_our_own_server_under_load(served: Serving, tmp_path: Path) -> None:
    workload = "poisson:rate=20,in=5-40,out=2-12,n=12,tenant=a + chat:sessions=2,rate=9,turns=2,think=0.1,in=20,out=5"
    command = [sys.executable, "-m", "orcaserve", "bench", "serve", "--workload", workload, "--vocab", "3072"]
    command += ["--slo", "ttft=60,tpot=60", "--out", str(tmp_path), "--url"]
    done = subprocess.run([*command, served.url], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_bytes())
    assert report["server"]["model"] == "orcaserve-tiny" and report["errors"] == []
    assert (report["summary"]["answered"], report["summary"]["goodput"]["share"]) == (16, 1.0)
    assert report["summary"]["cached_tokens"] > 0, "a chat's second turn begins as its first one did"
    assert report["tenants"]["a"]["cached_tokens"] == 0
    records = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(records) == 16
    for record in records:
        assert len(record["token_times"]) == record["max_tokens"]
        assert record["seen_prompt_tokens"] == record["prompt_tokens"]
        assert record["counted"] == "ids" and record["due"] <= record["sent"] < record["token_times"][0]
    assert "16 answered, 0 failed" in done.stdout
