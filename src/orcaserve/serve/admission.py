"""`Admission`: what is taken in: bounds of the queue, whole and per tenant, rates, and deadlines that can be kept.

Owner of the counts of what waits, of the tenants' buckets, and of what has been learnt of pace and lengths. It has no
clock and no loop: the pool calls it, with the time.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from orcaserve.core.backlog import Ahead, Backlog
from orcaserve.core.lengths import Lengths
from orcaserve.core.request import SamplingParams
from orcaserve.core.slack import Slack
from orcaserve.core.token_bucket import TokenBucket
from orcaserve.serve.resume import Choice
from orcaserve.serve.terms import Terms

RETRY_SECONDS = (1.0, 120.0)
UNKNOWN_OUTPUT = 128.0  # tokens that a request is expected to generate while nothing is known of its like
IN_TIME = 0.98  # of those who are let in with little time to spare are to have their first token in time
MOST_SLACK = 3.0
_SLACK_STEP = 0.05
_FEW_TENANTS = 64


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may wait for its first iteration, and how much a tenant may ask for in a minute.

    max_queue_requests, max_queue_tokens: choices, and their prompt tokens. Past either a request is refused, unless
        nothing waits at all.
    tenant_queue_share: part of both that one tenant may have; requests of nobody in particular are under none.
    tenant_requests_per_minute, tenant_tokens_per_minute: of each tenant, a minute's worth at once. Tokens are those of
        prompts and outputs. None: as many as it likes.
    """

    max_queue_requests: int = 1024
    max_queue_tokens: int = 1 << 20
    tenant_queue_share: float = 0.5
    tenant_requests_per_minute: float | None = None
    tenant_tokens_per_minute: float | None = None


class NotTaken(Exception):
    """A request is not taken in now. retry_after: seconds; None: never."""

    def __init__(self, reason: str, retry_after: float | None) -> None:
        super().__init__(f"the request is not taken: {reason}")
        self.reason = reason
        self.retry_after = retry_after


class Refused(NotTaken):
    """There is too much, of this tenant or of all. reason: a key of `errors.refused`."""


class Unavailable(NotTaken):
    """Nobody's is. reason: "loading", "draining" or "failed"."""


