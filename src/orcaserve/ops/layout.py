"""`Layout`: where the tokens of one iteration stand: in the concatenated batch, in their requests, in the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One request's part of an iteration: its positions [start, start + num_tokens).

    first: index of its first token among all tokens of the iteration.
    blocks: int64 [at least ceil((start + num_tokens) / block_size)], the request's block table.
    """

    first: int
    num_tokens: int
    start: int
    blocks: Tensor

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """One iteration, described for the ops that know where a request ends. Built once and read by every layer.

    positions: int64 [ΣL], each token's place in its request.
    slots: int64 [ΣL], each token's place in the KV cache: block * block_size + offset.
    """

    positions: Tensor
    slots: Tensor
    rows: tuple[Row, ...]
    block_size: int
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, parts: Sequence[tuple[int, int, Tensor | Sequence[int]]], block_size: int) -> Layout:
        """From (start, num_tokens, block table) of each request, in the order in which their tokens stand."""
        rows: list[Row] = []
        first = 0
        for start, num_tokens, blocks in parts:
            table = blocks if isinstance(blocks, Tensor) else torch.tensor(blocks, dtype=torch.int64)
            row = Row(first, num_tokens, start, table)
            if table.shape[0] * block_size < row.end:
                raise ValueError(f"{table.shape[0]} blocks of {block_size} cannot hold {row.end} tokens")
            rows.append(row)
            first += num_tokens
        if rows:
            positions = torch.cat([torch.arange(row.start, row.end) for row in rows])
            blocks_of = torch.cat([row.blocks[torch.arange(row.start, row.end) // block_size] for row in rows])
            slots = blocks_of * block_size + positions % block_size
        else:
            positions = slots = torch.empty(0, dtype=torch.int64)
        return cls(positions, slots, tuple(rows), block_size)

    @property
    def num_tokens(self) -> int:
        return int(self.positions.shape[0])

    @property
    def last_position(self) -> int:
        """The greatest position; -1 if there is none."""
        return max((row.end for row in self.rows), default=0) - 1

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), computed once per key: index tensors that every layer of the iteration shares."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]
