"""`Door`: refuses requests before they are read, parsed or tokenised, as soon as it is certain that they would be.

So a refusal costs next to nothing, however many there are. What is let through is checked again when more is known of
it, and taken in or refused by the pool in the end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from orcaserve.core.config import EngineInfo
from orcaserve.serve import errors
from orcaserve.serve.admission import Claim, NotTaken, Refused
from orcaserve.serve.errors import ApiError
from orcaserve.serve.frontend import Frontend
from orcaserve.serve.job import least_sizes
from orcaserve.serve.metrics import Metrics
from orcaserve.serve.protocol import GenerationRequest
from orcaserve.serve.served_model import ServedModel
from orcaserve.serve.terms import Arrival, Terms, ttft_from


def refusal(error: NotTaken, metrics: Metrics) -> ApiError:
    """What a client is told who is not let in, which is counted."""
    metrics.rejected(error.reason)
    if isinstance(error, Refused):
        return errors.refused(error.reason, error.retry_after)
    return errors.unavailable(error.reason, error.retry_after)


class Door:
    """In front of the endpoints that generate."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def knock(self, headers: Mapping[bytes, bytes], tenant: str | None) -> Arrival:
        """Before the body is read. headers: names in lower case; tenant: of the API key, None without keys.

        Raises ApiError.
        """
        check_length(headers.get(b"content-length", b"0"), self._frontend.options.max_body_bytes)
        arrival = Arrival(at=time.monotonic(), tenant=tenant, ttft=ttft_from(headers))
        self._check(Claim(tenant=tenant, first_by=arrival.first_by))
        return arrival

    def terms(self, arrival: Arrival, request: GenerationRequest, model: ServedModel, info: EngineInfo) -> Terms:
        """On what terms a request comes that may go on to be tokenised. Raises ApiError."""
        terms = arrival.terms(request)
        sizes = least_sizes(request, model)
        if max(sizes, default=0) <= info.max_model_len:  # else it is wrong, and will stay so
            self.weigh(terms, request.n or 1, sizes)
        return terms

    def weigh(self, terms: Terms, num_choices: int, sizes: Sequence[int]) -> None:
        """Before prompts are tokenised. sizes: tokens that each of them has at least. Raises ApiError."""
        self._check(
            Claim(
                tenant=terms.tenant,
                num_choices=num_choices * max(1, len(sizes)),
                waiting_tokens=num_choices * sum(sizes),
                prompt_tokens=sum(sizes),
                longest_prompt=max(sizes, default=0),
                first_by=terms.first_by,
                end_by=terms.end_by,
            )
        )

    def _check(self, claim: Claim) -> None:
        try:
            self._frontend.pool.check(claim)
        except NotTaken as error:
            raise refusal(error, self._frontend.metrics) from None


def check_length(content_length: bytes, limit: int) -> None:
    """Raises ApiError for a body that is longer than is allowed, by its header."""
    if not content_length.isdigit() or int(content_length[:20]) > limit:
        raise errors.body_too_large(limit)
