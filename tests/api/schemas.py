"""JSON schemas of rising complexity, by seed. All in them is bounded, so that any choice of tokens comes to an end."""

from __future__ import annotations

import random
from typing import Any


def schema(seed: int, depth: int) -> dict[str, Any]:
    """A schema that nests `depth` objects or arrays at most."""
    return _object(random.Random(seed), depth)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = [f"{rng.choice(['name', 'größe', 'id', 'x y', 'tags'])}{i}" for i in range(rng.randint(1, 2 + depth))]
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": names[: rng.randint(1, len(names))],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = ["string", "pattern", "integer", "boolean", "null", "enum", "const"]
    kind = rng.choice(kinds + ["object", "array", "either"] * 2) if depth > 0 else rng.choice(kinds)
    match kind:
        case "string":
            low = rng.randint(0, 2)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 5)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "^\\d{4}-\\d{2}$", "^(ja|nein)$"])}
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 1000)}
        case "enum":
            return {"enum": rng.sample(["rot", "grün", 7, None, True, 'a"b', "zwei\nzeilen"], 3)}
        case "const":
            return {"const": rng.choice(["fest", 3, False])}
        case "array":
            least = rng.randint(0, 1)
            return {"type": "array", "items": _value(rng, depth - 1), "minItems": least, "maxItems": least + 2}
        case "object":
            return _object(rng, depth)
        case "either":
            return {"anyOf": [_value(rng, depth - 1), _object(rng, depth)]}
        case _:
            return {"type": kind}
