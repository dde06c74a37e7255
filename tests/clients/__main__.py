"""`python -m clients`: every client against one server, a line for each as it ends, and a table of all."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from e2e.serving import Serving

from clients.checks import Counts
from orcaserve.builtin import MODEL_DIR, NAME

HERE = Path(__file__).parent
OPENAI_NAMES = ("gpt-6-astra", "gpt-3.5-turbo-instruct")  # what the tests of openai-python call their models
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|system|>Write <tool_call>. Tools: {{ tools | tojson }}<|end|>{% endif %}"
    "{% set names = {'developer': 'system', 'tool': 'user'} %}"
    "{% for message in messages %}{% set role = names.get(message.role, message.role) %}"
    "<|{{ role }}|>{{ (message.content or '') | trim }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model_with_tools(folder: Path) -> Path:
    """The built-in model with a chat template that knows tools: it cannot call any by itself, but can be made to."""
    shutil.copytree(MODEL_DIR, folder, dirs_exist_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    return folder


def command(client: str, environments: Path) -> list[str]:
    """Of the client's program, in its own environment; that of our own tool is ours."""
    folder = HERE / client
    if (folder / "run.mjs").exists():
        shutil.copy(folder / "run.mjs", environments / client)  # node finds packages beside the program only
        return ["node", str(environments / client / "run.mjs")]
    own = environments / client / "bin" / "python"
    return [str(own) if (folder / "requirements.txt").exists() else sys.executable, str(folder / "run.py")]


def run(client: str, url: str, build: Path, seconds: float) -> Counts:
    """One client. Its output goes to a file; what it does not say in a last line counts as a failure."""
    out = build / "out" / client
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if client == "bench":
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *sys.path])
    with (out / "log.txt").open("wb") as log:
        words = [*command(client, build), url, NAME, str(build / "model"), str(out)]
        try:
            subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=seconds, check=False)
        except (subprocess.TimeoutExpired, OSError) as error:
            return Counts(0, 1, 0, f"{type(error).__name__}; see {out}/log.txt")
    lines = (out / "log.txt").read_text(errors="replace").splitlines() or [""]
    return Counts.of(lines[-1]) or Counts(0, 1, 0, f"no last line; see {out}/log.txt")


def version(client: str) -> str:
    """The pinned ones, as the requirements say them; the first is the client, the others what its suite needs."""
    if (HERE / client / "package.json").exists():
        wanted = json.loads((HERE / client / "package.json").read_text())["dependencies"]
        return ", ".join(f"{name} {number}" for name, number in wanted.items())
    if not (HERE / client / "requirements.txt").exists():
        return "`orcaserve bench serve`"
    return (HERE / client / "requirements.txt").read_text().splitlines()[0].replace("==", " ")


def table(results: dict[str, tuple[Counts, float]]) -> str:
    """Markdown: a line per client."""
    lines = ["| client | passed | failed | deselected | seconds | |", "|---|---|---|---|---|---|"]
    for client, (counts, seconds) in results.items():
        figures = f"{counts.passed} | {counts.failed} | {counts.deselected} | {seconds:.0f}"
        lines.append(f"| {version(client)} | {figures} | {counts.said} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    everyone = sorted(path.parent.name for path in HERE.glob("*/run.*"))
    parser = argparse.ArgumentParser(prog="python -m clients", description=__doc__)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"only these: {', '.join(everyone)}")
    parser.add_argument("--build", type=Path, default=Path("build/clients"), help="where the environments are")
    parser.add_argument("--seconds", type=float, default=900, help="for each client, at most")
    args = parser.parse_args()
    if strangers := set(args.clients) - set(everyone):
        parser.error(f"no client {', '.join(sorted(strangers))}")
    build, results = args.build.absolute(), {}
    names = [word for name in (NAME, *OPENAI_NAMES) for word in ("--served-model-name", name)]
    model = model_with_tools(build / "model")
    with Serving(str(model), "--dtype", "float32", *names) as serving:
        for client in args.clients or everyone:
            began = time.perf_counter()
            counts = run(client, serving.url, build, args.seconds)
            results[client] = counts, time.perf_counter() - began
            print(f"{client}: {counts.line()}", flush=True)
            (build / "table.md").write_text(table(results))
    print((build / "table.md").read_text())
    return 1 if any(counts.failed for counts, _ in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
