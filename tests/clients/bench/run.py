"""`orcaserve bench serve`: what our own tool says of the load that aiperf and guidellm put on the same server."""

from __future__ import annotations

import json
import subprocess
import sys

import checks

if __name__ == "__main__":
    url, model, _, out = checks.arguments()
    workload = "burst:in={},out={},n={}".format(*checks.BURST)
    words = ["--url", f"{url}#{model}", "--workload", workload, "--vocab", "2048", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "orcaserve", "bench", "serve", *words], check=True)
    summary = json.loads((out / "report.json").read_text())["summary"]
    times, answered = summary["times"], summary["answered"]
    said = checks.figures(summary["output_rate"], times["ttft"]["p50"], times["tpot"]["p50"], times["latency"]["p50"])
    checks.end(checks.Counts(answered, summary["requests"] - answered, 0, said))
