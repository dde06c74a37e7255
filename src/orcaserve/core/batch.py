"""`Batch`, the control message of one iteration, and `StepResult`, what comes back from it. Frozen values."""

from __future__ import annotations

import msgspec

from orcaserve.core.request import NewRequest, TokenLogprobs


class ScheduledRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One row of a batch: compute the positions [start, start + num_tokens) of request `id`.

    new_blocks: blocks to append to the request's block table before this iteration.
    token_ids: tokens to append to the request's tokens before this iteration: those that were generated since it was
        described (a worker that is not the last stage cannot know them; so nobody has to). Each is told once, in order.
    samples: whether the row's last position yields a new token.

    Where start + num_tokens is one more than the tokens that a request has by now, the row is *ahead*: it has this one
    position, whose token is what the worker sampled for the request in the batch before, and still has on the device.
    That token is told with the request's next row, like any other; so what a worker was told lags by one, and it never
    sees a token twice. Only requests whose sampling `is_plain` go ahead, and never by more than one.
    """

    id: int
    start: int
    num_tokens: int
    new_blocks: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    samples: bool = False


class Swap(msgspec.Struct, frozen=True, array_like=True):
    """Copies of whole KV blocks: blocks[i] to slots[i] of the swap space (`out`), or back from there.

    Every rank copies its own layers and heads of them.
    """

    out: bool
    blocks: tuple[int, ...]
    slots: tuple[int, ...]


class Batch(msgspec.Struct, frozen=True):
    """One iteration. There is no prefill batch and no decode batch: rows of any length and phase travel together.

    swaps: copies to make, one after the other, before anything is computed: what one of them frees the next may fill.
    freed: requests that workers forget before they look at `new` (finished, aborted or preempted; a preempted one
        is described again in `new` when it comes back).
    new: requests described for the first time since they were last freed; each of them has a row.
    """

    step: int
    rows: tuple[ScheduledRequest, ...]
    new: tuple[NewRequest, ...] = ()
    freed: tuple[int, ...] = ()
    swaps: tuple[Swap, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum([row.num_tokens for row in self.rows])


class RowResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What one row gave. `token_id` is None where the row does not sample.

    prompt_logprobs: for requests that ask for them, those of the prompt positions start + 1 … start + num_tokens that
        exist in the prompt.
    pooled: of a request that wants its prompt as one vector, with the row that ends the prompt: float32, little-endian.
    error: the row failed (NaN, exception); the request ends, the others go on.
    """

    id: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooled: bytes = b""
    error: str | None = None


class StepResult(msgspec.Struct, frozen=True):
    """The results of a batch, one per row and in its order."""

    rows: tuple[RowResult, ...]
