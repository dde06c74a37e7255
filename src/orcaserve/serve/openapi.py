"""The OpenAPI description, made from the table of endpoints and the types that they read and write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from orcaserve import __version__
from orcaserve.serve.errors import ErrorBody

_REF = "#/components/schemas/{name}"


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method at one path. request: type of its JSON body; response: type of its JSON answer, None: plain text.

    chunk: type of the events of its stream, if it can stream. headers: numbers that it takes there, and what they mean.
    statuses: errors that it may answer with.
    """

    method: str
    path: str
    summary: str
    request: Any = None
    response: Any = None
    chunk: Any = None
    headers: tuple[tuple[str, str], ...] = ()
    statuses: tuple[int, ...] = ()


_REASONS = {
    400: "The request is wrong.",
    401: "An API key is required.",
    404: "There is no such thing.",
    408: "The request's deadline has passed.",
    413: "The request body is too large.",
    429: "Too much is waiting, or a limit is reached.",
    500: "The server or the model failed.",
    503: "The server takes no requests now.",
}


def describe(operations: Sequence[Operation]) -> dict[str, Any]:
    """The document, as plain values."""
    types = [ErrorBody]
    for operation in operations:
        types += [type for type in (operation.request, operation.response, operation.chunk) if type is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = dict(zip(map(id, types), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        described: dict[str, Any] = {
            "summary": operation.summary,
            "operationId": operation.path.strip("/").replace("/", "_").replace("{", "").replace("}", "")
            + f"_{operation.method.lower()}",
            "responses": _responses(operation, by_type),
        }
        if "{id}" in operation.path:
            described["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
        if operation.headers:
            described["parameters"] = [
                {"name": name, "in": "header", "description": text, "schema": {"type": "number", "exclusiveMinimum": 0}}
                for name, text in operation.headers
            ]
        if operation.request is not None:
            described["requestBody"] = {"required": True, "content": _json(by_type[id(operation.request)])}
        paths.setdefault(operation.path, {})[operation.method.lower()] = described
    return {
        "openapi": "3.1.0",
        "info": {"title": "OrcaServe", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _responses(operation: Operation, schemas: dict[int, Any]) -> dict[str, Any]:
    content = {"text/plain": {}} if operation.response is None else _json(schemas[id(operation.response)])
    if operation.chunk is not None:
        content["text/event-stream"] = {"schema": schemas[id(operation.chunk)]}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": content}}
    for status in operation.statuses:
        # Probes answer 503 in the shape of their own; everyone else in the one of errors.
        schema = schemas[id(ErrorBody)]
        responses[str(status)] = {"description": _REASONS[status], "content": _json(schema)}
    return responses


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
