"""From messages to requests of the HTTP API, with the same types and ranges, and from pieces to replies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from orcaserve.core.request import TokenLogprobs
from orcaserve.serve import errors
from orcaserve.serve.choice import Piece
from orcaserve.serve.decode_body import explain
from orcaserve.serve.protocol import ChatRequest, CompletionRequest, Usage
from orcaserve.serve.reply import Part, Reply, Thought
from orcaserve.serve.rpc import shapes

# What the HTTP API's fields are called here.
_GUIDES = ("json_schema", "regex", "grammar", "choice")
_OWN = ("request_id", "text", "token_ids", "chat", *_GUIDES)
NAMES = {
    "structured_outputs.json": "json_schema",
    "structured_outputs.regex": "regex",
    "structured_outputs.grammar": "grammar",
    "structured_outputs.choice": "choice",
    "messages": "chat.messages",
    "prompt": "input",
}


def as_request(message: Any) -> CompletionRequest | ChatRequest:
    """Of a GenerateRequest. Raises ApiError."""
    given = _fields(message)
    body = {name: value for name, value in given.items() if name not in _OWN}
    if guide := message.WhichOneof("guide"):
        value = given[guide].get("options", []) if guide == "choice" else given[guide]
        body["structured_outputs"] = {"json" if guide == "json_schema" else guide: value}
    match message.WhichOneof("input"):
        case "text":
            return _convert({**body, "prompt": message.text}, CompletionRequest)
        case "token_ids":
            return _convert({**body, "prompt": list(message.token_ids.ids)}, CompletionRequest)
        case "chat":
            # An empty content is there all the same: templates expect one.
            messages = [{"content": "", **_fields(said)} for said in message.chat.messages]
            # A conversation has log-probabilities or not, and how many of them apart.
            if "logprobs" in body:
                body["top_logprobs"], body["logprobs"] = body["logprobs"], True
            return _convert({**body, "messages": messages}, ChatRequest)
        case _:
            raise errors.invalid("'text', 'token_ids' or 'chat' is required.", "input", "missing_required_parameter")


def reply_of(index: int, piece: Piece, parser: Reply | None) -> Any:
    """A GenerateReply. parser: of a conversation's choice, which tells reasoning apart."""
    parts: list[Part] = [piece.text]
    if parser is not None:
        parts = parser.feed(piece.text)
        if piece.finish_reason is not None:
            parts += parser.finish()
    return shapes.GenerateReply(
        index=index,
        text="".join(part for part in parts if isinstance(part, str)),
        reasoning="".join(part.text for part in parts if isinstance(part, Thought)),
        token_ids=piece.token_ids,
        logprobs=_logprobs(piece.logprobs),
        prompt_logprobs=_logprobs(piece.prompt_logprobs),
        finish_reason=piece.finish_reason or "",
    )


def usage_of(usage: Usage) -> Any:
    """The GenerateReply that ends a call."""
    return shapes.GenerateReply(
        usage=shapes.Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.prompt_tokens_details.cached_tokens,
        )
    )


def _logprobs(entries: Sequence[TokenLogprobs]) -> list[Any]:
    return [
        shapes.TokenLogprobs(
            token_id=entry.token_id,
            logprob=entry.logprob,
            rank=entry.rank,
            top=[shapes.Alternative(token_id=id, logprob=logprob) for id, logprob in entry.top],
        )
        for entry in entries
    ]


def _fields(message: Any) -> dict[str, Any]:
    """What is set in a message, by name."""
    return {field.name: _plain(value) for field, value in message.ListFields()}


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "ListFields"):
        return _fields(value)
    if hasattr(value, "items"):
        return dict(value.items())
    return [_plain(one) for one in value]


def _convert(body: dict[str, Any], type: Any) -> Any:
    try:
        return msgspec.convert(body, type)
    except msgspec.ValidationError as error:
        raise explain(str(error)).renamed(NAMES) from None
