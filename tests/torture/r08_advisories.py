"""R8: attacks that are known of other engines, one by one, on a server that has API keys and a poisoned checkpoint.

Each must be refused, or do no harm: the right status, one answer, no connection to anywhere, no code run.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import inspect
import json
import pickle
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
from e2e.serving import Serving

from orcaserve.core.block_pool import BlockPool
from orcaserve.core.config import ModelError
from orcaserve.core.kv_cache import first_key, next_key
from orcaserve.engine.framing import FrameReader
from orcaserve.model.config import read_config
from orcaserve.serve import keys
from orcaserve.serve.chat_template import ChatTemplate, TemplateError
from orcaserve.serve.find_model import find_model
from orcaserve.serve.terms import Terms, api_key
from orcaserve.serve.tokenizer import Tokenizer
from torture.hostile import MODEL, head, post
from torture.http_mutants import Mutant
from torture.r07_fuzz import STATUS, provoke, wrong_with
from torture.rows import Outcome, Row, Setup

ROWS = (Row("R8", "one test per published attack on other engines that could apply", "every one refused or harmless"),)
_KEY, _OTHER = "the-key-of-a", "the-key-of-b"
_COMPLETIONS, _CHAT, _RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
_SECONDS = 30.0  # for anything


class Scene(NamedTuple):
    """url: of the server. ear: where nobody must come. marker: what nobody must make. folder: of a checkpoint."""

    url: str
    ear: str
    marker: Path
    folder: Path


class Attack(NamedTuple):
    """try_it: what is wrong afterwards; None: it was refused, or did no harm."""

    kind: str
    name: str
    try_it: Callable[[Scene], str | None]


# -- requests ------------------------------------------------------------------------------------------------------


def _asked(path: str, body: bytes, statuses: Sequence[int], scene: Scene) -> str | None:
    body = body.replace(b"EAR", scene.ear.encode())
    return _answered(post(path, body, [f"Authorization: Bearer {_KEY}"]), statuses, scene, is_whole=True)


def _answered(data: bytes, statuses: Sequence[int], scene: Scene, *, is_whole: bool = False) -> str | None:
    answer = provoke(scene.url, Mutant("", data, is_whole))
    found = [int(status) for status in STATUS.findall(answer.text)]
    if wrong := wrong_with(answer):
        return wrong
    if len(found) > 1:
        return f"{len(found)} answers to one request: {found}"
    if not (set(found) or {0}) <= set(statuses):
        return f"answers {found}, not one of {list(statuses)}: {answer.text[-200:]!r}"
    return None


def _requests() -> Iterator[Attack]:
    """Values that must be refused by name, or be followed without harm."""

    def ask(kind: str, name: str, path: str, fields: bytes | dict[str, Any], *statuses: int) -> Attack:
        given = json.dumps(fields).encode() if isinstance(fields, dict) else b"{" + fields + b"}"
        return Attack(kind, name, partial(_asked, path, given, statuses or (400,)))

    def complete(**fields: Any) -> dict[str, Any]:
        return {"prompt": "x", "max_tokens": 2, **fields}

    for name in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty", "timeout"):
        for value in ("NaN", "Infinity", "-Infinity", "1e999", '"nan"', "-1e308"):
            yield ask("not a number", f"{name} {value}", _COMPLETIONS, f'"prompt":"x","{name}":{value}'.encode())
    for token in (-1, 10**6, 2**31, 2**63, 2**64, -(2**31)):
        yield ask("token ids", f"logit_bias of {token}", _COMPLETIONS, complete(logit_bias={str(token): 1}))
        yield ask("token ids", f"prompt of {token}", _COMPLETIONS, complete(prompt=[token]))
        yield ask("token ids", f"stop token {token}", _COMPLETIONS, complete(stop_token_ids=[token]))
        yield ask("token ids", f"detokenize {token}", "/detokenize", {"tokens": [token]})
    yield ask("token ids", "logit_bias of 10^9", _COMPLETIONS, complete(logit_bias={"5": 1e9}))
    for name, value in {
        "n": 10**9,
        "best_of": 10**9,
        "logprobs": 10**6,
        "prompt_logprobs": 10**6,
        "max_tokens": 2**31 - 1,
        "min_tokens": 2**31 - 1,
        "stop": ["a"] * 10_000,
        "stop_token_ids": list(range(1_000)),
        "logit_bias": {str(i): 1 for i in range(5_000)},
        "top_k": 2**40,
        "priority": 2**63,
        "cache_salt": "x" * 10_000,
    }.items():
        yield ask("more than there is", name, _COMPLETIONS, complete(**{name: value}))
    yield ask("more than there is", "a long stop", _COMPLETIONS, complete(stop="a" * 100_000))
    yield ask("more than there is", "prompts x n", _COMPLETIONS, complete(prompt=["x"] * 1_000, n=128))
    yield ask(
        "more than there is", "entries", _COMPLETIONS, complete(n=128, max_tokens=500, logprobs=20, prompt=["x"] * 8)
    )
    deep = '{"type":"object","properties":{"a":' * 5_000 + "{}" + "}}" * 5_000
    for name, grammar in {
        "(a+)+b": {"guided_regex": "(a+)+b"},
        "nested repetitions": {"guided_regex": "((a{1,999}){1,999}){1,999}"},
        "a huge repetition": {"guided_regex": "a{1,2000000000}"},
        "a long regex": {"guided_regex": "a|" * 60_000},
        "a broken regex": {"guided_regex": "(((("},
        "look-behind": {"guided_regex": "(?<=a)b"},
        "left recursion": {"guided_grammar": 'start: start start | start | "a"'},
        "a grammar that never ends": {"guided_grammar": "start: start"},
        "ambiguity": {"guided_grammar": 'start: a\na: a a a | a a | "x" | ""'},
        "a file in a grammar": {"guided_grammar": "%import /etc/passwd\nstart: passwd"},
        "a schema that is itself": {"guided_json": {"$ref": "#"}},
        "a schema elsewhere": {"guided_json": {"$ref": "http://EAR/schema.json"}},
        "a schema in a file": {"guided_json": {"$ref": "file:///etc/passwd"}},
        "many choices": {"guided_choice": [f"choice {i}" for i in range(1_024)]},
        "10^9 items": {"guided_json": {"type": "array", "minItems": 10**9, "items": {"type": "string"}}},
        "a pattern in a schema": {"guided_json": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}},
        "a product of choices": {
            "guided_json": {"allOf": [{"anyOf": [{"minLength": i + j} for j in range(9)]} for i in range(9)]}
        },
    }.items():
        yield ask("grammar bombs", name, _COMPLETIONS, complete(prompt="a" * 30, **grammar), 200, 400)
    yield ask("deep nesting", "schema", _COMPLETIONS, b'"prompt":"x","guided_json":' + deep.encode())
    yield ask("deep nesting", "schema as text", _COMPLETIONS, complete(guided_json=deep))
    yield ask("deep nesting", "lists", _COMPLETIONS, b'"prompt":' + b"[" * 20_000 + b"]" * 20_000)
    yield ask("deep nesting", "ignored field", _COMPLETIONS, b'"prompt":"x","a":' + b"[" * 20_000 + b"]" * 20_000)
    yield ask("deep nesting", "never closed", _COMPLETIONS, b'"prompt":"x","a":' + b'{"a":' * 20_000)
    yield ask(
        "prompt embeddings", "a tensor", _COMPLETIONS, complete(prompt_embeds=base64.b64encode(b"PK\3\4").decode())
    )
    yield ask("prompt embeddings", "alone", _COMPLETIONS, {"prompt_embeds": "AAAA"})
    yield ask(
        "prompt embeddings", "a list", _CHAT, {"messages": [{"role": "user", "content": "x"}], "prompt_embeds": ["A"]}
    )
    yield ask("code in a request", "logits_processors", _COMPLETIONS, complete(logits_processors=["os.system"]))
    yield from _conversations(ask)


def _conversations(ask: Callable[..., Attack]) -> Iterator[Attack]:
    turn = {"role": "user", "content": "x"}

    def chat(**fields: Any) -> dict[str, Any]:
        return {"messages": [turn], "max_tokens": 2, **fields}

    yield ask("template injection", "chat_template", _CHAT, chat(chat_template="{{ cycler.__init__.__globals__ }}"))
    for name in ("messages", "add_generation_prompt", "bos_token", "eos_token"):
        yield ask("template injection", f"variable {name}", _CHAT, chat(chat_template_kwargs={name: "x"}), 400, 200)
    for name in (
        "self",
        "args",
        "kwargs",
        "context",
        "environment",
        "__class__",
        "range",
        "loop",
        "namespace",
        "a b",
        "",
    ):
        yield ask(
            "template injection", f"variable {name!r}", _CHAT, chat(chat_template_kwargs={name: {"a": 1}}), 200, 400
        )
        yield ask(
            "template injection", f"tokenize {name!r}", "/tokenize", chat(chat_template_kwargs={name: "x"}), 200, 400
        )
    for role in ("{{ 7 * 7 }}", "__class__", "system\nuser"):
        yield ask(
            "template injection",
            f"role {role!r}",
            _CHAT,
            {"messages": [{**turn, "role": role}], "max_tokens": 1},
            200,
            400,
        )
    for url in (
        "http://EAR/a.png",
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "data:image/png;base64,AA==",
        "gopher://EAR/",
    ):
        for kind in ("image_url", "input_image", "input_audio", "video_url", "file", "input_file"):
            part = {"type": kind, kind: {"url": url}, "file_url": url, "image_url": url}
            yield ask(
                "fetching for a client", f"{kind} {url}", _CHAT, {"messages": [{"role": "user", "content": [part]}]}
            )
        item = {"role": "user", "content": [{"type": "input_image", "image_url": url}]}
        yield ask("fetching for a client", f"responses {url}", _RESPONSES, {"input": [item]})
        tool = {"type": "mcp", "server_label": "a", "server_url": url}
        yield ask("fetching for a client", f"mcp {url}", _RESPONSES, {"input": "x", "tools": [tool]})
    dear = "[" + "1.2345678901234567e-301," * 50_000 + "1]"
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": dear}}
    yield ask(
        "giant prompts",
        "arguments of a call",
        _CHAT,
        {"messages": [turn, {"role": "assistant", "tool_calls": [call]}]},
        413,
    )
    yield ask("giant prompts", "text", _COMPLETIONS, {"prompt": "x" * 10_000_000})
    yield ask("giant prompts", "ids", _COMPLETIONS, {"prompt": [5] * 1_000_000}, 413)
    yield ask("giant prompts", "messages", _CHAT, {"messages": [turn] * 30_000})
    yield ask("giant prompts", "one word", "/tokenize", {"prompt": "a" * 3_000_000}, 400)
    yield ask("giant prompts", "blanks", "/tokenize", {"prompt": " " * 30_000}, 200, 400)


# -- HTTP ----------------------------------------------------------------------------------------------------------


def _paths() -> Iterator[Attack]:
    """Without a key nothing but the probes and the page is there, whatever the path is made to look like."""
    kind = "paths and headers against keys"
    paths = [
        "//v1/models",
        "/v1//models",
        "/v1/../v1/models",
        "/health/../v1/models",
        "/health/%2e%2e/v1/models",
        "/%2e/v1/models",
        "/V1/models",
        "/v1/models/",
        "/v1/models/%2e",
        "/health;/../v1/models",
        "/health%2f..%2fv1/models",
        "/health%00/v1/models",
        "/%76%31/models",
        "/v1/models?",
        "/v1/models?/health",
        "/v1/models;/health",
        "/ready/..;/v1/models",
        "/v1/models%20",
        "/health/v1",
        "http://localhost/v1/models",
        "http://localhost/health/../v1/models",
        "//localhost/v1/models",
        "/.//v1/models",
        "/metrics",
        "/trace",
        "/version",
        "/openapi.json",
        "/docs",
        "/tokenizer_info",
        "/page/events",
        "/page/compare",
        "/v1/models/orcaserve-tiny",
        "/HEALTH",
        "/health/",
        "/health//",
        "//health",
        "/./health",
        "/%68ealth",
    ]
    for path in paths:
        yield Attack(kind, path, partial(_answered, head(path, 0, method="GET"), (400, 401)))
    for header in (
        *(
            "X-Original-URL: /health",
            "X-Rewrite-URL: /health",
            "X-Forwarded-Prefix: /health",
            "X-Forwarded-Uri: /health",
        ),
        *("X-Forwarded-For: 127.0.0.1", "X-Real-IP: 127.0.0.1", "Forwarded: for=127.0.0.1;proto=https", "Via: 1.1 a"),
        *(
            "X-HTTP-Method-Override: OPTIONS",
            "Origin: null",
            "Referer: http://localhost/health",
            "Host: localhost/health",
        ),
        *("Cookie: api_key=the-key-of-a", "Api-Key: the-key-of-a", "X-Api-Key: the-key-of-a", "Upgrade: websocket"),
    ):
        data = head("/v1/models", 0, [header], method="GET")
        yield Attack(kind, header, partial(_answered, data, (400, 401)))
    for host in (
        "localhost",
        "127.0.0.1",
        "",
        "health",
        "a b",
        "[::1",
        "localhost:99999",
        "http://localhost/health",
        "a" * 9_000,
    ):
        data = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
        yield Attack(kind, f"host {host[:40]!r}", partial(_answered, data, (0, 400, 401)))
    for method in ("HEAD", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "PATCH"):
        data = head("/v1/models" if method != "CONNECT" else "a:1", 0, method=method)
        yield Attack(kind, method, partial(_answered, data, (0, 400, 401)))
    for given in (
        *(
            "Bearer",
            "Bearer ",
            "Bearer null",
            "Basic dGhlLWtleS1vZi1h",
            "the-key-of-a",
            "Bearer:the-key-of-a",
            "Bearer a=the-key-of-a",
        ),
        *(
            "Bearer the-key-of",
            "Bearer the-key-of-aa",
            "Bearer THE-KEY-OF-A",
            "Bearer the-key-of-a the-key-of-b",
            "Bearer *",
        ),
        *(
            "Bearer the-key-of-a\x00",
            "Bearer the-key-of-%61",
            "Bearer ' OR 1=1 --",
            "Digest the-key-of-a",
            "Bearer\tthe-key-of-a",
        ),
        *(
            "Bearer wrong\r\nAuthorization: ",
            "Bearer the-key-of-a\r\nAuthorization: Bearer wrong",
            "Bearer " + "a" * 9_000,
        ),
    ):
        data = head("/v1/models", 0, [f"Authorization: {given}"], method="GET")
        yield Attack(kind, f"authorization {given[:50]!r}", partial(_answered, data, (0, 400, 401)))
    for path in [
        "/shutdown",
        "/pause",
        "/resume",
        "/sleep",
        "/wake_up",
        "/collective_rpc",
        "/update_weights",
        "/update_weights_from_disk",
        "/flush_cache",
        "/reset_prefix_cache",
        "/start_profile",
        "/stop_profile",
        "/load_lora_adapter",
        "/v1/load_lora_adapter",
        "/server_info",
        "/get_server_info",
        "/slots",
        "/props",
        "/generate",
        "/invocations",
        "/configure_logging",
        "/pickle",
        "/exec",
        "/ping",
        "/static/../../etc/passwd",
        "/page/../../etc/passwd",
        "/docs/%2e%2e/%2e%2e/etc/passwd",
    ]:
        for method in ("GET", "POST"):
            data = head(path, 0, [f"Authorization: Bearer {_KEY}"], method=method)
            yield Attack("an operator's calls", f"{method} {path}", partial(_answered, data, (400, 404, 405)))


def _framing() -> Iterator[Attack]:
    """Two ideas of where a request ends must never be two requests; the second one would be another client's."""
    kind = "smuggled requests"
    inner = head("/version", 0, [f"Authorization: Bearer {_KEY}"], method="GET").decode()
    for name, headers, body in (
        ("CL.TE", "Content-Length: 6\r\nTransfer-Encoding: chunked", f"0\r\n\r\n{inner}"),
        ("TE.CL", "Transfer-Encoding: chunked\r\nContent-Length: 4", f"5c\r\n{inner}\r\n0\r\n\r\n"),
        ("two lengths", "Content-Length: 0\r\nContent-Length: 5", inner),
        ("a list of lengths", "Content-Length: 0, 5", inner),
        ("a signed length", "Content-Length: +0", inner),
        ("a length in hex", "Content-Length: 0x0", inner),
        ("a negative length", "Content-Length: -1", inner),
        ("a blank before the colon", "Content-Length : 5", inner),
        ("chunked twice", "Transfer-Encoding: chunked, chunked", f"0\r\n\r\n{inner}"),
        ("chunked, then not", "Transfer-Encoding: chunked, identity", f"0\r\n\r\n{inner}"),
        ("an unknown coding", "Transfer-Encoding: xchunked", f"0\r\n\r\n{inner}"),
        ("a folded header", "Transfer-Encoding:\r\n chunked", f"0\r\n\r\n{inner}"),
        ("a control character", "Transfer-Encoding: \x0bchunked", f"0\r\n\r\n{inner}"),
        ("a negative chunk", "Transfer-Encoding: chunked", f"-1\r\n{inner}"),
        ("a huge chunk", "Transfer-Encoding: chunked", f"fffffffffffffffff\r\n{inner}"),
        ("a chunk ended by LF", "Transfer-Encoding: chunked", f"0\n\n{inner}"),
        ("a chunk with 0x", "Transfer-Encoding: chunked", f"0x0\r\n\r\n{inner}"),
        ("an endless extension", "Transfer-Encoding: chunked", "5;" + "a" * 100_000),
        ("endless trailers", "Transfer-Encoding: chunked", "0\r\n" + "a: b\r\n" * 50_000),
        ("a null in a header", "X: a\0b", inner),
        ("endless headers", "X: " + "a" * 200_000, ""),
        ("many headers", "\r\n".join(f"X-{i}: a" for i in range(5_000)), ""),
    ):
        start = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: Bearer {_KEY}\r\n"
        data = f"{start}{headers}\r\n\r\n{body}".encode("latin-1")
        yield Attack(kind, name, partial(_answered, data, (0, 400, 413, 431)))


