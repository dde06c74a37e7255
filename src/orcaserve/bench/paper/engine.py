"""What an experiment is given: an engine with its model loaded, and a way to schedule on it."""

from __future__ import annotations

from typing import Protocol

import msgspec

from orcaserve.bench.client import BenchError
from orcaserve.core.batch import Batch
from orcaserve.core.config import SwapSpace
from orcaserve.core.policy import DEFAULT, ORCA, STATIC, Policy
from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.executor import Pending

BATCH_TOKENS = 512  # tokens of an iteration where prompts are cut, as in EngineOptions


class Device(Protocol):
    """An executor that runs a batch while it is submitted, and serves one scheduler after the other."""

    def submit(self, batch: Batch) -> Pending: ...

    def forget_all(self) -> None:
        """Forgets every request, since a new scheduler knows of none."""
        ...


class Engine(msgspec.Struct, frozen=True, kw_only=True):
    """A loaded model. bytes_per_token: what one token takes of the KV cache. Lengths are in tokens.

    swap: room for KV outside of the cache, if there is any.
    overlap: iterations are scheduled while the one before runs, where the policy allows it.
    """

    device: Device
    model: str
    architecture: str
    dtype: str
    profile: str
    weight_bytes: int
    bytes_per_token: int
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    threads: int
    swap: SwapSpace | None = None
    overlap: bool = False

    @property
    def num_slots(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """One way to schedule. slots: tokens of KV memory that may be used; None: all.

    batch_tokens: tokens of an iteration, where the policy cuts prompts.
    depth: batches in flight.
    swap: whether KV is moved to the engine's swap space when the memory is full.
    max_tokens: what every request declares as its longest output, while it ends at its own length, of which the
        scheduler knows nothing; None: each declares its own length.
    """

    name: str
    policy: Policy
    max_batch_size: int
    slots: int | None = None
    batch_tokens: int = BATCH_TOKENS
    depth: int = 1
    swap: bool = False
    max_tokens: int | None = None

    def config(self, engine: Engine) -> SchedulerConfig:
        """Raises BenchError if the engine has less KV memory than this setup is to use."""
        num_blocks = engine.num_blocks if self.slots is None else self.slots // engine.block_size
        if num_blocks > engine.num_blocks:
            raise BenchError(
                f"{self.name} is to use KV memory for {self.slots} tokens, but the machine has room for "
                f"{engine.num_slots} beside this model: take a smaller one"
            )
        overlap = engine.overlap and self.depth == 1 and not self.policy.request_level
        return SchedulerConfig(
            policy=self.policy,
            max_batch_size=self.max_batch_size,
            max_batch_tokens=max(self.batch_tokens, self.max_batch_size),
            num_blocks=num_blocks,
            block_size=engine.block_size,
            depth=2 if overlap else self.depth,
            overlap=overlap,
            swap=engine.swap if self.swap else None,
        )


def static(size: int) -> Setup:
    """Request-level batching, at most `size` requests at a time."""
    return Setup(name=f"static({size})", policy=STATIC, max_batch_size=size)


def orca(size: int) -> Setup:
    """Algorithm 1 of the paper."""
    return Setup(name=f"orca({size})", policy=ORCA, max_batch_size=size)


def default(size: int) -> Setup:
    """What OrcaServe does unless told otherwise, but for the limit on the time between two tokens that serving has.

    It is a limit for readers, and off in all other setups: with it a ratio would be of two things at once.
    """
    return Setup(name=f"default({size})", policy=DEFAULT, max_batch_size=size)
