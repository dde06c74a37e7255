"""Whether something grows: least squares, over a run or over the lives of what was started anew on the way."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
Points = Sequence[tuple[float, float]]


def slope(lives: Sequence[Points]) -> float | None:
    """The common slope of all lives, each from a level of its own; None if there is nothing to tell it from."""
    centred = []
    for points in lives:
        if len(points) > 1:
            middle = [statistics.fmean(axis) for axis in zip(*points, strict=True)]
            centred += [(x - middle[0], y - middle[1]) for x, y in points]
    if len({x for x, _ in centred}) < 2:
        return None
    return statistics.linear_regression(*zip(*centred, strict=True)).slope


def settled(points: Sequence[T], share: float) -> Sequence[T]:
    """Without so much of their beginning."""
    return points[int(len(points) * share) :]


def ends(points: Points) -> tuple[float, float]:
    """The medians of the first and the last quarter."""
    quarter = max(1, len(points) // 4)
    return statistics.median(y for _, y in points[:quarter]), statistics.median(y for _, y in points[-quarter:])
