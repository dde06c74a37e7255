"""`Receiver`: what comes over a socket, without new memory for every read."""

from __future__ import annotations

import socket

_RECEIVE_BYTES = 1 << 18


class Receiver:
    """Bytes from a socket, which the caller owns. Owner of the one place that they come to.

    recv() would take a large block each time and give most of it back. What a thread allocates in between then keeps
    the next one from finding room, so that its heap grows, by a kilobyte a request, without holding anything.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(_RECEIVE_BYTES))

    def receive(self) -> memoryview:
        """Waits for some; they stay until the next call. Empty at the end; raises OSError if the socket is broken."""
        return self._buffer[: self._sock.recv_into(self._buffer)]
