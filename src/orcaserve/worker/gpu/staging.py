"""`Sections`: what the host tells the device about one iteration, side by side in one piece of memory: one copy."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from orcaserve.ops.gpu.pieces import FIELDS

_OF_SAMPLES = (
    "bases",
    "sample_rows",
    "sample_seats",
    "sample_positions",
    "temperatures",
    "top_k",
    "top_p",
    "min_p",
)


def _aligned(length: int) -> int:
    """Kernels are compiled anew for pointers that are not on a boundary of 16 bytes: there are none."""
    return -(-length // 4) * 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """tokens: of the iteration. samples: rows that get a token. updates: block tables' entries that are new.

    tiles: pieces of attention's work.
    """

    tokens: int
    samples: int
    updates: int
    tiles: int

    @property
    def total(self) -> int:
        """int32 values."""
        return _aligned(2 * self.samples) + sum(_aligned(length) for _, length in self.lengths())

    def have_room_for(self, other: Sizes) -> bool:
        return (
            other.tokens <= self.tokens
            and other.samples <= self.samples
            and other.updates <= self.updates
            and other.tiles <= self.tiles
        )

    def lengths(self) -> list[tuple[str, int]]:
        """The sections behind `bases`, in the order in which they lie; the one that may be cut short is the last."""
        tokens, samples = self.tokens, self.samples
        return [
            ("ids", tokens),
            ("seats", tokens),
            ("starts", tokens),
            ("sample_rows", samples),
            ("sample_seats", samples),
            ("sample_positions", samples),
            ("temperatures", samples),
            ("top_k", samples),
            ("top_p", samples),
            ("min_p", samples),
            ("num_updates", 1),
            ("updates", 3 * self.updates),
            ("num_tiles", 1),
            ("tiles", FIELDS * self.tiles),
        ]


class HostSections(SimpleNamespace):
    """The same as arrays of numpy, over the same memory."""


@dataclass(frozen=True, eq=False, slots=True)
class Sections:
    """Views of int32 [total], on the host or the device; int32 unless said otherwise.

    ids: [tokens], or -1 for the token that the seat drew last. seats: [tokens], -1 for padding. starts: [tokens].
    bases: int64 [samples], keys of the noise. sample_rows: [samples], tokens whose hidden values give them.
    sample_seats: [samples], -1 for padding. sample_positions: [samples], of the tokens that are drawn.
    temperatures, top_p, min_p: float32 [samples]. top_k: [samples].
    num_updates: [1]; updates: [updates, 3] of (seat, place in its table, block).
    num_tiles: [1]; tiles: [tiles, FIELDS]: as DeviceLayout has them.
    """

    bases: Tensor
    ids: Tensor
    seats: Tensor
    starts: Tensor
    sample_rows: Tensor
    sample_seats: Tensor
    sample_positions: Tensor
    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    num_updates: Tensor
    updates: Tensor
    num_tiles: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, flat: Tensor, sizes: Sizes) -> Sections:
        """flat: at least `sizes.total` values, on a boundary of 16 bytes, as all parts are then."""
        parts = {"bases": flat[: 2 * sizes.samples].view(torch.int64)}
        at = _aligned(2 * sizes.samples)
        for name, length in sizes.lengths():
            parts[name] = flat[at : at + length]
            at += _aligned(length)
        for name in ("temperatures", "top_p", "min_p"):
            parts[name] = parts[name].view(torch.float32)
        parts["updates"] = parts["updates"].view(-1, 3)
        parts["tiles"] = parts["tiles"].view(-1, FIELDS)
        return cls(**parts)

    def with_samples(self, count: int) -> Sections:
        """The same with the first `count` of the rows that get a token."""
        return replace(self, **{name: getattr(self, name)[:count] for name in _OF_SAMPLES})

    def on_host(self) -> HostSections:
        return HostSections(**{field.name: getattr(self, field.name).numpy() for field in fields(self)})
