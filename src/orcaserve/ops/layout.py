"""`Layout`: where the tokens of one iteration stand: in the concatenated batch, in their requests, in the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One request's part of an iteration: its positions [start, start + num_tokens).

    first: index of its first token among all tokens of the iteration.
    blocks: int64 array [at least ceil((start + num_tokens) / block_size)], the request's block table.
    """

    first: int
    num_tokens: int
    start: int
    blocks: np.ndarray

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """One iteration, described for the ops that know where a request ends. Built once and read by every layer.

    positions: int64 [ΣL], each token's place in its request.
    slots: int64 [ΣL], each token's place in the KV cache: block * block_size + offset.
    last_position: the greatest of the positions; -1 if there is none.
    """

    positions: Tensor
    slots: Tensor
    rows: tuple[Row, ...]
    block_size: int
    last_position: int
    _memo: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(cls, parts: Sequence[tuple[int, int, np.ndarray | Sequence[int]]], block_size: int) -> Layout:
        """From (start, num_tokens, block table) of each request, in the order in which their tokens stand."""
        rows: list[Row] = []
        # Most rows are of one token: plain integers are quicker than an array for each.
        positions: list[int] = []
        slots: list[int] = []
        for start, num_tokens, blocks in parts:
            table = np.asarray(blocks, dtype=np.int64)
            row = Row(len(positions), num_tokens, start, table)
            if table.shape[0] * block_size < row.end:
                raise ValueError(f"{table.shape[0]} blocks of {block_size} cannot hold {row.end} tokens")
            rows.append(row)
            if num_tokens == 1:
                positions.append(start)
                slots.append(int(table[start // block_size]) * block_size + start % block_size)
            else:
                own = np.arange(start, row.end)
                positions += own.tolist()
                slots += (table[own // block_size] * block_size + own % block_size).tolist()
        last = max((row.end for row in rows), default=0) - 1
        return cls(
            torch.tensor(positions, dtype=torch.int64),
            torch.tensor(slots, dtype=torch.int64),
            tuple(rows),
            block_size,
            last,
        )

    @property
    def num_tokens(self) -> int:
        return int(self.positions.shape[0])

    def derived(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """make(), computed once per key: index tensors that every layer of the iteration shares."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]