class ContextLengthError(ValueError):
    """The request cannot fit. num_prompt, max_tokens: what it asks for; max_model_len: what there is, in tokens."""

    def __init__(self, num_prompt: int, max_tokens: int | None, max_model_len: int) -> None:
        wish = "at least one output token" if max_tokens is None else f"max_tokens {max_tokens}"
        super().__init__(
            f"a prompt of {num_prompt} tokens and {wish} exceed the context length of {max_model_len} tokens"
        )
        self.num_prompt = num_prompt
        self.max_tokens = max_tokens
        self.max_model_len = max_model_len


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for, as far as is known: a part of it is refused only if the whole would be, too.

    tenant: None if it is not known yet. num_choices, and waiting_tokens: the prompt tokens of all choices.
    prompt_tokens: each prompt once. longest_prompt, output_tokens: of its longest choice, in tokens, as expected.
    """

    tenant: str | None = None
    num_choices: int = 1
    waiting_tokens: int = 0
    prompt_tokens: int = 0
    longest_prompt: int = 0
    output_tokens: float = 0
    first_by: float | None = None
    end_by: float | None = None


class Waiting(msgspec.Struct):
    """Choices that wait for their first iteration, and their prompt tokens."""

    requests: int = 0
    tokens: int = 0

    def add(self, requests: int, tokens: int) -> None:
        self.requests += requests
        self.tokens += tokens


class Admission:
    """max_batch_size, max_batch_tokens: of each engine."""

    def __init__(self, limits: Limits, max_batch_size: int, max_batch_tokens: int) -> None:
        self._limits = limits
        self.waiting = Waiting()
        self._by_tenant: dict[str, Waiting] = {}
        self._buckets: dict[str, tuple[TokenBucket | None, TokenBucket | None]] = {}
        self._most_buckets = _FEW_TENANTS
        self._backlog = Backlog(max_batch_size, max_batch_tokens)
        self._lengths = Lengths()
        self._slack = Slack(IN_TIME, MOST_SLACK, _SLACK_STEP)
        self._num_engines = 1
        self._num_present = 0  # choices; the sums of `Ahead` over them, of all engines
        self._prompt_tokens = 0
        self._output_tokens = 0.0
        self._kv_tokens = 0.0

    # -- deciding ------------------------------------------------------------------------------------------------

    def check(self, claim: Claim, now: float) -> None:
        """Raises Refused if a request that asks for so much, or more, would not be taken in now. Changes nothing."""
        self._check_queue(claim)
        self._check_tenant(claim, now)
        self._check_deadlines(claim, now)

    def admit(self, terms: Terms, prompts: Sequence[tuple[Sequence[int], SamplingParams]], now: float) -> None:
        """Takes a request in, all of it, or raises Refused. Its choices `arrive` next.

        prompts: their tokens, and parameters whose max_tokens are resolved.
        """
        claim = Claim(
            tenant=terms.tenant,
            num_choices=sum(params.n for _, params in prompts),
            waiting_tokens=sum(len(ids) * params.n for ids, params in prompts),
            prompt_tokens=sum(len(ids) for ids, _ in prompts),
            longest_prompt=max(len(ids) for ids, _ in prompts),
            output_tokens=max(self.expected(terms.tenant, len(ids), params) for ids, params in prompts),
            first_by=terms.first_by,
            end_by=terms.end_by,
        )
        self.check(claim, now)
        requests, tokens = self._buckets_of(terms.tenant)
        if requests is not None:
            requests.take(1, now)
        if tokens is not None:
            tokens.take(claim.prompt_tokens, now)
        self._forget_full(now)

    def expected(self, tenant: str, num_prompt: int, params: SamplingParams) -> float:
        """Tokens that a choice should generate."""
        most = params.max_tokens or 0
        if params.ignore_eos and not params.stop and not params.stop_token_ids:
            return most
        known = self._lengths.expected(tenant, num_prompt)
        return min(most, UNKNOWN_OUTPUT if known is None else known)

    def _check_queue(self, claim: Claim) -> None:
        limits, waiting = self._limits, self.waiting
        if waiting.requests and not _fits(claim, waiting, limits.max_queue_requests, limits.max_queue_tokens):
            raise Refused("queue_full", self._retry_after())
        share = limits.tenant_queue_share
        own = self._by_tenant.get(claim.tenant or "")
        if own is None or not claim.tenant or share >= 1:
            return
        if not _fits(claim, own, share * limits.max_queue_requests, share * limits.max_queue_tokens):
            raise Refused("tenant_queue_full", self._retry_after())

    def _check_tenant(self, claim: Claim, now: float) -> None:
        if claim.tenant is None or claim.tenant not in self._buckets:
            return  # not known, or full buckets, which give whatever is asked
        requests, tokens = self._buckets[claim.tenant]
        if requests is not None and (wait := requests.has_since(1) - now) > 0:
            raise Refused("requests_per_minute", wait)
        if tokens is not None and (wait := tokens.has_since(claim.prompt_tokens) - now) > 0:
            raise Refused("tokens_per_minute", wait)

    def _check_deadlines(self, claim: Claim, now: float) -> None:
        if self._num_present == 0 or (claim.first_by is None and claim.end_by is None):
            return  # a server that has nothing else to do tries: what it believes of its pace may be wrong
        ahead, late = self._ahead(), 0.0
        if claim.first_by is not None:
            wait = self._backlog.until_first_token(ahead, claim.longest_prompt)
            late = now + self._slack.value * wait - claim.first_by
        if claim.end_by is not None:
            end = now + self._backlog.until_end(ahead, claim.longest_prompt, claim.output_tokens)
            late = max(late, end - claim.end_by)
        if late > 0:
            raise Refused("deadline_unreachable", _clamped(late))

    def _retry_after(self) -> float:
        """Seconds until all that waits now should have begun."""
        return _clamped(self._backlog.until_start(self._ahead()))

    def _ahead(self) -> Ahead:
        """On the engine that is next, if they share the work evenly."""
        engines = self._num_engines
        return Ahead(
            num_running=(self._num_present - self.waiting.requests) / engines,
            num_waiting=self.waiting.requests / engines,
            prompt_tokens=self._prompt_tokens / engines,
            output_tokens=self._output_tokens / engines,
            kv_tokens=self._kv_tokens / engines,
        )

    def _buckets_of(self, tenant: str) -> tuple[TokenBucket | None, TokenBucket | None]:
        rates = self._limits.tenant_requests_per_minute, self._limits.tenant_tokens_per_minute
        if rates == (None, None):
            return None, None
        if tenant not in self._buckets:
            requests, tokens = (None if rate is None else TokenBucket(rate) for rate in rates)
            self._buckets[tenant] = requests, tokens
        return self._buckets[tenant]

    def _forget_full(self, now: float) -> None:
        """Now and then, or whoever invents tenants fills the memory. A full bucket is as good as none."""
        if len(self._buckets) > self._most_buckets:
            for tenant, buckets in list(self._buckets.items()):
                if all(bucket is None or bucket.is_full(now) for bucket in buckets):
                    del self._buckets[tenant]
            self._most_buckets = max(_FEW_TENANTS, 2 * len(self._buckets))

    # -- what the pool tells -------------------------------------------------------------------------------------

    def has_engines(self, count: int, kv_tokens: int) -> None:
        """So many engines share the work; kv_tokens: that the KV caches of all hold together."""
        self._num_engines = max(1, count)
        self._backlog.kv_tokens = kv_tokens // self._num_engines or None

    def arrive(self, choice: Choice) -> None:
        """A choice of a request that has been admitted."""
        request = choice.request
        choice.expected = self.expected(request.tenant, request.num_prompt, request.params)
        if choice.terms.first_by is not None:
            wait = self._backlog.until_first_token(self._ahead(), request.num_prompt)
            if 0.5 <= self._slack.value * wait / max(1e-9, choice.terms.first_by - choice.arrived) <= 1:
                choice.foretold = wait  # only who has little time to spare tells what the slack decides
        self._num_present += 1
        self._prompt_tokens += request.num_prompt
        self._output_tokens += choice.expected
        self._kv_tokens += choice.footprint
        self.waiting.add(1, request.num_prompt)
        self._by_tenant.setdefault(request.tenant, Waiting()).add(1, request.num_prompt)

    def start(self, choice: Choice) -> None:
        """It has its first iteration, or will never have one."""
        request = choice.request
        self.waiting.add(-1, -request.num_prompt)
        own = self._by_tenant[request.tenant]
        own.add(-1, -request.num_prompt)
        if own.requests == 0:
            del self._by_tenant[request.tenant]

    def generated(self, choice: Choice, num_tokens: int, num_cached: int, now: float) -> None:
        """It is about to get so many tokens. num_cached: of its prompt, with the first ones."""
        request = choice.request
        if not choice.has_output:
            self._prompt_tokens -= request.num_prompt
            self._learn_slack(choice, now)
            self._backlog.learn_prompt(request.num_prompt, num_cached)
        if (tokens := self._buckets_of(request.tenant)[1]) is not None:
            tokens.take(num_tokens, now)

    def leave(self, choice: Choice, now: float) -> None:
        """It has ended, however: what counts is how long it was there."""
        request = choice.request
        self._num_present -= 1
        self._output_tokens -= choice.expected
        self._kv_tokens -= choice.footprint
        if not choice.has_output:
            self._prompt_tokens -= request.num_prompt
            if now - choice.arrived > self._slack.value * choice.foretold:  # else it might still have been in time
                self._learn_slack(choice, now)
        elif request.max_tokens:  # one that asked for no token says nothing of how many others get
            self._lengths.learn(request.tenant, request.num_prompt, len(choice.generated))

    def iterated(self, num_prefill: int, num_decode: int, seconds: float) -> None:
        """An engine has computed so many tokens of prompts, and so many rows that decode."""
        self._backlog.learn(num_prefill, num_decode, seconds)

    def _learn_slack(self, choice: Choice, now: float) -> None:
        """It has its first token, or waits no longer."""
        if choice.foretold:
            self._slack.learn(now - choice.arrived, choice.foretold)


def resolved(num_prompt: int, params: SamplingParams, max_model_len: int) -> SamplingParams:
    """The parameters with max_tokens known. Raises ContextLengthError; ValueError for an empty prompt."""
    if num_prompt == 0:
        raise ValueError("an empty prompt: there is nothing to go on from")
    max_tokens = max_model_len - num_prompt if params.max_tokens is None else params.max_tokens
    if num_prompt + max_tokens > max_model_len or (params.max_tokens is None and max_tokens < 1):
        raise ContextLengthError(num_prompt, params.max_tokens, max_model_len)
    return msgspec.structs.replace(params, max_tokens=max_tokens)


def _fits(claim: Claim, waiting: Waiting, requests: float, tokens: float) -> bool:
    return waiting.requests + claim.num_choices <= max(1, requests) and waiting.tokens + claim.waiting_tokens <= tokens


def _clamped(seconds: float) -> float:
    least, most = RETRY_SECONDS
    return min(most, max(least, seconds))
