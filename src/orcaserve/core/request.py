"""What a client asks for, as frozen values, and `Request`, the scheduler's own record of one such wish."""

from __future__ import annotations

from typing import Literal

import msgspec

from orcaserve.core.timing import Timer, Timing

FinishReason = Literal["stop", "length", "abort", "error"]
Pooling = Literal["mean", "last"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are drawn, and when it ends.

    Values are checked at the door (`orcaserve.serve.protocol`, `orcaserve.llm`); the engine trusts them.

    max_tokens: most tokens to generate. None: as many as the context allows. 0 only scores the prompt.
    min_tokens: end tokens are masked until so many tokens exist.
    temperature: 0 is greedy; else logits are divided by it before noise is added.
    top_k: 0 is off. top_p, min_p: shares of the probability mass in [0, 1] after temperature.
    seed: 64-bit seed of the Gumbel noise; None: one is drawn when the request arrives.
    n: choices of one prompt; each is a request of its own to the engine (`choice`).
    stop: strings that end the text (the frontend's work); stop_token_ids: tokens that end it (the engine's).
    logprobs: number of most likely tokens reported beside the chosen one; None: no log-probabilities.
    prompt_logprobs: the same for every prompt token but the first.
    logit_bias: pairs (token id, addend to its logit).
    grammar: what the response follows, as `orcaserve.worker.grammars` reads it; None: anything goes.
    pooling: the prompt's final hidden values are wanted as one vector: the mean of all tokens', or the last one's.
        Goes with max_tokens 0.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None
    pooling: Pooling | None = None

    @property
    def is_plain(self) -> bool:
        """Whether all that is wanted is tokens, drawn by nothing but temperature, top_k, top_p, min_p and the seed.

        Then a draw needs nothing that the host must know, and the next position can be scheduled while the token before
        it is still on the device.
        """
        return (
            self.grammar is None
            and self.logprobs is None
            and self.prompt_logprobs is None
            and self.pooling is None
            and not self.logit_bias
            and not self.min_tokens
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and self.repetition_penalty == 1.0
        )


class NewRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One choice of one request, described once: from the pool to the scheduler, and from there to the workers.

    id: unique per submission; a resubmission after a crash gets a new one, so nothing stale can be mistaken for it.
    token_ids: the prompt, followed by whatever has been generated so far (after a crash or a preemption).
    num_prompt: how many of `token_ids` are the prompt.
    max_tokens: most tokens to generate, counted from `num_prompt`; resolved (never None).
    end_token_ids: tokens that end the request (the model's end tokens unless ignored, and the stop tokens).
    seed, choice: with the position and the token id they are the whole input of the sampling noise.
    cache_salt: prefix-cache blocks are shared only among requests of the same salt.
    tenant: for whom it is. priority: the lower, the earlier. deadline: seconds from when a scheduler takes it in until
        its first token is due; None: whenever. What these mean is the policy's affair.
    name: what the client knows the request by; it decides nothing.
    timed: every output says where the time went, not only the last: the frontend may end the request, or was asked.
    """

    id: int
    token_ids: tuple[int, ...]
    num_prompt: int
    max_tokens: int
    params: SamplingParams
    seed: int = 0
    choice: int = 0
    end_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    name: str = ""
    timed: bool = False


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, from the model's own distribution before temperature (float32, unrounded).

    top: the most likely tokens as (token id, logprob), likeliest first, ties to the lower id.
    rank: 1 for the likeliest token.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What one request gained from one iteration: scheduler → request pool.

    prompt_logprobs: all of them at once (prompt positions 1 … num_prompt-1), with the output that ends the prefill.
    pooled: the prompt's vector, if it is wanted: float32, little-endian.
    num_cached: prompt tokens that the prefix cache spared, said with the first output.
    error: why `finish_reason` is "error", in words fit for a client.
    timing: where the request's time went, with the last output; with each, if the request is `timed`.
    """

    id: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooled: bytes = b""
    num_cached: int = 0
    finish_reason: FinishReason | None = None
    error: str | None = None
    timing: Timing | None = None


class Request:
    """The scheduler's record of one request. Owned and changed by the Scheduler and its KVCacheManager alone.

    A request has no phase: it catches up. While `num_computed` lags `num_tokens` by more than one it is prefilling.
    """

    __slots__ = (
        "ahead_below",
        "arrival",
        "arrived",
        "block_keys",
        "block_table",
        "end_token_ids",
        "entry",
        "finish_reason",
        "id",
        "is_described",
        "is_plain",
        "key",
        "lane",
        "max_tokens",
        "max_total",
        "new",
        "num_cached",
        "num_computed",
        "num_expected",
        "num_in_flight",
        "num_known_slots",
        "num_published",
        "num_served",
        "prompt_logprobs",
        "quiet_below",
        "swap_slots",
        "timer",
        "token_ids",
        "unsaid",
    )

    def __init__(self, new: NewRequest, arrival: int, arrived: float = 0.0, waited: float = 0.0) -> None:
        self.new = new
        self.id = new.id  # these are asked for in every iteration
        self.max_tokens = new.max_tokens
        self.max_total = new.num_prompt + new.max_tokens  # prompt and output together (the paper's max_tokens)
        self.end_token_ids = new.end_token_ids
        self.is_plain = new.params.is_plain
        self.arrival = arrival  # ordinal
        self.arrived = arrived  # seconds of the scheduler's time
        self.timer = Timer(arrived - waited, len(new.token_ids) - 1 if len(new.token_ids) > new.num_prompt else 0)
        self.lane = ""  # where it waits, and its place there: the order's
        self.key = 0.0
        self.entry = (0.0, 0.0, arrival)  # its place among all when it was let in
        self.token_ids: list[int] = list(new.token_ids)
        self.num_computed = 0  # tokens whose K and V are stored (batches in flight included)
        self.ahead_below = 0  # with fewer known tokens it may be scheduled before it has the next one: the scheduler's
        self.quiet_below = 0  # rows that start below this, and their results, are one more token each: the scheduler's
        self.block_table: list[int] = []
        self.swap_slots: list[int] = []  # where the blocks of its computed tokens are, while it is swapped out
        self.block_keys: list[bytes] = []  # prefix-cache keys of the full blocks, as far as they have been needed
        self.is_described = False  # to the workers
        self.unsaid: tuple[int, ...] = ()  # tokens that it got since, and that they have not been told
        self.num_known_slots = 0  # KV slots of those blocks that the workers have been told
        self.num_cached: int | None = None  # None until first admitted; 0 once told
        self.num_expected = 0  # tokens of prompt and output that admission counts on; 0: nothing is known
        self.num_published = 0  # full blocks that the prefix cache knows
        # Tokens computed, or found in the cache, for the first time: a recomputed one counts once. Only for orders that
        # ask for it.
        self.num_served = 0
        self.num_in_flight = 0  # batches in flight that carry it: several only in chunks of a prompt, or ahead
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if new.params.prompt_logprobs is not None else None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.new.num_prompt

    @property
    def needs_every_token(self) -> bool:
        """Whether it wants something of each token of its prompt, so that none may be found in a cache."""
        return self.prompt_logprobs is not None or self.new.params.pooling == "mean"

    @property
    def lag(self) -> int:
        """Tokens that exist but whose K and V are not stored: 1 while decoding, more while prefilling.

        Less than 0 while the token that it is ahead of is not known.
        """
        return len(self.token_ids) - self.num_computed

    @property
    def due(self) -> int:
        """Tokens of it that a batch can compute now: those that lag, or else the one that is still on the device."""
        known = len(self.token_ids)
        return (known - self.num_computed) or int(known < self.ahead_below)

    def describe(self) -> NewRequest:
        """The request as workers need it: with the tokens generated so far, if it has run before."""
        if self.num_generated == len(self.new.token_ids) - self.new.num_prompt:
            return self.new
        return msgspec.structs.replace(self.new, token_ids=tuple(self.token_ids))
