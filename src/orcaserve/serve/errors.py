"""The catalogue of what can go wrong for a client: every message, status and header, in OpenAI's shape.

Nothing here is built from an exception's own text, a path or an address.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec


class ErrorDetail(msgspec.Struct, frozen=True):
    """type: the kind of error, param: the field it is about, code: a name that programs can rely on."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


class ApiError(Exception):
    """An error on its way to a client. headers: further ones of the response, lower-case."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(ErrorDetail(message, type, param, code))
        self.headers = headers or {}

    def encode(self) -> bytes:
        return msgspec.json.encode(self.body)

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same, said of fields that the client knows by other names: old name → new one."""
        of, old = self.body.error, "|".join(map(re.escape, names))
        message = re.sub(rf"'({old})(?=['.\[])", lambda found: f"'{names[found[1]]}", of.message)
        param = of.param and re.sub(rf"^({old})(?=$|[.\[])", lambda found: names[found[1]], of.param)
        return ApiError(self.status, message, type=of.type, param=param, code=of.code, headers=self.headers)


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Errors from inside speak of the fields that the client has sent, not of those that they were translated to."""
    try:
        yield
    except ApiError as error:
        raise error.renamed(names) from None


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is wrong and will stay so."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, hint: str) -> ApiError:
    return invalid(f"'{param}' is not supported: {hint}", param, "unsupported_parameter")


def context_length(num_prompt: int, max_tokens: int | None, limit: int, param: str) -> ApiError:
    wish = "room for at least one token of output" if max_tokens is None else f"{max_tokens} tokens of output"
    return invalid(
        f"This model's maximum context length is {limit} tokens, but the request needs "
        f"{num_prompt + (max_tokens or 1)}: {num_prompt} in the prompt and {wish}. "
        "Shorten the prompt, or ask for fewer tokens.",
        param,
        "context_length_exceeded",
    )


def prompt_far_too_long(num_characters: int, limit: int, param: str) -> ApiError:
    return invalid(
        f"This model's maximum context length is {limit} tokens, and a prompt of {num_characters} characters "
        "cannot fit in it. Shorten the prompt.",
        param,
        "context_length_exceeded",
    )


def unauthorized() -> ApiError:
    return ApiError(
        401,
        "A valid API key is required: send it as 'Authorization: Bearer KEY'.",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def model_not_found(name: str, served: str) -> ApiError:
    return ApiError(
        404,
        f"The model {_quote(name)} does not exist. This server has '{served}'; /v1/models lists it.",
        param="model",
        code="model_not_found",
    )


def not_found() -> ApiError:
    return ApiError(404, "There is nothing at this path. /openapi.json lists what there is.", code="not_found")


def not_the_operator() -> ApiError:
    """403: it tells of everybody's requests, or ends them."""
    return ApiError(
        403,
        "This takes an API key of the server's operator, whose tenant the server is told with --operator.",
        type="permission_error",
        code="not_the_operator",
    )


def host_not_allowed() -> ApiError:
    """403: whoever can have a name lead here could else read along in a browser."""
    return ApiError(
        403,
        "Without API keys this server answers to an IP address or 'localhost' alone. Call it by one of them, or start "
        "it with an API key, or with the --cors-origin whose host it is.",
        type="permission_error",
        code="host_not_allowed",
    )


def origin_not_allowed() -> ApiError:
    """403: a web page from elsewhere."""
    return ApiError(
        403,
        "Web pages of this origin may not call this server. It lets them in if it is started with --cors-origin.",
        type="permission_error",
        code="origin_not_allowed",
    )


def no_such_request(id: int) -> ApiError:
    return ApiError(404, f"No request {id} is here.", param="id", code="request_not_found")


def nothing_to_compare() -> ApiError:
    """409: not now, but later perhaps."""
    return ApiError(
        409,
        "Too little has been recorded to compare policies by. Send some requests, and wait for their ends.",
        code="too_little_recorded",
        headers={"x-should-retry": "false"},
    )


def busy_comparing() -> ApiError:
    return ApiError(409, "Another comparison, or a trace, is being made.", code="busy", headers={"retry-after": "1"})


def method_not_allowed(allow: str) -> ApiError:
    return ApiError(
        405,
        f"This path does not take this method. It takes: {allow}.",
        code="method_not_allowed",
        headers={"allow": allow},
    )


def body_too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"The request body is larger than {limit} bytes.", code="body_too_large", headers={"connection": "close"}
    )


