"""`Keys`: whose API key it is that a client sends. Compared in constant time, whichever fits."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from orcaserve.serve.terms import api_key


class Keys:
    """api_keys: KEY or NAME=KEY; none lets everybody in."""

    def __init__(self, api_keys: Sequence[str]) -> None:
        keys = [api_key(text) for text in api_keys]
        self._tenants = tuple((_digest(key.encode()), tenant) for tenant, key in keys)

    @property
    def are_required(self) -> bool:
        return bool(self._tenants)

    def tenant(self, authorization: bytes) -> str | None:
        """Whose key it is; None without a valid one. authorization: "Bearer KEY"."""
        if not self._tenants:
            return None
        scheme, _, key = authorization.partition(b" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest, _ in self._tenants]  # all of them, whichever fits
        if scheme.lower() != b"bearer" or not any(matches):
            return None
        return self._tenants[matches.index(True)][1]


def _digest(key: bytes) -> bytes:
    """Of one length, so that not even the length of a key can be timed."""
    return hashlib.sha256(key).digest()
