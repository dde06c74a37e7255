"""lm-eval on a task of 200 items: by the server, and by transformers in float32. The log-likelihoods are the same.

The harness does both, so items, tokens and what is summed are its own. `local-completions` finds the tokenizer at the
server. A log-likelihood is a sum over a choice's tokens, computed in another order of additions by the two.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import checks

TOLERANCE = 2e-4  # nats, of a choice's log-likelihood
HOMES = {
    "in the sea": ("whale", "shark", "octopus", "crab", "dolphin"),
    "in the forest": ("fox", "owl", "deer", "squirrel", "bear"),
    "on a farm": ("cow", "hen", "pig", "sheep", "goat"),
    "in the desert": ("camel", "scorpion", "lizard", "meerkat", "sand cat"),
    "in cold places": ("penguin", "polar bear", "walrus", "reindeer", "snow hare"),
}
QUESTIONS = (
    "Question: Where does a {} live?\nAnswer: It lives",
    "A child asked where a {} lives. Her mother said that it lives",
    "I saw a {} yesterday. I know that such animals live",
    "If you want to see a {}, look for it",
    "Once there was a {} who had many friends. They all lived",
    "{} and friends: a story of animals that live",
    "The {} said: I am at home",
    "What do we know of the {}? We find it",
)


def write_task(folder: Path) -> None:
    """The items, and the task that reads them."""
    homes = list(HOMES)
    items = [
        {"text": question.format(animal), "choices": homes, "answer": homes.index(home)}
        for question in QUESTIONS
        for home, animals in HOMES.items()
        for animal in animals
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "task": "homes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
        "metadata": {"version": 1},
    }
    (folder / "homes.yaml").write_text(json.dumps(task))  # JSON is YAML


def evaluate(folder: Path, name: str, kind: str, **arguments: object) -> dict[int, list[list[float | bool]]]:
    """For each item its choices' log-likelihoods, and whether they are what the model would say by itself."""
    settings = ",".join(f"{key}={value}" for key, value in arguments.items())
    words = ["--tasks", "homes", "--include_path", str(folder), "--log_samples", "--output_path", str(folder / name)]
    words += ["--model", kind, "--model_args", settings, "--batch_size", "8"]
    subprocess.run([sys.executable, "-m", "lm_eval", *words], check=True)
    [path] = (folder / name).rglob("samples_homes_*.jsonl")
    samples = map(json.loads, path.read_text().splitlines())
    return {sample["doc_id"]: [_pair(pair) for pair in sample["filtered_resps"]] for sample in samples}


def _pair(pair: list[object]) -> list[float | bool]:
    value, is_greedy = pair
    return [float(str(value)), str(is_greedy) == "True"]


if __name__ == "__main__":
    url, model, checkpoint, out = checks.arguments()
    write_task(out)
    completions = f"{url}/v1/completions"
    ours = evaluate(
        out, "ours", "local-completions", model=model, base_url=completions, num_concurrent=4, max_length=1024
    )
    theirs = evaluate(out, "theirs", "hf", pretrained=checkpoint, dtype="float32", add_bos_token=False)
    assert ours.keys() == theirs.keys()
    far, failed = 0.0, 0
    for item in ours:
        pairs = list(zip(ours[item], theirs[item], strict=True))
        farthest = max(abs(mine[0] - other[0]) for mine, other in pairs)
        is_same = all(mine[1] == other[1] for mine, other in pairs)
        far = max(far, farthest)
        failed += not (math.isfinite(farthest) and farthest <= TOLERANCE and is_same)
    said = f"{sum(map(len, ours.values()))} log-likelihoods, at most {far:.1e} nats apart (tolerance {TOLERANCE:g})"
    checks.end(checks.Counts(len(ours) - failed, failed, 0, said))
