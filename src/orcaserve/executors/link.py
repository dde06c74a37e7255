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
import socket
import threading

_NONCE, _MAC, _HEADER = 32, 32, 4
_LARGEST = 1 << 28  # bytes of a frame; what claims more is not ours
_GREETING_SECONDS = 5.0  # for one that has connected to say who it is
_CONNECT_SECONDS = 2.0
_GREETING = b"orcaserve-link-1"


class LinkError(ConnectionError):
    """The other side is gone, or does not know the secret."""


class Link:
    """Owner of a connected socket. One thread reads; any may send."""

    def __init__(self, sock: socket.socket, secret: bytes, *, is_head: bool) -> None:
        """Exchanges nonces; LinkError if the other side does not speak as we do. The first frame shows its secret."""
        self._sock = sock
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
        """Raises LinkError."""
        with self._one:
            mac = _mac(self._key, self._num_sent, payload)
            self._num_sent += 1
            try:
                self._sock.sendall(len(payload).to_bytes(_HEADER, "little") + mac + payload)
            except OSError as error:
                raise LinkError(f"the connection was lost ({error})") from error

    def read(self) -> bytes:
        """Waits for a frame. Raises LinkError."""
        try:
            head = self._exactly(_HEADER + _MAC)
            size = int.from_bytes(head[:_HEADER], "little")
            if size > _LARGEST:
                raise LinkError("a frame without end")
            payload = self._exactly(size)
        except OSError as error:
            raise error if isinstance(error, LinkError) else LinkError(f"the connection was lost ({error})") from error
        if not hmac.compare_digest(head[_HEADER:], _mac(self._their_key, self._num_read, payload)):
            raise LinkError("it does not know the secret")
        self._num_read += 1
        return payload

    def close(self) -> None:
        """Ends a read that waits, too."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
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
    sock.settimeout(_GREETING_SECONDS)
    try:
        link = Link(sock, secret, is_head=True)
        said = link.read()
    except LinkError:
        sock.close()
        return None
    sock.settimeout(None)
    return link, said


def connect(address: tuple[str, int], secret: bytes) -> Link:
    """To the head. Raises OSError."""
    sock = socket.create_connection(address, _CONNECT_SECONDS)
    link = Link(sock, secret, is_head=False)
    sock.settimeout(None)
    return link


def _mac(key: bytes, number: int, payload: bytes) -> bytes:
    return hmac.digest(key, number.to_bytes(8, "little") + payload, hashlib.sha256)


def interface_of(address: str) -> str:
    """The network interface that has this IPv4 address; ValueError if none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, 0x8915, name.encode()[:15].ljust(40, b"\0"))  # SIOCGIFADDR
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    raise ValueError(f"no interface of this host has the address {address}")


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT; ValueError says what is wrong."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not an address such as 10.0.0.1:7000")
    return host, int(port)
