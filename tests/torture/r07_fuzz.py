"""R7: requests out of our own description of the API, and raw bytes that are hardly HTTP any more.

The first come from schemathesis where it is installed (the extra `torture`), else from a generator of our own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, NamedTuple

import httpx

from torture.hostile import Answer, Target, address, exchange, is_quiet, post, target, word_from
from torture.http_mutants import Mutant, Mutator, originals
from torture.rows import Outcome, Row, Setup

HAS_NEIGHBOURS = True
ROWS = (Row("R7", "schema cases and raw HTTP mutants, 100 000 of each", "no 5xx, exit, hang, leaked internals"),)
_BOUND = 60.0  # seconds for an answer, or for hanging up once we have
_PATIENCE = 0.4  # seconds that we wait for one who may wait for us
_AT_ONCE = 12
_MOST_FAILURES = 5
_MOST_BYTES = 1 << 22
_LACKING = (404, 501)  # how servers of other makes answer a valid request for what they do not have
# Paths of another make that change what runs, or that it has for models of another kind.
_UNASKED = ("/scale_elastic_ep", "/is_scaling_elastic_ep", "/v1/systemone")
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_LEAKS = re.compile(
    rb'Traceback|File "|\.py\b|site-packages|<class|object at 0x|msgspec|starlette|uvicorn|asyncio|NoneType|Exception'
    rb"|\b\w+Error\b|/home/|/usr/|/tmp/|/root/|/proc/"
)
# What a server tells by design: its name, and kinds of error whose names look like those of exceptions.
_MEANT = re.compile(
    rb'"type": ?"(BadRequest|NotFound|UnprocessableEntity|InternalServer|NotImplemented)Error"|\r\nserver: [^\r]*', re.I
)
_OUR_ERROR = re.compile(rb'"(type|code)": ?"server_error"')
_FEW = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "n": 2}
_ODD = (None, True, -1, 0, 1, 0.5, 1e308, 2**53, 2**64, "", "x", "\x00", "é" * 300, [], {}, [None], [[1]])


class Failure(NamedTuple):
    why: str
    mutant: Mutant


def torture(setup: Setup) -> Iterator[Outcome]:
    with target(setup) as aim:
        before = word_from(aim.url, aim.model)
        known = [one for one in originals(aim.model) if exchange(aim.url, one, _BOUND).status not in _LACKING]
        mutators = Mutator(known, _fields(aim.url))
        cases, by, wrong_cases = _schema_cases(setup, aim)
        mutants, kinds, wrong_mutants = _raw_mutants(setup, aim, mutators)
        failures = wrong_cases + wrong_mutants
        faults = [f"{failure.why}: {failure.mutant.how}: {failure.mutant.data!r}" for failure in failures]
        lives = aim.serving is None or aim.serving.process.poll() is None
        if not lives:
            faults.insert(0, "the server has exited")
        elif not is_quiet(aim.url):
            faults.insert(0, "something still runs")
        elif word_from(aim.url, aim.model) != before:
            faults.insert(0, "it answers otherwise than before")
    statuses = ", ".join(f"{status or 'hung up'} × {number}" for status, number in sorted(kinds.items()))
    figure = (
        f"{cases} schema cases, {by}; {mutants} raw mutants (seed {setup.seed}): "
        f"{len(failures)} failures; the mutants' first answers: {statuses}"
    )
    yield Outcome(ROWS[0], figure, not faults, "" if not faults else faults[0][:200], tuple(faults))


def _fields(url: str) -> dict[str, list[str]]:
    """By path, the names of the fields that our description knows; of a neighbour the common ones."""
    document = _document(url)
    if document is None:
        names = ["temperature", "top_p", "n", "stop", "logprobs", "logit_bias", "seed", "stream", "response_format"]
        return {"/v1/completions": names, "/v1/chat/completions": names}
    found = {}
    for path, operations in document["paths"].items():
        schema = _body_schema(operations.get("post"), document)
        if schema is not None:
            found[path] = list(schema.get("properties", {}))
    return found


def _document(url: str) -> dict[str, Any] | None:
    response = httpx.get(f"{url}/openapi.json", timeout=60)
    document: dict[str, Any] = response.json() if response.status_code == 200 else {}
    return document if "components" in document else None


def _body_schema(operation: Mapping[str, Any] | None, document: Mapping[str, Any]) -> dict[str, Any] | None:
    content = (operation or {}).get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return None
    return _resolved(content["application/json"].get("schema", {}), document)


def _resolved(schema: Any, document: Mapping[str, Any]) -> Any:
    while isinstance(schema, dict) and "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


# -- schema cases --------------------------------------------------------------------------------------------------


def _schema_cases(setup: Setup, aim: Target) -> tuple[int, str, list[Failure]]:
    """How many, whose, and those that failed."""
    count = setup.size("cases", 300, 100_000)
    document = _document(aim.url)
    if document is None:
        return 0, "for lack of a description", []
    done, failures = 0, list[Failure]()
    if (setup.scale == "full" or "cases" in setup.sizes) and find_spec("schemathesis") is not None:
        done, failures = _their_cases(setup, aim, count)
    # Paths without a body soon have no new cases left.
    rest = max(0, count - done)
    by = f"{done} of them by schemathesis" if done else "all by our own generator"
    return done + rest, by, failures + _own_cases(setup, aim, document, rest)


def _own_cases(setup: Setup, aim: Target, document: dict[str, Any], count: int) -> list[Failure]:
    schemas = [
        (path, schema)
        for path, operations in document["paths"].items()
        if (schema := _body_schema(operations.get("post"), document)) is not None and path not in _UNASKED
    ]

    def make(index: int) -> Mutant:
        draw = setup.random("case", index)
        path, schema = schemas[index % len(schemas)]
        body = tamed(_value(draw, schema, document, 0), aim.model)
        return Mutant(f"case {index} of {path}", post(path, json.dumps(body).encode()), True)

    return _try_all(aim.url, make, count, setup.size("tries", 80, 80))[0]


def tamed(body: Any, model: str) -> Any:
    """The same body, for this model and little work: what is legal but long says nothing more, and takes its time."""
    if not isinstance(body, dict):
        return body
    few = {name: most for name, most in _FEW.items() if isinstance(body.get(name), int) and body[name] > most}
    for source, name in (("messages", "max_tokens"), ("input", "max_output_tokens")):
        if source in body and body.get(name) is None and body.get("max_completion_tokens") is None:
            few[name] = _FEW[name]  # else as much as fits
    return {**body, **few, **({"model": model} if isinstance(body.get("model"), str) else {})}


def _value(draw: random.Random, schema: Any, document: Mapping[str, Any], depth: int) -> Any:
    """A value of the schema, mostly: one in twenty is any other."""
    schema = _resolved(schema, document)
    if depth and draw.random() < 0.05:
        return draw.choice(_ODD)
    if not isinstance(schema, dict):
        schema = {}
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return _value(draw, draw.choice(schema[key]), document, depth)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    match schema.get("type"):
        case "object":
            return _object(draw, schema, document, depth)
        case "array":
            least = schema.get("minItems", 0)
            most = min(schema.get("maxItems", 4), least + 3)
            items = schema.get("items", {})
            return [_value(draw, items, document, depth + 1) for _ in range(draw.randint(least, most))]
        case "string":
            least = schema.get("minLength", 0)
            return "".join(draw.choice('ab \n"{}[]é世😀\\0<') for _ in range(draw.randint(least, least + 9)))
        case "integer":
            # Some write large integers as fractions, which 300 more are too few to change.
            low, high = int(schema.get("minimum", -9)), int(schema.get("maximum", 99))
            some = draw.randint(low, max(low, min(high, low + 300)))
            return draw.choice((low, high, some, low - 1, high + 1))
        case "number":
            low, high = schema.get("minimum", schema.get("exclusiveMinimum", -9)), schema.get("maximum", 99)
            return draw.choice((low, high, draw.uniform(low, high), low - 1e-9, high * 1.01))
        case "boolean":
            return draw.random() < 0.5
        case "null":
            return None
    return draw.choice((None, 1, "a", [1, "b"], {"a": {"b": [True]}}, {"type": "string"}, {"type": "object"}))


def _object(draw: random.Random, schema: Mapping[str, Any], document: Mapping[str, Any], depth: int) -> dict[str, Any]:
    properties, required = schema.get("properties", {}), schema.get("required", ())
    share = draw.choice((0.1, 0.3)) if depth == 0 else 0.5
    found = {
        name: _value(draw, inner, document, depth + 1)
        for name, inner in properties.items()
        if (name in required and draw.random() < 0.97) or draw.random() < share
    }
    extra = schema.get("additionalProperties")
    if isinstance(extra, dict):
        for _ in range(draw.randrange(4)):
            found[draw.choice(("5", "a", "", "-1", "399", "7 "))] = _value(draw, extra, document, depth + 1)
    elif draw.random() < 0.05:
        found[draw.choice(("unknown", "suffix", "chat_template", "prompt_embeds"))] = draw.choice((1, "x", None, [1]))
    return found


def _their_cases(setup: Setup, aim: Target, count: int) -> tuple[int, list[Failure]]:
    """By schemathesis, how many came of it: valid cases and wrong ones, from the description alone."""
    import hypothesis
    import schemathesis

    failures: list[Failure] = []
    done = 0
    operations = [found.ok() for found in schemathesis.openapi.from_url(f"{aim.url}/openapi.json").get_all_operations()]
    modes = list(schemathesis.GenerationMode)
    settings = hypothesis.settings(
        max_examples=max(1, count // (len(operations) * len(modes))),
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with httpx.Client(base_url=aim.url, timeout=_BOUND) as client:

        def check(case: Any) -> None:
            nonlocal done
            given = {} if case.method.upper() == "GET" else {"json": tamed(case.body, aim.model)}
            headers = {name: str(value).encode() for name, value in dict(case.headers or {}).items()}
            try:
                response = client.request(case.method, case.formatted_path, headers=headers, **given)
            except (httpx.InvalidURL, httpx.LocalProtocolError, UnicodeError, TypeError, ValueError):
                return  # no client could send it
            done += 1
            raw = b"HTTP/1.1 %d x\r\n\r\n" % response.status_code + response.content
            why = wrong_with(Answer(response.status_code, raw, 0.0))
            assert why is None, f"{why}: {case.method} {case.formatted_path} {json.dumps(given)[:1_000]}"

        for operation, mode in itertools.product(operations, modes):
            test = hypothesis.given(case=operation.as_strategy(generation_mode=mode))(lambda case: check(case))
            with contextlib.suppress(hypothesis.errors.Unsatisfiable):
                try:
                    settings(hypothesis.seed(setup.seed)(test))()
                except (AssertionError, httpx.HTTPError) as error:
                    how = f"{operation.method.upper()} {operation.path}: {' '.join(getattr(error, '__notes__', ()))}"
                    failures.append(Failure(f"schemathesis: {error}"[:1_500], Mutant(how[:2_000], b"", True)))
    return done, failures


# -- raw mutants ---------------------------------------------------------------------------------------------------


def _raw_mutants(setup: Setup, aim: Target, mutator: Mutator) -> tuple[int, dict[int, int], list[Failure]]:
    count = setup.size("mutants", 500, 100_000)
    tries = setup.size("tries", 80, 80)
    failures, kinds = _try_all(aim.url, lambda index: mutator.make(setup.random("mutant", index)), count, tries)
    return sum(kinds.values()), kinds, failures


def _try_all(url: str, make: Callable[[int], Mutant], count: int, tries: int) -> tuple[list[Failure], dict[int, int]]:
    """The first few that failed, made smaller in so many tries each; and how often each status was the first one."""
    failures: list[Failure] = []
    kinds: dict[int, int] = {}

    def attempt(index: int) -> tuple[Mutant, str | None, int]:
        mutant = make(index)
        try:
            answer = provoke(url, mutant)
        except OSError as error:
            return mutant, f"cannot connect: {error.strerror}", 0
        return mutant, wrong_with(answer), answer.status

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for first in range(0, count, 1_000):
            for mutant, why, status in pool.map(attempt, range(first, min(count, first + 1_000))):
                kinds[status] = kinds.get(status, 0) + 1
                if why is not None and len(failures) < _MOST_FAILURES:
                    failures.append(Failure(why, smaller(url, mutant, why, tries)))
            if len(failures) >= _MOST_FAILURES:
                break
    return failures, kinds


def provoke(url: str, mutant: Mutant, patience: float = _PATIENCE) -> Answer:
    """Sends it, and reads until the end. Who waits for more of what is no whole request sees us hang up, and must too.

    Status -1: it did not answer, or did not hang up.
    """
    began = time.monotonic()
    heard = b""
    has_ended = False
    with socket.create_connection(address(url), timeout=_BOUND) as connection:
        try:
            connection.settimeout(_BOUND if mutant.is_whole else patience)
            connection.sendall(mutant.data)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass  # it may refuse before all is said
        while not has_ended and len(heard) < _MOST_BYTES:
            try:
                part = connection.recv(1 << 16)
            except TimeoutError:
                if connection.gettimeout() == _BOUND:
                    return Answer(-1, heard, time.monotonic() - began)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(_BOUND)
                continue
            except ConnectionResetError:
                break
            heard += part
            has_ended = not part
    found = STATUS.match(heard)
    return Answer(int(found[1]) if found else 0, heard, time.monotonic() - began)


def wrong_with(answer: Answer) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if answer.status < 0:
        return "hangs"
    statuses = [int(status) for status in STATUS.findall(answer.text)]
    if any(status >= 500 for status in statuses):
        return f"answers {max(statuses)}: {answer.text[-200:]!r}"
    if _OUR_ERROR.search(answer.text):
        return f"a stream ends in our error: {answer.text[-200:]!r}"
    if any(status >= 400 for status in statuses) and (leak := _LEAKS.search(_MEANT.sub(b"", answer.text))):
        return f"tells of our insides: {leak[0]!r} in {answer.text[-200:]!r}"
    return None


def smaller(url: str, mutant: Mutant, why: str, most: int) -> Mutant:
    """The failure with as little as still fails in the same way: pieces are left out, ever smaller ones."""
    kind, data, tries = why.split(":")[0], mutant.data, 0
    size = max(1, len(data) // 2)
    while size and tries < most:
        at = 0
        while at < len(data) and tries < most:
            shorter = data[:at] + data[at + size :]
            tries += 1
            try:
                again = wrong_with(provoke(url, mutant._replace(data=shorter, is_whole=False)))
            except OSError:
                again = None
            if again is not None and again.split(":")[0] == kind:
                data = shorter
            else:
                at += size
        size //= 2
    return mutant._replace(data=data)
