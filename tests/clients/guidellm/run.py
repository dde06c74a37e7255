"""guidellm: a small load of synthetic prompts, to the end. Nothing it measures here is a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import checks


def option(name: str, **values: object) -> list[str]:
    return [f"--{name}", ",".join(f"{key}={value}" for key, value in values.items())]


if __name__ == "__main__":
    url, model, checkpoint, out = checks.arguments()
    prompt, output, requests = checks.BURST
    words = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-progress"]
    words += option("backend", kind="openai_http", target=url, model=model)
    words += option("profile", kind="concurrent", streams=requests)
    words += option("constraint", kind="max_requests", count=requests)
    words += option("tokenizer", kind="hf_auto", model=checkpoint)
    words += option("data", kind="synthetic_text", prompt_tokens=prompt, output_tokens=output)
    words += option("output", kind="json", path=out / "report.json")
    subprocess.run(words, check=True)
    [benchmark] = json.loads((out / "report.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    good = metrics["request_totals"]["successful"]

    def median(name: str) -> float:
        return float(metrics[name]["successful"]["median"])

    rate = metrics["output_tokens_per_second"]["successful"]["mean"]
    ttft, tpot = median("time_to_first_token_ms") / 1000, median("inter_token_latency_ms") / 1000
    said = checks.figures(rate, ttft, tpot, median("request_latency"))
    checks.end(checks.Counts(good, requests - good, 0, said))
