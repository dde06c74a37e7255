"""`Link` over real sockets: what is sent arrives in order; who lacks the secret, or changes a frame, is cut off."""

from __future__ import annotations

import socket
import threading

import pytest

from orcaserve.executors.link import Link, LinkError, interface_of, parse_address


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        return ours, listening.accept()[0]


def link_over(ours: socket.socket, theirs: socket.socket, head: bytes, host: bytes) -> tuple[Link, Link]:
    made: list[Link] = []
    thread = threading.Thread(target=lambda: made.append(Link(theirs, host, is_head=False)))
    thread.start()
    first = Link(ours, head, is_head=True)
    thread.join(10)
    return first, made[0]


def test_frames_arrive_in_order_both_ways():
    head, host = link_over(*tcp_pair(), b"k" * 16, b"k" * 16)
    large = bytes(range(256)) * 40000
    sender = threading.Thread(target=lambda: [head.send(data) for data in (b"", b"one", large)])
    sender.start()
    assert [host.read() for _ in range(3)] == [b"", b"one", large]
    sender.join(10)
    host.send(b"back")
    assert head.read() == b"back"
    head.close()
    with pytest.raises(LinkError, match="closed"):
        host.read()


def test_another_secret_is_noticed_with_the_first_frame():
    head, host = link_over(*tcp_pair(), b"k" * 16, b"x" * 16)
    host.send(b"let me in")
    with pytest.raises(LinkError, match="does not know the secret"):
        head.read()


@pytest.mark.parametrize("changed", [4, 40, 60])
def test_a_changed_or_repeated_frame_ends_the_link(changed):
    """In between sits one who flips a bit, or sends a frame twice."""
    ours, outer = tcp_pair()
    inner, theirs = tcp_pair()

    def between() -> None:
        greeting = 16 + 32
        inner.sendall(outer.recv(greeting, socket.MSG_WAITALL))
        outer.sendall(inner.recv(greeting, socket.MSG_WAITALL))
        frame = bytearray(outer.recv(4 + 32 + 40, socket.MSG_WAITALL))
        inner.sendall(frame)
        if changed != 60:
            frame = bytearray(outer.recv(4 + 32 + 40, socket.MSG_WAITALL))
            frame[changed] ^= 1
        inner.sendall(frame)

    threading.Thread(target=between, daemon=True).start()
    head, host = link_over(ours, theirs, b"k" * 16, b"k" * 16)
    head.send(b"x" * 40)
    head.send(b"y" * 40)
    assert host.read() == b"x" * 40
    with pytest.raises(LinkError, match="secret"):
        host.read()


def test_a_stranger_is_told_apart():
    ours, theirs = tcp_pair()
    theirs.sendall(b"GET / HTTP/1.1\r\nHost: example\r\nAccept: text/html, and more of it\r\n\r\n")
    with pytest.raises(LinkError, match="does not speak"):
        Link(ours, b"k" * 16, is_head=True)


def test_addresses():
    assert parse_address("10.0.0.1:7000") == ("10.0.0.1", 7000)
    for text in ("10.0.0.1", ":7000", "host:", "host:0", "host:70000", "host:x"):
        with pytest.raises(ValueError, match="not an address"):
            parse_address(text)
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(ValueError, match=r"203\.0\.113\.7"):
        interface_of("203.0.113.7")
