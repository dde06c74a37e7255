"""`DeviceLayout`: where the tokens of one iteration stand, for kernels on a device. What `Layout` is to the CPU's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SPAN = 256  # positions over which attention is summed in one piece, aligned; pieces are merged in their order


@dataclass(frozen=True, eq=False, slots=True)
class DeviceLayout:
    """Tensors on the device, int32, which kernels read and the worker fills in.

    The first `num_decodes` (D) tokens are rows of one token each. The others are those of chunks of prompts, one chunk
    after the other, cut into tiles. Tokens may be there for padding, anywhere among the first D: they have the slot -1,
    so that nothing is stored, and no items.

    positions: [M], each token's place in its request. slots: [M], its place in the KV cache (block * block_size +
    offset), or -1. seats: [M], the row of `tables` of its request.
    tables: [seats, W], the requests' block tables.
    items: [at least first_items[D]], the spans that the decodes attend over: token << 16 | span.
    first_items: [D + 1], where each decode's items begin, and their number; a token's items are in order of the spans.
    tiles: [T, 3], pieces of chunks: (first token, number of tokens, seat). No piece is longer than the kernels' tile.
    """

    positions: Tensor
    slots: Tensor
    seats: Tensor
    tables: Tensor
    block_size: int
    num_decodes: int
    items: Tensor
    first_items: Tensor
    tiles: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.positions.shape[0])
