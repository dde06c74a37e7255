"""Real server processes for the tests of the HTTP layer, and a small tokenizer for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
ENGINE = HERE / "ngram_engine.py"
VOCAB = 400

TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>' + message.content }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' + (mood | default('')) }}{% endif %}"""

TOOLS_TEMPLATE = (
    "{% if tools %}Tools: {{ tools | tojson }}\nWrite <tool_call>{...}</tool_call>.\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.reasoning_content %}({{ message.reasoning_content }}) {% endif %}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments.city }}</tool_call>{% endfor %}\n"
    "{% endfor %}assistant:"
)


def make_model(folder: Path, *, bos: bool = True, template: bool = True) -> Path:
    """A folder with a byte-level tokenizer of 400 tokens; no weights, since the engine of these tests needs none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["The quick brown fox jumps over the lazy dog. Grüße, 世界! The fox and the dog are friends in the end."] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 1,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens([AddedToken("  plain  ", special=False, normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "bos_token": "<s>" if bos else None,
    }
    if template:
        config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1], "top_k": 50}))
    return folder


class Server:
    """One server process. Owner of the process; its URL is known at once, `ready` waits for the model."""

    def __init__(
        self,
        model: Path,
        *engine: str,
        http: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
        replication: dict[str, Any] | None = None,
        command: Sequence[str] = (sys.executable, str(ENGINE), "--vocab", str(VOCAB)),
    ) -> None:
        options = {"port": 0, "log_level": "warning", **(http or {})}
        argv = [sys.executable, HERE / "api_server.py", model]
        argv += [json.dumps(of or {}) for of in (options, limits, replication)]
        argv += [*command, *engine]
        self.process = subprocess.Popen(
            [str(word) for word in argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent.parent / "src"), *sys.path])},
        )
        self.url = f"http://127.0.0.1:{options['port']}"
        self.model = model

    def ready(self) -> Self:
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.process.communicate()[1]
        return self

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events; the last one must be [DONE]."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines), lines
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
