"""`World`: this process among the ranks of one model, over torch.distributed and, on CPUs of one host, shared memory.

It is the data plane: activations only.

Rank r is in stage r // tensor; the ranks of a stage share its layers. Hidden values go from each rank of a stage to the
same one of the next. (Where a switch mixes the planes, batches travel here as well, so that the paper's claim, section
4.1, can be measured.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from orcaserve.parallel.group import Alone, Group, SharedGroup, TorchGroup, can_share

# Whether a peer is alive is seen elsewhere, and at once; here one waits for as long as an iteration may take.
_PATIENCE = timedelta(days=1)
_HOST = torch.device("cpu")


class World:
    """Owner of this process's part in torch.distributed; one in a process.

    device: where tensors are that travel. GPUs exchange them by NCCL, in the order of the device's stream: nothing here
    waits for them then.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        tensor: int,
        pipeline: int,
        device: torch.device = _HOST,
        shared: int | None = None,
    ) -> None:
        """Waits until all tensor * pipeline ranks are here.

        shared: an open file, empty and without a name, that all ranks of this stage have; None if they are on several
        hosts. On a CPU they exchange parts through it; it may be closed afterwards.
        """
        self._rank, self._tensor = rank, tensor
        self._stage, self._stages = rank // tensor, pipeline
        self._device = device
        backend = "gloo" if device.type == "cpu" else "nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=tensor * pipeline, timeout=_PATIENCE)
        # Every rank takes part in making every group.
        groups = [
            dist.new_group(list(range(first, first + tensor)), timeout=_PATIENCE) if tensor > 1 else None
            for first in range(0, tensor * pipeline, tensor)
        ]
        mine = groups[self._stage]
        self._mine = mine
        self.group: Group = Alone()
        if mine is not None and shared is not None and device.type == "cpu" and can_share():
            self.group = SharedGroup(shared, rank % tensor, tensor)
        elif mine is not None:
            self.group = TorchGroup(mine)
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def is_first(self) -> bool:
        return self._stage == 0

    @property
    def is_last(self) -> bool:
        return self._stage == self._stages - 1

    def receive_bytes(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] from the stage before."""
        return self.expect_bytes(num_bytes)()

    def expect_bytes(self, num_bytes: int) -> Callable[[], Tensor]:
        """Makes room for the next of the stage before, which come meanwhile; returns what waits for them."""
        data = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        work = dist.irecv(data, self._rank - self._tensor)

        def arrived() -> Tensor:
            if work is not None:
                work.wait()
            return data

        return arrived

    def send_bytes(self, data: Tensor) -> None:
        """Gives uint8 values to the stage behind, without waiting for it."""
        while self._sent and self._sent[0][0].is_completed():
            self._sent.popleft()
        work = dist.isend(data, self._rank + self._tensor)
        if work is not None:
            self._sent.append((work, data))

    def share_bytes(self, data: Tensor) -> None:
        """From the first rank of the stage to the others, in place."""
        if self._mine is not None:
            dist.broadcast(data, group=self._mine, group_src=0)


class Hidden:
    """Hidden values [ΣL, size] of a dtype, from stage to stage.

    Those that are expected when they are sent come while this rank and the one before compute: Gloo sends nothing until
    its peer has asked for it, and then by a thread which, on a core that computes, waits for its turn. One thread may
    expect while another receives.
    """

    def __init__(self, world: World, size: int, dtype: torch.dtype) -> None:
        self._world, self._size, self._dtype = world, size, dtype
        self._expected: deque[Callable[[], Tensor]] = deque()

    @property
    def is_first(self) -> bool:
        return self._world.is_first

    @property
    def is_last(self) -> bool:
        return self._world.is_last

    def expect(self, num_tokens: int) -> None:
        """The next values from the stage before, which have not been received and are not expected yet."""
        self._expected.append(self._world.expect_bytes(self._num_bytes(num_tokens)))

    def receive(self, num_tokens: int) -> Tensor:
        if not self._expected:
            self.expect(num_tokens)
        data = self._expected.popleft()()
        return data.view(self._dtype).view(num_tokens, self._size)

    def send(self, hidden: Tensor | None, num_tokens: int) -> None:
        if hidden is None or hidden.shape[0] < num_tokens:
            padded = torch.zeros(num_tokens, self._size, dtype=self._dtype)
            if hidden is not None:
                padded[: hidden.shape[0]] = hidden
            hidden = padded
        self._world.send_bytes(hidden.contiguous().view(-1).view(torch.uint8))

    def _num_bytes(self, num_tokens: int) -> int:
        return num_tokens * self._size * self._dtype.itemsize
