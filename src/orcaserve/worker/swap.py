"""`Swapper`: a rank's room for KV blocks outside of its cache, in memory or a file, and the copies to it and back."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from orcaserve.core.batch import Swap
from orcaserve.core.config import ModelError
from orcaserve.ops.kernels import KVCache


class Swapper:
    """Owner of `num_slots` slots, each with the bytes of a KV block of all of a rank's layers.

    Blocks travel as bytes, so that what comes back is what went.
    """

    def __init__(self, caches: Sequence[KVCache], num_slots: int, folder: str | None = None) -> None:
        """folder: where a file without a name holds the slots; None: memory does, from when it is written to.

        Raises ModelError, in one line, if the file cannot be made.
        """
        self._caches = tuple(caches)  # whose memory the parts are
        parts = [part for cache in caches for part in cache.block_bytes()]
        size = sum(part.shape[1] for part in parts)
        space = _memory(num_slots, size) if folder is None else _file(num_slots, size, Path(folder))
        self._parts = list(zip(parts, space.split([part.shape[1] for part in parts], dim=1), strict=True))

    def run(self, swaps: Sequence[Swap]) -> None:
        """Makes the copies in their order. IndexError for a block or slot that there is not."""
        for swap in swaps:
            slots = torch.tensor(swap.slots)
            for inside, outside in self._parts:
                blocks = torch.tensor(swap.blocks, device=inside.device)
                if swap.out:
                    outside.index_copy_(0, slots, inside.index_select(0, blocks).to(outside.device))
                else:
                    inside.index_copy_(0, blocks, outside.index_select(0, slots).to(inside.device))


def _memory(num_slots: int, size: int) -> Tensor:
    return torch.empty((num_slots, size), dtype=torch.uint8)


def _file(num_slots: int, size: int, folder: Path) -> Tensor:
    """Its space is taken at once: a disk that is full later would end the process in the middle of a copy."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_slots * size)
            data = mmap.mmap(file.fileno(), num_slots * size)
    except OSError as error:
        raise ModelError(
            f"the swap space of {num_slots * size} bytes cannot be made in {folder}: {error.strerror}"
        ) from error
    return torch.frombuffer(data, dtype=torch.uint8).view(num_slots, size)
