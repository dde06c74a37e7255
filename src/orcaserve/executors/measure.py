"""`measure`: what it costs to copy a KV block to the swap space, and to compute a token's K and V again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from orcaserve.core.batch import Batch, ScheduledRequest, Swap
from orcaserve.core.config import SwapSpace
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.engine.executor import Pending

TOKENS = 128  # of the prompt that is computed: an iteration of so many is bound by arithmetic, as recomputing is
BLOCKS = 64
ROUNDS = 3  # of which the quickest counts: the first one finds memory that was never touched


class Device(Protocol):
    """An executor that knows no request yet."""

    def submit(self, batch: Batch) -> Pending: ...
    def forget_all(self) -> None: ...


def measure(
    device: Device,
    *,
    num_slots: int,
    num_blocks: int,
    block_size: int,
    max_model_len: int,
    stages: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> SwapSpace | None:
    """None if there is no slot. Overwrites the first blocks of the cache, which nobody has used yet.

    A prompt goes through the stages one after the other, but each is busy with its own share of the layers only;
    copies are made by all at once. So the prompt's seconds are divided by the stages.
    """
    if num_slots == 0:
        return None
    some = tuple(range(min(BLOCKS, num_slots, num_blocks)))
    copies = Batch(step=0, rows=(), swaps=(Swap(True, some, some), Swap(False, some, some)))
    num_tokens = min(TOKENS, num_blocks * block_size, max_model_len)
    blocks = tuple(range(-(-num_tokens // block_size)))
    new = NewRequest(id=0, token_ids=(0,) * num_tokens, num_prompt=num_tokens, max_tokens=1, params=SamplingParams())
    prompt = Batch(step=0, rows=(ScheduledRequest(0, 0, num_tokens, blocks),), new=(new,))

    def seconds(batch: Batch) -> float:
        began = clock()
        device.submit(batch).result()
        return clock() - began

    copying = min(seconds(copies) for _ in range(ROUNDS)) / (2 * len(some))
    computing = min(seconds(prompt) for _ in range(ROUNDS)) / (num_tokens * stages)
    device.forget_all()
    return SwapSpace(num_slots=num_slots, copy_seconds=copying, token_seconds=computing)
