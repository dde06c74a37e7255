"""Raw HTTP requests and what can be done to them: every mutant follows from a random generator alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torture.hostile import head, post


class Mutant(NamedTuple):
    """how: what was done. is_whole: a complete HTTP request, which has to be answered."""

    how: str
    data: bytes
    is_whole: bool


def originals(model: str) -> list[bytes]:
    """Valid requests, small ones."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a whale?"}]
    few = {"model": model, "max_tokens": 2, "temperature": 0.5, "seed": 7}
    bodies: list[tuple[str, dict[str, object]]] = [
        ("/v1/completions", {**few, "prompt": "Once there was", "logprobs": 2, "stop": ["!"]}),
        ("/v1/completions", {**few, "prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {**few, "prompt": [5, 6, 7], "echo": True, "logit_bias": {"5": -1.5}, "n": 2}),
        ("/v1/completions", {**few, "prompt": "x", "guided_regex": "[ab]+c"}),
        ("/v1/chat/completions", {**few, "messages": turns, "top_p": 0.9, "presence_penalty": 0.5}),
        ("/v1/chat/completions", {**few, "messages": turns, "stream": True, "logprobs": True, "top_logprobs": 3}),
        ("/v1/chat/completions", {**few, "messages": turns, "response_format": {"type": "json_object"}}),
        ("/v1/responses", {"model": model, "input": "Hello", "max_output_tokens": 2, "metadata": {"a": "b"}}),
        ("/v1/embeddings", {"model": model, "input": ["a whale", "the sea"], "dimensions": 8}),
        ("/tokenize", {"model": model, "prompt": "Grüße, 世界"}),
        ("/detokenize", {"model": model, "tokens": [5, 6, 7]}),
    ]
    found = [post(path, json.dumps(body).encode()) for path, body in bodies]
    found += [
        head(path, 0, method="GET") for path in ("/health", "/v1/models", "/metrics", "/version", "/openapi.json")
    ]
    return found


VALUES: tuple[bytes, ...] = (
    *(b"null", b"true", b"false", b"0", b"-1", b"1", b"0.5", b"-0.0", b"1e308", b"1e999", b"-1e999", b"5e-324"),
    *(b"NaN", b"Infinity", b"-Infinity", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775809"),
    *(b"2147483647", b"2147483648", b"4294967296", b"1" * 400, b"0." + b"1" * 400, b"01", b"+1", b".5", b"1.", b"0x10"),
    *(b'""', b'"1"', b'"x"', b'"NaN"', b'"\\u0000"', b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff\xfe"', b'"\x00"'),
    *(b'"' + b"x" * 70_000 + b'"', b'"{{ 7 * 7 }}"', b'"../../etc/passwd"', b'"%s%n"', b'"\xe2\x80\xae"', b'"\n"'),
    *(b"[]", b"{}", b"[[]]", b"[null]", b"[true]", b"[-1]", b"[1e9]", b"[[[[[[1]]]]]]", b'["x", 1, null, {}]'),
    *(b'{"a": 1}', b'{"": null}', b'{"type": "json_schema"}', b'{"-1": 5}', b'{"5": "x"}', b'{"1e3": NaN}'),
    *(b"[" * 5_000 + b"]" * 5_000, b'{"a":' * 5_000 + b"1" + b"}" * 5_000, b"[" * 5_000, b"[" + b"0," * 5_000 + b"0]"),
    *(b'{"a": 1, "a": 2}', b"[1,]", b"{,}", b"'x'", b"undefined", b"//", b'"\\x41"', b'"', b"}", b"]]]", b""),
)

_HEADERS: tuple[bytes, ...] = (
    *(
        b"Content-Length: -1",
        b"Content-Length: +5",
        b"Content-Length: 0x10",
        b"Content-Length: 1e3",
        b"Content-Length:",
    ),
    *(b"Content-Length: 99999999999999999999", b"Content-Length: 5, 6", b"Content-Length: 5", b"content-length : 3"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked, identity"),
    *(b"Transfer-Encoding : chunked", b"Transfer-Encoding:\x0bchunked", b"Transfer-Encoding: identity"),
    *(b"Expect: 100-continue", b"Expect: 200-never", b"Upgrade: websocket\r\nConnection: Upgrade", b"Upgrade: h2c"),
    *(
        b"Host: elsewhere",
        b"Host: a\r\nHost: b",
        b"X: a\r\n folded",
        b"X: a\x00b",
        b"X\x00Y: a",
        b": nameless",
        b"colonless",
    ),
    *(b"Content-Encoding: gzip", b"Content-Type: text/plain", b"Content-Type: application/json; charset=utf-16"),
    *(b"Authorization: Bearer \xff\xfe", b"Authorization:", b"X-Request-Id: a\tb", b"X-Slo-Ttft-Ms: nan"),
    *(b"X-Slo-Ttft-Ms: -1", b"X-Slo-Ttft-Ms: 1e400", b"X-Slo-Ttft-Ms: \xd9\xa1", b"Range: bytes=0-99999999999"),
    *(b"X: " + b"a" * 70_000, b"\r\n".join(b"X-%d: a" % i for i in range(500)), b"\xff\xfe: \xff", b"Cookie: =;=;="),
    *(
        b"X-Original-URL: /page/cancel",
        b"X-Forwarded-For: 127.0.0.1",
        b"Connection: keep-alive, close, x",
        b"TE: trailers",
    ),
)

_TARGETS: tuple[bytes, ...] = (
    *(b"//v1/models", b"/v1/../v1/models", b"/%2e%2e/etc/passwd", b"/v1/models/%00", b"/v1/models/\xff", b"*", b"?"),
    *(b"http://elsewhere/v1/models", b"/v1/models#a", b"/" + b"a" * 70_000, b"/v1/models/" + b"%" * 50, b"/\x00"),
    *(
        b"/trace?a=%ff",
        b"/page/events?after=1e9&life=%00",
        b"/page/compare?policy=../x",
        b"/page/compare?policy=%ff%fe",
    ),
    *(b"/page/events?after=%d9%a1", b"/health?" + b"a=b&" * 1_000, b"/docs/..%2f..", b"/page/cancel", b"//", b"/."),
)

_LINES: tuple[bytes, ...] = (
    *(
        b"GET / HTTP/1.0",
        b"GET /health HTTP/9.9",
        b"GET /health",
        b"POST /health HTTP/1.1",
        b"PRI * HTTP/2.0",
        b"\r\n\r\n",
    ),
    *(
        b"BREW / HTTP/1.1",
        b"get /health HTTP/1.1",
        b"CONNECT a:1 HTTP/1.1",
        b"OPTIONS * HTTP/1.1",
        b"\x16\x03\x01\x02\x00",
    ),
    *(
        b"HEAD /v1/models HTTP/1.1",
        b"DELETE /v1/completions HTTP/1.1",
        b"GET  /health HTTP/1.1",
        b"GET\t/health HTTP/1.1",
    ),
)


_LAST_CHUNKS = (b"0\r\n\r\n", b"0\r\nX: a\r\n\r\n", b"0\r\n", b"", b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
_BROKEN_CHUNKS = (
    *(b"", b"", b"-1\r\n", b"FFFFFFFFFFFFFFFFF\r\n", b"5;" + b"a" * 9_000 + b"\r\n", b"0x5\r\n", b"5\n", b"\r\n"),
    *(b"g\r\n", b"5 \r\n", b"7fffffff\r\n"),
)


class Mutator:
    """valid: the requests to change. fields: by path, the names that a body may have there."""

    def __init__(self, valid: Sequence[bytes], fields: Mapping[str, Sequence[str]]) -> None:
        self._originals = list(valid)
        self._fields = {path: list(names) for path, names in fields.items() if names}
        self._kinds: tuple[Callable[[random.Random], Mutant], ...] = (
            self._bytes,
            self._bytes,
            self._field,
            self._field,
            self._field,
            self._header,
            self._line,
            self._chunks,
            self._smuggled,
            self._cut,
        )

    def make(self, draw: random.Random) -> Mutant:
        return draw.choice(self._kinds)(draw)

    def _bytes(self, draw: random.Random) -> Mutant:
        data = bytearray(draw.choice(self._originals))
        for _ in range(draw.choice((1, 1, 2, 4, 16))):
            at = draw.randrange(len(data) + 1)
            match draw.randrange(5):
                case 0 if at < len(data):
                    data[at] = draw.randrange(256)
                case 1:
                    data[at:at] = draw.randbytes(draw.choice((1, 2, 8)))
                case 2:
                    del data[at : at + draw.choice((1, 2, 8, 64))]
                case 3:
                    data[at:at] = data[at : at + draw.choice((1, 8, 64))]
                case _:
                    data[at:at] = draw.choice((b"\r\n", b"\x00", b"\xff", b'"', b"{", b"\\u", b"\r", b"\n", b"%", b","))
        return Mutant("bytes", bytes(data), False)

    def _field(self, draw: random.Random) -> Mutant:
        """A value of another type or range, for any field, or somewhere within one; sometimes for several."""
        while not (original := draw.choice(self._originals)).startswith(b"POST"):
            pass
        before, _, body = original.partition(b"\r\n\r\n")
        path = before.split(b" ")[1].decode()
        fields: dict[str, object] = json.loads(body)
        raw = {name: json.dumps(value).encode() for name, value in fields.items()}
        changed = []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            name = draw.choice([*fields, *self._fields.get(path, ())])
            value = draw.choice(VALUES)
            if draw.random() < 0.2:
                value = draw.choice((b"[%s]", b'{"a": %s}', b'[{"type": %s}]', b'{"schema": %s, "name": "a"}')) % value
            elif draw.random() < 0.2 and (inner := fields.get(name)) and isinstance(inner, (dict, list)):
                value = self._within(draw, inner, value)
            raw[name] = value
            changed.append(name)
        text = b",".join(json.dumps(name).encode() + b":" + value for name, value in raw.items())
        return Mutant(f"fields {', '.join(changed)}", post(path, b"{" + text + b"}"), True)

    def _within(self, draw: random.Random, value: object, new: bytes) -> bytes:
        """The value as JSON, with one of its parts replaced."""
        if isinstance(value, dict) and value:
            at = draw.choice(list(value))
            parts = [
                json.dumps(name).encode()
                + b":"
                + (self._within(draw, one, new) if name == at else json.dumps(one).encode())
                for name, one in value.items()
            ]
            return b"{" + b",".join(parts) + b"}"
        if isinstance(value, list) and value:
            where = draw.randrange(len(value))
            parts = [self._within(draw, one, new) if index == where else _json(one) for index, one in enumerate(value)]
            return b"[" + b",".join(parts) + b"]"
        return new

    def _header(self, draw: random.Random) -> Mutant:
        line, _, rest = draw.choice(self._originals).partition(b"\r\n")
        new = b"\r\n".join(draw.choice(_HEADERS) for _ in range(draw.choice((1, 1, 2))))
        return Mutant("headers", line + b"\r\n" + new + b"\r\n" + rest, False)

    def _line(self, draw: random.Random) -> Mutant:
        line, _, rest = draw.choice(self._originals).partition(b"\r\n")
        if draw.random() < 0.3:
            return Mutant("request line", draw.choice(_LINES) + b"\r\n" + rest, False)
        method, _, version = line.split(b" ")
        return Mutant("target", b" ".join((method, draw.choice(_TARGETS), version)) + b"\r\n" + rest, False)

    def _chunks(self, draw: random.Random) -> Mutant:
        while not (original := draw.choice(self._originals)).startswith(b"POST"):
            pass
        before, _, body = original.partition(b"\r\n\r\n")
        lines = [line for line in before.split(b"\r\n") if not line.startswith(b"Content-Length")]
        data, at = b"", 0
        while at < len(body):
            size = draw.choice((1, 7, 64))
            data += b"%x\r\n%s\r\n" % (len(body[at : at + size]), body[at : at + size])
            at += size
        data += draw.choice(
            (b"0\r\n\r\n", b"0\r\nX: a\r\n\r\n", b"0\r\n", b"", b"0\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
        )
        broken = draw.choice(
            (
                b"",
                b"-1\r\n",
                b"FFFFFFFFFFFFFFFFF\r\n",
                b"5;" + b"a" * 9_000 + b"\r\n",
                b"0x5\r\n",
                b"5\n",
                b"\r\n",
                b"g\r\n",
            )
        )
        at = draw.randrange(len(data) + 1) if broken else 0
        data = data[:at] + broken + data[at:]
        return Mutant("chunks", b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", data]), False)

    def _smuggled(self, draw: random.Random) -> Mutant:
        """Two ideas of where the body ends, and a request in what is between them."""
        before, _, body = draw.choice(self._originals).partition(b"\r\n\r\n")
        inner = head("/version", 0, method="GET")
        coded = draw.choice(
            (b"Transfer-Encoding: chunked", b"Transfer-Encoding:chunked", b"Transfer-Encoding: \tchunked")
        )
        length = b"Content-Length: %d" % draw.choice((0, 1, 4, len(body), len(body) + len(inner)))
        extra = draw.sample((coded, length), draw.choice((1, 2)))
        data = draw.choice((b"0\r\n\r\n" + inner, body + inner, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) + inner))
        return Mutant("smuggled", b"\r\n".join([before, *extra, b"", data]), False)

    def _cut(self, draw: random.Random) -> Mutant:
        data = draw.choice(self._originals)
        return Mutant("cut", data[: draw.randrange(len(data))], False)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
