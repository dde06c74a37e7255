"""The least time that an iteration can take on a card, from what it must read and multiply. Plain arithmetic."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from orcaserve.sim.cost import Size, size_of
from orcaserve.sim.shape import ModelShape


class Card(msgspec.Struct, frozen=True):
    """What was measured of a card: bytes a second of a copy (read and written) and of reading; FLOPs a second."""

    copy: float
    read: float
    flops: float

    @property
    def bandwidth(self) -> float:
        """The greater of the two."""
        return max(self.copy, self.read)


def moved(shape: ModelShape, size: Size) -> float:
    """Bytes that an iteration reads at least: every weight once, keys and values of what it attends to once.

    Of a mixture the experts that so many tokens are expected to choose, where all are as likely.
    """
    chosen = shape.experts * (1 - (1 - shape.active_experts / shape.experts) ** size.tokens)
    layer = shape.attention_weights + chosen * shape.expert_weights
    weights = shape.layers * layer + (shape.head_weights if size.samples else 0)
    return weights * shape.weight_bits / 8 + shape.kv_bytes_per_token * size.context


def multiplied(shape: ModelShape, size: Size) -> float:
    """FLOPs of an iteration's products; logits are made for rows that sample alone."""
    linear = 2 * shape.layers * shape.active_layer_weights * size.tokens + 2 * shape.head_weights * size.samples
    return linear + 4 * shape.layers * shape.heads * shape.head_dim * size.attended


def least_seconds(card: Card, shape: ModelShape, size: Size) -> float:
    """Of an iteration: reading or multiplying, whichever takes longer."""
    return max(moved(shape, size) / card.bandwidth, multiplied(shape, size) / card.flops)


def least_seconds_of(card: Card, shape: ModelShape, requests: Sequence[tuple[int, int]], most: int) -> float:
    """Of requests (prompt, output) that are all there at once, `most` of them running at a time, first come first.

    A prompt is read whole in the iteration that its request joins, which already gives its first token.
    """
    waiting = deque(requests)
    running: list[tuple[int, int]] = []  # (tokens there are, tokens still to come)
    seconds = 0.0
    while waiting or running:
        rows = [(tokens - 1, 1, True) for tokens, _ in running]
        while waiting and len(running) < most:
            running.append(waiting.popleft())
            rows.append((0, running[-1][0], True))
        seconds += least_seconds(card, shape, size_of(rows))
        running = [(tokens + 1, left - 1) for tokens, left in running if left > 1]
    return seconds
