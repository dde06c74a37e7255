"""aiperf: a small load of synthetic prompts, to the end. Nothing it measures here is a benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checks

if __name__ == "__main__":
    url, model, checkpoint, out = checks.arguments()
    prompt, output, requests = checks.BURST
    words = [str(Path(sys.executable).with_name("aiperf")), "profile", "--ui", "none", "--streaming"]
    words += ["--url", url, "--model", model, "--endpoint-type", "chat", "--tokenizer", str(checkpoint)]
    words += ["--concurrency", str(requests), "--request-count", str(requests), "--artifact-dir", str(out / "report")]
    words += ["--synthetic-input-tokens-mean", str(prompt), "--synthetic-input-tokens-stddev", "0"]
    words += ["--output-tokens-mean", str(output), "--output-tokens-stddev", "0", "--extra-inputs", "ignore_eos:true"]
    # Offline, it takes a folder for a name at the hub.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    subprocess.run(words, env=environment, check=True)
    [path] = (out / "report").rglob("profile_export_aiperf.json")
    report = json.loads(path.read_text())
    good = int(report["request_count"]["avg"])

    def median(name: str) -> float:
        return float(report[name]["p50"]) / 1000

    rate = report["output_token_throughput"]["avg"]
    said = checks.figures(rate, median("time_to_first_token"), median("inter_token_latency"), median("request_latency"))
    checks.end(checks.Counts(good, requests - good, 0, said))
