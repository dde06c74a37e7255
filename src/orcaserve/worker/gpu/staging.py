"""`Sections`: what the host tells the device about one iteration, side by side in one piece of memory: one copy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch
from torch import Tensor


def _aligned(length: int) -> int:
    """Kernels are compiled anew for pointers that are not on a boundary of 16 bytes: there are none."""
    return -(-length // 4) * 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """tokens: of the iteration, `decodes` of which are rows of one token. samples: rows that get a token.

    tiles: pieces of chunks. updates: block tables' entries that are new. items: spans that decodes attend over.
    """

    tokens: int
    decodes: int
    samples: int
    tiles: int
    updates: int
    items: int

    @property
    def total(self) -> int:
        """int32 values."""
        return _aligned(2 * self.samples) + sum(_aligned(length) for _, length in self.lengths())

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
            ("first_items", self.decodes + 1),
            ("tiles", 3 * self.tiles),
            ("num_updates", 1),
            ("updates", 3 * self.updates),
            ("items", self.items),
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
    first_items: [decodes + 1]; tiles: [tiles, 3]; items: [items]: as DeviceLayout has them.
    num_updates: [1]; updates: [updates, 3] of (seat, place in its table, block).
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
    first_items: Tensor
    tiles: Tensor
    num_updates: Tensor
    updates: Tensor
    items: Tensor

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
        for name in ("tiles", "updates"):
            parts[name] = parts[name].view(-1, 3)
        return cls(**parts)

    def on_host(self) -> HostSections:
        return HostSections(**{field.name: getattr(self, field.name).numpy() for field in fields(self)})