# -- what is not asked over HTTP -----------------------------------------------------------------------------------


class _Evil:
    """Unpickled, it would make the marker."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


class _Frame(msgspec.Struct):
    id: int


def _pickle_as_frame(scene: Scene) -> str | None:
    evil = pickle.dumps(_Evil(scene.marker))
    for data in (evil, len(evil).to_bytes(4, "little") + evil):
        with contextlib.suppress(msgspec.MsgspecError):
            frames = FrameReader(_Frame).feed(data)
            if frames:
                return "a pickle became a frame"
    return None


def _pickle_on_the_socket(scene: Scene) -> str | None:
    return _answered(pickle.dumps(_Evil(scene.marker)), (0, 400), scene)


def _constant_time(scene: Scene) -> str | None:
    tree = ast.parse(inspect.getsource(keys))
    calls = {
        node.func.attr for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare) and "key" in ast.unparse(node)]
    return None if "compare_digest" in calls and not compared else "keys are not compared in constant time"


def _collision(scene: Scene) -> str | None:
    """Two prompts of one key: the tokens are compared as well, so that a collision would be a miss."""
    pool = BlockPool(2)
    pool.publish(pool.take(), b"the same key", (1, 2))
    if pool.find(b"the same key", (3, 4)) is not None:
        return "a colliding key gives another prompt's block"
    if next_key(first_key("a"), (1, 2)) == next_key(first_key("b"), (1, 2)):
        return "the salt does not matter"
    salts = {
        Terms(realm="a").salt("b/c"),
        Terms(realm="a").salt("b"),
        Terms(realm="").salt("b"),
        Terms(realm="b").salt(""),
    }
    if len(salts) != 4 or "/" in api_key("a/b=key").tenant:
        return "salts of two tenants can be equal"
    return None


def _foreign_salt(scene: Scene) -> str | None:
    """Whoever names another tenant's realm as a salt of its own is still alone."""
    body = {
        "prompt": "Once, a whale swam to a far island to see the moon, and there it met a small bird. " * 3,
        "max_tokens": 1,
    }
    with httpx.Client(base_url=scene.url, timeout=60) as client:
        for salt in ("", "x"):
            sent = {**body, "cache_salt": salt} if salt else body
            client.post(_COMPLETIONS, json=sent, headers={"Authorization": f"Bearer {_KEY}"}).raise_for_status()
        for salt in ("a/", "a", "a/x", "/", "x", "", "../a", "a\x00"):
            answer = client.post(
                _COMPLETIONS, json={**body, "cache_salt": salt}, headers={"Authorization": f"Bearer {_OTHER}"}
            )
            if answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]:
                return f"the salt {salt!r} finds another tenant's prompt"
    return None


