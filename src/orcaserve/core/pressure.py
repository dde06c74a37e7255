"""What to do when KV memory is short: how much admission leaves free, and whether to swap or to compute again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orcaserve.core.config import SwapSpace
from orcaserve.core.lengths import Lengths
from orcaserve.core.request import Request


def swap_pays(num_lost: int, num_copies: int, space: SwapSpace) -> bool:
    """Whether copying blocks out and back takes less time than computing the K and V of `num_lost` tokens again.

    num_copies: of blocks, both ways together.
    """
    return num_copies * space.copy_seconds < num_lost * space.token_seconds


class Headroom:
    """How many blocks admission leaves free for those that run, since they grow. Owner of the lengths it has seen.

    risk: None leaves a block for each. Else what each is expected to need until its end, so that it needs more with
    this probability (the quantile of lengths at 1 - risk). Who has outgrown that, or of whom nothing is known, has a
    block.
    """

    def __init__(self, risk: float | None, block_size: int) -> None:
        if risk is not None and not 0 < risk < 1:
            raise ValueError(f"the risk of admission is a probability above 0 and below 1, not {risk}")
        self._risk = risk
        self._block_size = block_size
        self._lengths = Lengths()

    def spare(self, running: Sequence[Request], request: Request) -> int:
        """Blocks to leave free if `request` is admitted beside those that run. Sets what it is expected to need."""
        if self._risk is None:
            return len(running)
        request.num_expected = self._expected(request)
        own = max(0, self._blocks(request.num_expected) - self._blocks(request.num_tokens))
        return own + sum(self.left_for(other) for other in running)

    def left_for(self, other: Request) -> int:
        """Blocks that are left free for one that runs."""
        return 1 if self._risk is None else max(1, self._blocks(other.num_expected) - len(other.block_table))

    def ended(self, request: Request) -> None:
        """A request has got all its tokens. One that asked for none says nothing of how many others get."""
        if self._risk is not None and request.new.max_tokens:
            self._lengths.learn(request.new.tenant, request.new.num_prompt, request.num_generated)

    def _expected(self, request: Request) -> int:
        """Tokens of prompt and output together; 0 if nothing is known."""
        new = request.new
        quantile = self._lengths.quantile(new.tenant, new.num_prompt, 1 - (self._risk or 0.0))
        return 0 if quantile is None else new.num_prompt + min(new.max_tokens, math.ceil(quantile))

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)
