"""`has_own_head`: whether a checkpoint that says it is tied brings another output matrix all the same."""

from __future__ import annotations

import json
from pathlib import Path

from orcaserve.model.files import INDEX, SINGLE

_MOST_HEADER = 1 << 27  # bytes; the library takes no longer one


def has_own_head(folder: Path, embed: str, head: str) -> bool:
    """Whether the files hold both tensors, with different values: then transformers does not tie them, either.

    Both are read if they are there, as seldom happens: a copy is left out when a checkpoint is saved. What is wrong
    with the files is for whoever loads them to say: False.
    """
    try:
        index = folder / INDEX
        if index.exists():
            listed = json.loads(index.read_bytes())["weight_map"]
        else:
            listed = dict.fromkeys(_names(folder / SINGLE), SINGLE)
        first, second = (_stored(name, listed) for name in (embed, head))
        if first is None or second is None:
            return False
        return not _are_equal(folder / Path(listed[first]).name, first, folder / Path(listed[second]).name, second)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False


def _names(path: Path) -> list[str]:
    """Of a safetensors file's tensors, without the library: eight bytes say how long the header is, which is JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return list(json.loads(file.read(min(length, _MOST_HEADER))))


def _stored(name: str, listed: dict[str, str]) -> str | None:
    """Checkpoints saved from the bare body of the model lack the first part of every name."""
    return next((one for one in (name, name.partition(".")[2]) if one in listed), None)


def _are_equal(one: Path, name: str, other: Path, other_name: str) -> bool:
    # seldom needed, and not to be imported by who only wants to know what a model is
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
            return torch.equal(first.get_tensor(name), second.get_tensor(other_name))
    except SafetensorError as error:
        raise ValueError(str(error)) from error
