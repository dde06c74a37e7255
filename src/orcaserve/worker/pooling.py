"""A prompt as one vector: its last token's final hidden values, or the mean of all tokens'.

A mean is summed in float32, one token after the other, so that it has the same bits however the prompt was cut into
chunks; what the chunks so far add up to stays with the request.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from orcaserve.worker.requests import Job

FINAL_ROWS = 256  # rows whose final values exist at a time, in float32

NOT_FINITE = "the model produced NaN or infinite values for this request"
INCOMPLETE = "the beginning of the prompt has not been computed with the rest of it"


class HasFinal(Protocol):
    def final(self, hidden: Tensor) -> Tensor: ...


def pool(model: HasFinal, hidden: Tensor, job: Job) -> bytes | str:
    """The vector, float32, with the row that ends the prompt; empty before that, and if none is wanted. Or what failed.

    hidden: [L, H] of the row's tokens. A row may be computed twice: what came before it is kept until the next one.
    """
    new = job.request.new
    match new.params.pooling:
        case None:
            return b""
        case "last":
            at = new.num_prompt - 1 - job.row.start
            if job.end < new.num_prompt or at < 0:
                return b""
            vector = _values(model, hidden[at : at + 1])[0]
        case "mean":
            total = _sum(model, hidden, job)
            if total is None:
                return INCOMPLETE
            if job.end < new.num_prompt:
                return b""
            vector = total / np.float32(new.num_prompt)
    return vector.astype("<f4").tobytes() if np.isfinite(vector).all() else NOT_FINITE


def _sum(model: HasFinal, hidden: Tensor, job: Job) -> np.ndarray | None:
    """float32 [E], of all tokens up to the row's end. None: what came before the row is not known."""
    request, start = job.request, job.row.start
    before = request.sums.get(start)
    if before is None and start > 0:
        return None
    total = None if before is None else before.copy()
    for first in range(0, hidden.shape[0], FINAL_ROWS):
        for values in _values(model, hidden[first : first + FINAL_ROWS]):
            if total is None:
                total = np.zeros_like(values)
            total += values
    kept = {} if before is None else {start: before}
    request.sums = kept if total is None else {**kept, job.end: total}
    return total


def _values(model: HasFinal, hidden: Tensor) -> np.ndarray:
    """float32 [R, E]."""
    return model.final(hidden).float().cpu().numpy()