def _literal(scene: Scene) -> str | None:
    """A message is words, whatever the words are."""
    words = "{{ 7 * 7 }} {% for i in range(9) %}x{% endfor %} {# gone #}"
    with httpx.Client(base_url=scene.url, timeout=60, headers={"Authorization": f"Bearer {_KEY}"}) as client:
        ids = client.post("/tokenize", json={"messages": [{"role": "user", "content": words}]}).json()["tokens"]
        text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    return None if words in text else f"a message was taken for a template: {text!r}"


def _template(source: str, scene: Scene) -> str | None:
    """A checkpoint's template is not trusted either."""
    try:
        text = ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    except (TemplateError, ModelError):
        return None
    return (
        "the sandbox let it out"
        if any(word in text for word in ("module", "class '", "built-in", "root:", "function"))
        else None
    )


def _checkpoint(file: str, data: bytes, scene: Scene) -> str | None:
    """A file of a checkpoint replaced: one clear error, soon, whatever it claims."""
    from orcaserve.model.load import load_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(shutil.copytree(scene.folder, Path(name) / "model"))
        (folder / file).write_bytes(data)
        began = time.monotonic()
        try:
            read_config(folder)
            Tokenizer(folder)
            load_model(folder, backend="native")
        except ModelError as error:
            seconds = time.monotonic() - began
            return None if seconds < _SECONDS and "\n" not in str(error) else f"{seconds:.0f} s: {error}"
    return "it was loaded"


