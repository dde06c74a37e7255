"""`DeviceLayout`: where the tokens of one iteration stand, for kernels on a device. What `Layout` is to the CPU's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SPAN = 256  # positions over which attention is summed in one piece, aligned; pieces are merged in their order


@dataclass(frozen=True, eq=False, slots=True)
class DeviceLayout:
    """Tensors on the device, int32, which kernels read and the worker fills in.

    The tokens of a request lie side by side, in order. Tokens may be there for padding, anywhere: they have the slot
    -1, so that nothing is stored, and no tile.

    positions: [M], each token's place in its request. slots: [M], its place in the KV cache (block * block_size +
    offset), or -1. seats: [M], the row of `tables` of its request.
    tables: [seats, W], the requests' block tables.
    tiles: [T, 8], of which the first num_tiles [1] count: pieces of the work of attention. Each is (first token, number
    of tokens, position of the first, seat, first span, behind the last span, shares, states). Usually a tile has all
    the spans that its tokens see, and `shares` is 1. Else it is one of so many tiles of one token, and `states` is
    where the states of that token's spans begin in the scratch.
    """

    positions: Tensor
    slots: Tensor
    seats: Tensor
    tables: Tensor
    block_size: int
    tiles: Tensor
    num_tiles: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.positions.shape[0])
