"""`without_remarks`: a JSON schema without what asks for nothing, so that no compiler stumbles over it."""

from __future__ import annotations

from typing import Any

_NO_SHAPE = ("password", "binary")  # formats of OpenAPI that any text has
_SCHEMAS = {
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "oneOf",
    "prefixItems",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
}
_NAMED = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}


def without_remarks(schema: dict[str, Any]) -> dict[str, Any]:
    """The same constraints without `uniqueItems: false` and formats that every text has, however deep; a copy.

    What stands in enums, constants, defaults and examples, or is a property's name, is no part of a schema.
    """
    whole: list[Any] = [schema]
    places: list[tuple[Any, Any]] = [(whole, 0)]
    while places:
        holder, key = places.pop()
        one = holder[key]
        if isinstance(one, list):
            holder[key] = copy = list(one)
            places += [(copy, i) for i in range(len(copy))]
        elif isinstance(one, dict):
            holder[key] = kept = {word: value for word, value in one.items() if not _is_remark(word, value)}
            for word, value in kept.items():
                if word in _SCHEMAS:
                    places.append((kept, word))
                elif word in _NAMED and isinstance(value, dict):
                    kept[word] = named = dict(value)
                    places += [(named, name) for name in named]
    result: dict[str, Any] = whole[0]
    return result


def _is_remark(word: str, value: Any) -> bool:
    return (word == "uniqueItems" and value is False) or (word == "format" and value in _NO_SHAPE)
