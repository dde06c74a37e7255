"""`Origins`: who may talk to a server without keys, which else believes whoever reaches it.

It listens on loopback only, but a browser there reaches it for any web page. A page may post text/plain to it unasked,
and one whose own name is made to lead to 127.0.0.1 may even read the answers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from orcaserve.serve import errors


class Origins:
    """allowed: what else may call: "*", or scheme://host[:port], by whose host the server may be called, too."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._is_open = "*" in allowed
        self._allowed = frozenset(allowed)
        self._hosts = frozenset(_name(origin.partition("://")[2]) for origin in allowed)

    def check(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Raises ApiError. headers: names in lower case. Browsers name their page's origin whenever they post."""
        if self._is_open:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if not _leads_nowhere_else(host) and _name(host) not in self._hosts:
            raise errors.host_not_allowed()
        origin = headers.get(b"origin", b"").decode("latin-1")
        if method != "POST" or not origin or origin in self._allowed:
            return
        place = origin.partition("://")[2].lower()
        if not place or (place != host and not _is_local(_name(place))):
            raise errors.origin_not_allowed()


@lru_cache(maxsize=64)  # clients write the same few into every request
def _leads_nowhere_else(host: str) -> bool:
    """Whether nobody can have made a name of his own lead here: there is none, or an address, or this machine's."""
    name = _name(host)
    return not name or _is_local(name) or _is_address(name)


def _name(place: str) -> str:
    """The host of HOST[:PORT]."""
    try:
        return (urlsplit(f"//{place}").hostname or "").rstrip(".")
    except ValueError:
        return place


def _is_address(name: str) -> bool:
    """Nobody can make an address lead elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_local(name: str) -> bool:
    """Whether that is this machine, for whoever says so."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name).is_loopback