def _header(length: int, text: bytes, rest: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + text + rest


def _apart() -> Iterator[Attack]:
    yield Attack("pickle over sockets", "as a frame", _pickle_as_frame)
    yield Attack("pickle over sockets", "on the client's socket", _pickle_on_the_socket)
    yield Attack("key timing", "comparison", _constant_time)
    yield Attack("prefix cache", "a collision", _collision)
    yield Attack("prefix cache", "another's salt", _foreign_salt)
    yield Attack("template injection", "messages", _literal)
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 10) %}x{% endfor %}",
        "{{ messages.append(1) }}{{ ().__class__ }}",
        "{% set x = messages.pop() %}{{ lipsum.__globals__ }}",
    ):
        yield Attack("a checkpoint's template", source, partial(_template, source))
    files = {
        "a header of 2^63 bytes": ("model.safetensors", _header(2**63, b"{}")),
        "a header beyond the file": ("model.safetensors", _header(10**9, b"{}")),
        "a header of nothing": ("model.safetensors", _header(0, b"")),
        "an empty file": ("model.safetensors", b""),
        "a deep header": ("model.safetensors", _header(100_000, b"[" * 100_000)),
        "a pickle": ("model.safetensors", pickle.dumps({"a": 1})),
        "a zip": ("model.safetensors", b"PK\x03\x04" + bytes(1_000)),
        "a deep config.json": ("config.json", b'{"a":' * 100_000),
        "a config.json of 10^9 layers": ("config.json", b'{"num_hidden_layers": 1000000000, "model_type": "llama"}'),
        "a deep tokenizer.json": ("tokenizer.json", b'{"a":' * 100_000),
        "a tokenizer.json of nothing": ("tokenizer.json", b"{}"),
        "a tokenizer.json in a pickle": ("tokenizer.json", pickle.dumps({})),
        "a tokenizer of huge ids": (
            "tokenizer.json",
            b'{"model":{"type":"BPE","vocab":{"a":99999999999999},"merges":[]}}',
        ),
    }
    overlap = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        }
    ).encode()
    beyond = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    wraps = json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}}).encode()
    files |= {
        "overlapping tensors": ("model.safetensors", _header(len(overlap), overlap, bytes(16))),
        "a tensor beyond the file": ("model.safetensors", _header(len(beyond), beyond)),
        "a shape that overflows": ("model.safetensors", _header(len(wraps), wraps)),
    }
    for name, (file, data) in files.items():
        yield Attack("bombs in checkpoints", name, partial(_checkpoint, file, data))


