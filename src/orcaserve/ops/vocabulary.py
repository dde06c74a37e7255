"""Reductions over the vocabulary, in an order that depends on its size alone."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

_SPAN = 1024  # entries per partial sum


def ordered_sum(rows: Tensor) -> Tensor:
    """Sums of float32 [R, n] as float64 [R]: spans of fixed size, then the spans in order."""
    padded = functional.pad(rows, (0, -rows.shape[1] % _SPAN))
    return padded.view(rows.shape[0], -1, _SPAN).sum(-1).double().cumsum(-1)[:, -1]


def peaks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each row of [R, V] (NaN if there is one), and the lowest id that has it."""
    greatest = logits.amax(-1)
    return greatest, (logits == greatest[:, None]).int().argmax(-1)


def masses(logits: Tensor, greatest: Tensor) -> Tensor:
    """float64 [R]: the sums of e ** (logit - greatest)."""
    return ordered_sum((logits - greatest[:, None]).exp())
