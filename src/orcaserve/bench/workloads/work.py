"""A work, and the file that keeps one: JSON lines that any version reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

Kind = Literal["decode", "trace", "poisson", "load"]
# Below lie the special tokens of many vocabularies; a prompt of them is no prompt.
LOWEST_ID = 100

DrawIds = Callable[[int], tuple[int, ...]]


class Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request: when it is due (seconds after the work begins), its prompt, how many tokens it generates.

    tenant: on whose behalf, if on anybody's. priority, deadline: as in NewRequest.
    """

    at: float
    prompt_ids: tuple[int, ...]
    max_tokens: int
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None


class Work(msgspec.Struct, frozen=True):
    """Requests in the order in which they are due, and what kind of work they are."""

    name: str
    kind: Kind
    items: tuple[Item, ...]

    @property
    def shares_prompts(self) -> bool:
        """Whether two requests begin alike, so that a prefix cache has something to find."""
        return len({item.prompt_ids[:16] for item in self.items}) < len(self.items)


def save(work: Work, path: Path, *, ids: bool = True) -> None:
    """Writes JSON lines: one with name and kind, then one per request; without ids only how long each prompt is."""
    lines = [{"name": work.name, "kind": work.kind}, *(item if ids else _Line.of(item) for item in work.items)]
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def load(path: Path, draw_ids: DrawIds | None = None) -> Work:
    """Reads what `save` wrote, or somebody wrote alike; draw_ids makes the prompts of lines that have none.

    ValueError says after how many requests a line is none. Requests need not stand in the order in which they are due.
    """
    items: list[Item] = []
    head, *lines = path.read_bytes().splitlines() or [b""]
    try:
        work = msgspec.json.decode(head, type=_Head)
        for line in lines:
            items.append(msgspec.json.decode(line, type=_Line).item(draw_ids))
    except ValueError as error:
        raise ValueError(f"{path} is no saved workload: after {len(items)} requests, {error}") from None
    return Work(work.name, work.kind, tuple(sorted(items, key=lambda item: item.at)))


class _Head(msgspec.Struct):
    name: str
    kind: Kind


class _Line(msgspec.Struct, omit_defaults=True):
    at: float
    max_tokens: int
    prompt_ids: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None

    @classmethod
    def of(cls, item: Item) -> _Line:
        return cls(
            item.at,
            item.max_tokens,
            prompt_tokens=len(item.prompt_ids),
            tenant=item.tenant,
            priority=item.priority,
            deadline=item.deadline,
        )

    def item(self, draw_ids: DrawIds | None) -> Item:
        ids = self.prompt_ids
        if ids is None and self.prompt_tokens is not None and draw_ids is not None:
            ids = draw_ids(self.prompt_tokens)
        if not ids:
            raise ValueError("a request needs prompt_ids, or prompt_tokens from 1 where ids can be drawn")
        if self.at < 0 or self.max_tokens < 1:
            raise ValueError("a request is due at 0 seconds or later, and generates a token or more")
        return Item(self.at, ids, self.max_tokens, self.tenant, self.priority, self.deadline)