def attacks() -> list[Attack]:
    return [*_requests(), *_paths(), *_framing(), *_apart()]


# -- the row -------------------------------------------------------------------------------------------------------


def _poisoned(folder: Path, marker: Path) -> Path:
    """The built-in model with code beside it, and names that ask for the code to be run."""
    _, source = find_model(MODEL, lambda done, total: None)
    copy = Path(shutil.copytree(source, folder / "poisoned"))
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "__init__.py"):
        (copy / name).write_text(code)
    for name, classes in (
        ("config.json", {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.T", None]}),
        ("generation_config.json", {"AutoModel": "modeling_evil.M"}),
    ):
        path = copy / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, "auto_map": classes, "custom_generate": "modeling_evil.py"}))
    return copy


class _Ear:
    """A socket that counts who connects. Owner of the socket and its thread."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.num_visitors = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._socket.accept()[0].close()
                self.num_visitors += 1

    def close(self) -> None:
        self._socket.close()


def torture(setup: Setup) -> Iterator[Outcome]:
    wrong: list[str] = []
    kinds: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        marker, ear = Path(name) / "marker", _Ear()
        folder = _poisoned(Path(name), marker)
        options = ("--threads", "1", "--kv-memory", "24MiB", "--api-key", f"a={_KEY}", "--api-key", f"b={_OTHER}")
        with Serving(str(folder), "--served-model-name", MODEL, *options) as serving:
            scene = Scene(serving.url, ear.address, marker, folder)
            for attack in attacks():
                kinds[attack.kind] = kinds.get(attack.kind, 0) + 1

                try:
                    fault = attack.try_it(scene)
                except Exception as error:  # whatever it is, it belongs to this attack
                    fault = f"raises {error!r}"

                if fault is None and marker.exists():
                    fault = "code was run"
                if fault is None and ear.num_visitors:
                    fault = "the server connected to an address of the request"
                if fault is None and serving.process.poll() is not None:
                    fault = "the server has exited"
                if fault is not None:
                    wrong.append(f"{attack.kind}: {attack.name}: {fault}"[:500])
            answer = httpx.post(
                f"{serving.url}{_COMPLETIONS}",
                json={"prompt": "x", "max_tokens": 1},
                headers={"Authorization": f"Bearer {_KEY}"},
                timeout=60,
            )
            if answer.status_code != 200:
                wrong.append(f"afterwards a plain request gets {answer.status_code}")
        ear.close()
    kinds["remote code in checkpoints"] = 1
    figure = f"{sum(kinds.values())} attacks of {len(kinds)} kinds, {len(wrong)} neither refused nor harmless"
    yield Outcome(ROWS[0], figure, not wrong, "", tuple(wrong[:20]))
