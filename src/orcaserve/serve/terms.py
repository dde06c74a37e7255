"""For whom a request is, and by when it is wanted: what HTTP says of it (`Arrival`), and what comes of that (`Terms`).

With API keys the key is the tenant, which nobody can forge, and tenants share no prefixes. Without keys the `user` that
a request names is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import NamedTuple

import msgspec

from orcaserve.serve import errors
from orcaserve.serve.protocol import GenerationRequest

TTFT_HEADER = b"x-slo-ttft-ms"
_LONGEST_NAME = 256  # of a `user`; what is longer is cut
_NAMED_KEY = re.compile(r"([A-Za-z0-9._-]{1,64})=(.*[^=].*)", re.DOTALL)


class ApiKey(NamedTuple):
    """A key, and the name of its tenant; several keys may have one."""

    tenant: str
    key: str


def api_key(text: str) -> ApiKey:
    """NAME=KEY, or a key alone, whose tenant is named by its SHA-256. A key may end in "=" without being a name."""
    if named := _NAMED_KEY.fullmatch(text):
        return ApiKey(named[1], named[2])
    return ApiKey(f"key-{sha256(text.encode()).hexdigest()[:8]}", text)


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """On what terms a request runs. Times are those of time.monotonic(); None: whenever.

    arrived: when it came, before its body was read; None: it had no way to come by.
    tenant: "" is nobody in particular. realm: prefixes are shared only within it.
    priority: the lower, the earlier. first_by: when the first token is due. end_by: when the whole response is
    worthless.
    """

    tenant: str = ""
    realm: str = ""
    priority: int = 0
    first_by: float | None = None
    end_by: float | None = None
    arrived: float | None = None

    @property
    def start_by(self) -> float | None:
        """After that nothing of the request need be begun."""
        return min((by for by in (self.first_by, self.end_by) if by is not None), default=None)

    def salt(self, own: str) -> str:
        """The prefix cache's salt. own: the request's. A realm has no slash, so that no two combinations are equal."""
        return f"{self.realm}/{own}" if self.realm else own


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a request before its body is read. at: time.monotonic() of its coming.

    tenant: of its API key; None without keys. ttft: seconds in which the first token is due.
    """

    at: float
    tenant: str | None = None
    ttft: float | None = None

    @property
    def first_by(self) -> float | None:
        return None if self.ttft is None else self.at + self.ttft

    def terms(self, request: GenerationRequest) -> Terms:
        return Terms(
            arrived=self.at,
            tenant=(request.user or "")[:_LONGEST_NAME] if self.tenant is None else self.tenant,
            realm=self.tenant or "",
            priority=request.priority or 0,
            first_by=self.first_by,
            end_by=None if request.timeout is None else self.at + request.timeout,
        )


def ttft_from(headers: Mapping[bytes, bytes]) -> float | None:
    """Seconds in which the first token is due, by the header. Raises ApiError."""
    given = headers.get(TTFT_HEADER)
    if given is None:
        return None
    try:
        milliseconds = float(given)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        name = TTFT_HEADER.decode()
        raise errors.invalid(f"The header '{name}' has to be a number of milliseconds above 0.", name, "invalid_value")
    return milliseconds / 1000
