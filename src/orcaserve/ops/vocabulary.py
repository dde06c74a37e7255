"""Reductions over the vocabulary, in an order that depends on its size alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_SPAN = 1024  # entries per partial sum


class Logprobs(NamedTuple):
    """Of n tokens, each of a row of its own.

    own: float32 [n]. ranks: int64 [n], from 1. ids, logprobs: int64 and float32 [n, top] of the row's likeliest tokens,
    the likeliest first. Ties go to the lower id.
    """

    own: Tensor
    ranks: Tensor
    ids: Tensor
    logprobs: Tensor


def ordered_sum(rows: Tensor) -> Tensor:
    """Sums of float32 [R, n] as float64 [R]: spans of fixed size, then the spans in order."""
    padded = functional.pad(rows, (0, -rows.shape[1] % _SPAN))
    return padded.view(rows.shape[0], -1, _SPAN).sum(-1).double().cumsum(-1)[:, -1]


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each row of [R, V] (NaN if there is one), and the lowest id that has it."""
    greatest = logits.amax(-1)
    return greatest, (logits == greatest[:, None]).int().argmax(-1)


def likeliest(values: Tensor, k: int) -> Tensor:
    """int64 ids of the k greatest of [V], greatest first, ties to the lower id (torch.topk promises no order)."""
    k = min(k, values.shape[0])
    if k == 0:
        return torch.empty(0, dtype=torch.int64)
    ids = (values >= values.topk(k).values[-1]).nonzero().flatten()
    return ids[values[ids].sort(descending=True, stable=True).indices[:k]]


def logprobs(logits: Tensor, peaks: Tensor, rows: Sequence[int], tokens: Sequence[int], top: int) -> Logprobs:
    """Of token i in row i of `rows`. logits: float32 [R, V]; peaks [R]: the greatest of each row."""
    shifted = logits[list(rows)] - peaks[list(rows)][:, None]
    every = shifted - ordered_sum(shifted.exp()).log()[:, None].float()
    chosen = torch.tensor(tokens, dtype=torch.int64)[:, None]
    own = every.gather(1, chosen)
    earlier = torch.arange(logits.shape[1]) < chosen
    ranks = (every > own).sum(1) + ((every == own) & earlier).sum(1) + 1
    ids = torch.stack([likeliest(row, top) for row in every])
    return Logprobs(own[:, 0], ranks, ids, every.gather(1, ids))
