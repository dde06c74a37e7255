"""What decides the draw of one row, and the draw in torch's operators: the slow twin of the native one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from orcaserve.ops.noise import HIGHEST, LOWEST, noise
from orcaserve.ops.vocabulary import likeliest, ordered_sum

_FEW = 2048  # most likely tokens to look at before a whole vocabulary is sorted for top_p


def _no_ids() -> np.ndarray:
    return np.empty(0, dtype=np.int64)


def _no_scores() -> np.ndarray:
    return np.empty(0, dtype=np.float32)


@dataclass(frozen=True, eq=False, slots=True)
class Draw:
    """row: of the logits. key: of the noise. temperature: 0 is greedy. top_k: 0 is off.

    ids, scores: ascending int64 ids within the vocabulary, and float32 scores that stand there instead of the logits.
    allowed: uint32 [ceil(V / 32)], a bit for each token, the first one's the lowest, set if it may be drawn; None: all.
    """

    row: int
    key: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    ids: np.ndarray = field(default_factory=_no_ids)
    scores: np.ndarray = field(default_factory=_no_scores)
    allowed: np.ndarray | None = None


def draw(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    return [_draw(logits[one.row], one) for one in draws]


def _draw(logits: Tensor, one: Draw) -> int | None:
    scores = logits
    if one.ids.shape[0]:
        scores = logits.index_copy(0, torch.from_numpy(one.ids), torch.from_numpy(one.scores))
    if one.allowed is not None:
        bits = np.unpackbits(one.allowed.view(np.uint8), count=logits.shape[0], bitorder="little")
        scores = scores.masked_fill(torch.from_numpy(bits == 0), -torch.inf)
    peak = scores.amax()
    if not bool(peak.isfinite()):
        return None
    if one.temperature == 0.0:
        return int((scores == peak).nonzero()[0])
    # the peak becomes 0, so that no temperature, however small, overflows
    scaled = (scores - peak) / one.temperature
    ids = _allowed(scaled, one)
    noisy = scaled[ids].double() + noise(one.key, ids)
    return int(ids[noisy == noisy.amax()].amin())


def _allowed(scaled: Tensor, one: Draw) -> Tensor:
    """int64 ids that may be drawn, from scaled logits [V] whose greatest is 0."""
    if one.top_k:
        ids = likeliest(scaled, one.top_k)
        if one.top_p < 1.0:
            ids = _reaching(scaled[ids], ids, one.top_p * float(scaled[ids].exp().double().cumsum(0)[-1]))
    elif one.top_p < 1.0:
        ids = _nucleus(scaled, one.top_p)
    else:
        ids = (scaled >= LOWEST - HIGHEST).nonzero().flatten()  # what lies below cannot win, whatever its noise
    if one.min_p > 0.0:
        ids = ids[scaled[ids] >= math.log(one.min_p)]
    return ids


def _nucleus(scaled: Tensor, top_p: float) -> Tensor:
    """int64 ids of the fewest likeliest tokens whose share of the mass reaches top_p, likeliest first."""
    wanted = top_p * float(ordered_sum(scaled.exp()[None]))
    few = likeliest(scaled, _FEW)
    found = _reaching(scaled[few], few, wanted)
    if found.shape[0] < few.shape[0]:
        return found
    every = likeliest(scaled, scaled.shape[0])
    return _reaching(scaled[every], every, wanted)


def _reaching(sorted_scaled: Tensor, ids: Tensor, wanted: float) -> Tensor:
    """The ids up to and including the one that makes the running sum of masses reach `wanted`; one at least."""
    reached = sorted_scaled.exp().double().cumsum(0)
    return ids[: int((reached < wanted).sum()) + 1]
