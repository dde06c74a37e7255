"""`Link`: frames between two hosts that share a secret. Whoever does not know it can neither send nor change one.

Each side sends a nonce; from both and the secret come two keys, one for each direction. A frame is a 4-byte length, an
HMAC-SHA256 of its number and its payload, and the payload (msgpack). A frame of another connection, out of turn, or
changed on its way ends the link. What is sent is not hidden: it holds lengths and token ids, and activations travel
beside it in the open.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import secrets
import select
import socket
import struct
import threading
import time
from array import array

_NONCE, _MAC, _HEADER = 32, 32, 4
_LARGEST = 1 << 28  # bytes of a frame; what claims more is not ours
_LARGEST_FIRST = 1 << 12  # of one that has yet to show that it knows the secret: it says no more than who it is
_GREETING_SECONDS = 5.0  # for one that has connected to say who it is, however it spreads its bytes
_CONNECT_SECONDS = 2.0
_MOST_ADDRESSES = 4096  # of this host's interfaces
_GREETING = b"orcaserve-link-1"


class LinkError(ConnectionError):
    """The other side is gone, or does not know the secret."""


class Link:
    """Owner of a connected socket. One thread reads; any may send."""

    def __init__(
        self, sock: socket.socket, secret: bytes, *, is_head: bool, seconds: float | None = None, first: int = _LARGEST
    ) -> None:
        """Exchanges nonces; LinkError if the other side does not speak as we do. The first frame shows its secret.

        seconds: until `trust`, for all that is read; first: bytes of the first frame, at most.
        """
        self._sock = sock
        self._end = None if seconds is None else time.monotonic() + seconds
        self._most = first
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine = secrets.token_bytes(_NONCE)
        try:
            sock.sendall(_GREETING + mine)
            said = self._exactly(len(_GREETING) + _NONCE)
        except OSError as error:
            raise LinkError(f"the connection was lost ({error})") from error
        if not said.startswith(_GREETING):
            raise LinkError("it does not speak as this version of OrcaServe does")
        theirs = said[len(_GREETING) :]
        both = mine + theirs if is_head else theirs + mine
        keys = [hmac.digest(secret, side + both, hashlib.sha256) for side in (b"head", b"host")]
        self._key, self._their_key = keys if is_head else reversed(keys)
        self._one = threading.Lock()
        self._num_sent = self._num_read = 0

    @property
    def own_address(self) -> str:
        """This host's, on the way to the other."""
        return str(self._sock.getsockname()[0])

    def send(self, payload: bytes) -> None:
        """Waits until it is on its way. Raises LinkError."""
        with self._one:
            self._send(payload)

    def beat(self, payload: bytes) -> None:
        """Sends what is too small to be worth a wait, unless it had to wait, as on a link that is cut.

        Whoever sees to it that the other side is heard must not stand still for that. Raises LinkError.
        """
        if not self._one.acquire(blocking=False):
            return
        try:
            if self._has_room():
                self._send(payload)
        finally:
            self._one.release()

    def trust(self) -> None:
        """The other side has shown what it must: it may take any time from now on."""
        self._end = None
        self._sock.settimeout(None)

    def read(self) -> bytes:
        """Waits for a frame. Raises LinkError."""
        try:
            head = self._exactly(_HEADER + _MAC)
            size = int.from_bytes(head[:_HEADER], "little")
            if size > self._most:
                raise LinkError("a frame without end")
            payload = self._exactly(size)
        except OSError as error:
            raise error if isinstance(error, LinkError) else LinkError(f"the connection was lost ({error})") from error
        if not hmac.compare_digest(head[_HEADER:], _mac(self._their_key, self._num_read, payload)):
            raise LinkError("it does not know the secret")
        self._num_read += 1
        self._most = _LARGEST
        return payload

    def close(self) -> None:
        """Ends a read that waits, too."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _send(self, payload: bytes) -> None:
        mac = _mac(self._key, self._num_sent, payload)
        self._num_sent += 1
        try:
            self._sock.sendall(len(payload).to_bytes(_HEADER, "little") + mac + payload)
        except OSError as error:
            raise LinkError(f"the connection was lost ({error})") from error

    def _has_room(self) -> bool:
        """Linux says that one may write while a third of what the socket holds is free."""
        poll = select.poll()
        try:
            poll.register(self._sock, select.POLLOUT)
        except ValueError:  # it is closed
            return False
        return bool(poll.poll(0))

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if self._end is not None:
                if (left := self._end - time.monotonic()) <= 0:
                    raise TimeoutError("timed out")
                self._sock.settimeout(left)
            more = self._sock.recv(min(size - len(data), 1 << 20))
            if not more:
                raise LinkError("the other side has closed the connection")
            data += more
        return bytes(data)


def accept(listening: socket.socket, secret: bytes, seconds: float) -> tuple[Link, bytes] | None:
    """The next one who knows the secret, and what it said first. None if nobody like that comes in so many seconds."""
    listening.settimeout(seconds)
    try:
        sock, _ = listening.accept()
    except TimeoutError:
        return None
    try:
        link = Link(sock, secret, is_head=True, seconds=_GREETING_SECONDS, first=_LARGEST_FIRST)
        said = link.read()
    except LinkError:
        sock.close()
        return None
    link.trust()
    return link, said


def connect(address: tuple[str, int], secret: bytes) -> Link:
    """To the head. Raises OSError."""
    sock = socket.create_connection(address, _CONNECT_SECONDS)
    link = Link(sock, secret, is_head=False, seconds=_CONNECT_SECONDS)
    link.trust()
    return link


def _mac(key: bytes, number: int, payload: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "little") + payload, hashlib.sha256)


def interface_of(address: str) -> str:
    """The network interface that has this IPv4 address, as one of several maybe; ValueError if none has."""
    size = 40  # of a struct ifreq: 16 bytes of name, then a struct sockaddr_in
    found = array("B", bytes(size * _MOST_ADDRESSES))
    place, _ = found.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, 0x8912, struct.pack("iP", len(found), place))  # SIOCGIFCONF
    for at in range(0, struct.unpack("iP", answer)[0], size):
        if socket.inet_ntoa(found[at + 20 : at + 24].tobytes()) == address:
            return found[at : at + 16].tobytes().partition(b"\0")[0].decode()
    raise ValueError(f"no interface of this host has the address {address}")


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT; ValueError says what is wrong."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not an address such as 10.0.0.1:7000")
    return host, int(port)
