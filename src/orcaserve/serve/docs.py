"""`render`: the OpenAPI description as one page of plain HTML, which needs no script and nothing from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 1rem; }
code { font-size: 0.95em; } table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: 0.15rem 1rem 0.15rem 0; border-bottom: 1px solid #8883; }
p.note { white-space: pre-line; }
:root { color-scheme: light dark; }
"""


def render(document: dict[str, Any]) -> bytes:
    """document: an OpenAPI description as `openapi.describe` makes it."""
    schemas = document["components"]["schemas"]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(document['info']['title'])}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>",
        '<p>For programs: <a href="/openapi.json">/openapi.json</a>.</p>',
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>")
            body = operation.get("requestBody")
            if body is not None:
                parts += _table("Request", _resolve(body["content"]["application/json"]["schema"], schemas))
            content = operation["responses"]["200"]["content"]
            if "application/json" in content:
                parts += _table("Response", _resolve(content["application/json"]["schema"], schemas))
    parts.append("</body></html>")
    return "".join(parts).encode()


def _table(title: str, schema: dict[str, Any]) -> list[str]:
    """A type's fields, one per row."""
    note = schema.get("description", "")
    required = schema.get("required", [])
    rows = [f"<h3>{title}</h3><p class=note>{escape(note)}</p><table>"]
    for name, field in schema.get("properties", {}).items():
        star = " <b>required</b>" if name in required and title == "Request" else ""
        rows.append(f"<tr><td><code>{escape(name)}</code>{star}</td><td>{escape(_kind(field))}</td></tr>")
    return [*rows, "</table>"]


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return schemas[name] if name else schema


def _kind(field: dict[str, Any]) -> str:
    """A field's type in words, with its range."""
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return repr(field["const"])
    kind = str(field.get("type", "anything"))
    if kind == "array":
        kind = f"list of {_kind(field.get('items', {}))}"
    bounds = [
        f"{sign} {field[key]}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("minItems", "at least"),
            ("maxItems", "at most"),
            ("minLength", "length ≥"),
            ("maxLength", "length ≤"),
        )
        if key in field
    ]
    return f"{kind} ({', '.join(bounds)})" if bounds else kind
