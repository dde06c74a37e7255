"""What grammars need of a tokenizer is read while the model loads; one that has none of it is served without."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import llguidance
import numpy as np
import pytest
import tokenizers

from orcaserve import builtin
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.serve.errors import ApiError
from orcaserve.serve.protocol import CompletionRequest
from orcaserve.serve.served_model import ServedModel
from orcaserve.worker.grammars import Compiler, GrammarError, Grammars

DIGITS = CompletionRequest(prompt="x", guided_regex="[0-9]+")


def ask(model: ServedModel) -> str | None:
    return asyncio.run(model.structures.grammar(DIGITS))


def copy_of(folder: Path, **changes: Any) -> Path:
    """The built-in model's files but for its weights, with some fields of config.json changed."""
    shutil.copytree(builtin.MODEL_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_the_vocabulary_is_read_while_the_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads it with Python's lock: the first grammar of a process held everybody up, 0.5 s long."""
    model, grammars = ServedModel("m", builtin.MODEL_DIR), Grammars(builtin.MODEL_DIR, 3072)

    def too_late(*arguments: object, **options: object) -> None:
        raise AssertionError("read while others are served")

    monkeypatch.setattr(llguidance, "LLTokenizer", too_late)
    grammar = ask(model)
    assert grammar is not None
    params, is_ready = SamplingParams(grammar=grammar), threading.Event()
    new = NewRequest(id=1, token_ids=(5,), num_prompt=1, max_tokens=5, params=params, end_token_ids=(1,))
    grammars.prepare(new, is_ready.set)
    assert is_ready.wait(60)
    request: Any = SimpleNamespace(
        id=1, grammar=grammar, end_token_ids=(1,), generated=lambda start: (), guide=None, allowed=None
    )
    grammars.look([request])
    assert isinstance(request.allowed, np.ndarray), request.allowed


@pytest.mark.parametrize("kind", ["words", "larger than the model's vocabulary"])
def test_without_a_fitting_tokenizer_a_grammar_is_refused_at_the_door(tmp_path: Path, kind: str) -> None:
    """It was an error of the server: the library's own, in the middle of the request."""
    folder = copy_of(tmp_path / "m", **({} if kind == "words" else {"vocab_size": 100}))
    if kind == "words":
        words = {"[UNK]": 0, "<|end|>": 1} | {f"w{i}": 2 + i for i in range(3070)}
        tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]")).save(str(folder / "tokenizer.json"))
    with pytest.raises(ApiError, match="'guided_regex' cannot be followed: this model's tokenizer") as raised:
        ask(ServedModel("m", folder))
    assert raised.value.status == 400


def test_without_an_end_token_a_grammar_is_refused_at_the_door(tmp_path: Path) -> None:
    folder = copy_of(tmp_path / "m", eos_token_id=None)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ApiError, match="'guided_regex' cannot be followed: this model has no end token"):
        ask(ServedModel("m", folder))


def test_without_a_tokenizer_an_engine_starts(tmp_path: Path) -> None:
    folder = copy_of(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    Grammars(folder, 3072)
    with pytest.raises(GrammarError, match="tokenizer"):
        Compiler(folder, 3072, 1)
