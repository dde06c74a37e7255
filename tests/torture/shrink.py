"""Fewer things that still fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def shrink(items: Sequence[T], fails: Callable[[Sequence[T]], bool], tries: int) -> list[T]:
    """The items without parts that can be left out, larger parts first; asks `fails` at most so many times."""
    left, parts = list(items), 2
    while len(left) > 1 and tries > 0:
        size = math.ceil(len(left) / parts)
        for begin in range(0, len(left), size):
            if tries == 0:
                break
            tries -= 1
            fewer = left[:begin] + left[begin + size :]
            if fails(fewer):
                left, parts = fewer, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(2 * parts, len(left))
    return left