def body_too_slow() -> ApiError:
    """408: bodies that are on their way take room that others wait for."""
    return ApiError(
        408,
        "The request body did not come in time. Send it at once, and faster.",
        type="timeout_error",
        code="body_too_slow",
        headers={"connection": "close"},
    )


def body_too_complex(what: str, most: int) -> ApiError:
    """413: however short it may be, to parse it would take too long. what: there is too much of, beyond the `most`."""
    return ApiError(
        413,
        f"The request body has more than {most} {what}. Send less in one request, or text in place of token ids.",
        code="body_too_complex",
    )


_REFUSALS = {  # reason → code, message
    "queue_full": ("queue_full", "Too many requests are waiting. Try again later."),
    "tenant_queue_full": (
        "tenant_queue_full",
        "Your requests have their share of the queue. Try again when some of them have begun.",
    ),
    "requests_per_minute": ("rate_limit_exceeded", "You have sent as many requests as you may in a minute."),
    "tokens_per_minute": ("rate_limit_exceeded", "Your requests have as many tokens as they may have in a minute."),
    "deadline_unreachable": (
        "deadline_unreachable",
        "So much is waiting that the response would come after its deadline. Try again later, or allow more time.",
    ),
}


def refused(reason: str, retry_after: float | None) -> ApiError:
    """429. reason: a key of the catalogue; retry_after: seconds."""
    code, message = _REFUSALS[reason]
    return ApiError(429, message, type="rate_limit_error", code=code, headers=_retry(retry_after))


_CUT_OFF = {  # code → status, message, seconds after which one may ask again
    "deadline_passed": (
        408,
        "The deadline passed while the request was waiting; nothing of it has been computed.",
        None,
    ),
    "timeout": (408, "The request's 'timeout' passed before the response was complete.", None),
    "cancelled": (410, "The request was cancelled by its server's operator.", None),
    "draining": (503, "The server shut down before the response was complete.", 1.0),
    "failed": (503, "The engine failed before the response was complete, and could not be started again.", None),
    "other_profile": (
        503,
        "The engine came back with other numerics before the response was complete. Ask again for a new one.",
        1.0,
    ),
}
_CUT_OFF_TYPES = {408: "timeout_error", 410: "cancelled_error", 503: "server_error"}


def cut_off(code: str) -> ApiError:
    """408 and 410: nobody wants the response any more. 503: it may be asked for again. code: a key of the catalogue."""
    status, message, retry_after = _CUT_OFF[code]
    return ApiError(
        status,
        message,
        type=_CUT_OFF_TYPES[status],
        param="timeout" if status == 408 else None,
        code=code,
        headers=_retry(retry_after),
    )


_UNAVAILABLE = {
    "loading": "The model is still being loaded. Try again soon.",
    "draining": "The server is shutting down and takes no more requests.",
    "failed": "The engine has failed and could not be started again.",
    "stuck": "The engine makes no progress.",
}


def unavailable(reason: str, retry_after: float | None) -> ApiError:
    """503. reason: a key of the catalogue; retry_after: seconds, None: waiting will not help."""
    return ApiError(
        503,
        _UNAVAILABLE.get(reason, "The server takes no requests now."),
        type="server_error",
        code=reason,
        headers=_retry(retry_after),
    )


def response_too_large(most: int) -> ApiError:
    """400: it would be so again. most: bytes of memory that one response may take which is kept until it is whole."""
    return invalid(
        f"The response takes more than the {most} bytes of memory that one may take which is no stream. Ask for a "
        "stream, limit its tokens, or ask for fewer log-probabilities, choices or inputs at a time.",
        code="response_too_large",
    )


def generation_failed(message: str) -> ApiError:
    """500: the model, or we, failed this request. message: the engine's words, which are fit for clients."""
    return ApiError(500, message, type="server_error", code="generation_failed", headers={"x-should-retry": "false"})


def grammar_failed(message: str) -> ApiError:
    """400: what the response was to follow has proved too hard to follow, as it would again. message: the engine's."""
    return invalid(message, code="invalid_grammar")


def internal() -> ApiError:
    return ApiError(500, "The server made a mistake. Its log says more.", type="server_error", code="internal_error")


def _retry(seconds: float | None) -> dict[str, str]:
    if seconds is None:
        return {"x-should-retry": "false"}
    return {
        "retry-after": str(max(1, math.ceil(seconds))),
        "retry-after-ms": str(max(1, math.ceil(seconds * 1000))),
        "x-should-retry": "true",
    }


def _quote(text: str, most: int = 100) -> str:
    return repr(text if len(text) <= most else text[:most] + "…")
