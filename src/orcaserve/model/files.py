"""Names of the files that a checkpoint's weights lie in."""

from __future__ import annotations

import json
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a checkpoint's weights, as far as they are there; others may lie beside them."""
    try:
        names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        names = [SINGLE]
    return [name for name in names if isinstance(name, str) and (folder / name).is_file()]
