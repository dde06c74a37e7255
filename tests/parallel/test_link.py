"""`Link` over real sockets: what is sent arrives in order; who lacks the secret, or changes a frame, is cut off."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from orcaserve.executors import link as link_module
from orcaserve.executors.hosts import RemoteHost
from orcaserve.executors.link import Link, LinkError, accept, connect, interface_of, parse_address


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


@pytest.mark.parametrize("said", [b"", b"orcaserve-link-1" + b"n" * 32])
def test_who_spreads_its_greeting_over_time_is_sent_away(said, monkeypatch):
    """Each byte comes in time, and all of them never do."""
    monkeypatch.setattr(link_module, "_GREETING_SECONDS", 0.5)
    ended = threading.Event()

    def drip(sock: socket.socket) -> None:
        sock.sendall(said)
        with contextlib.suppress(OSError):
            while not ended.wait(0.3):
                sock.sendall(b"o")

    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()) as stranger,
        ThreadPoolExecutor(2) as threads,
    ):
        dripping = threads.submit(drip, stranger)
        try:
            assert threads.submit(accept, listening, b"k" * 16, 5.0).result(10) is None
        finally:
            ended.set()
            dripping.result(10)


def test_who_has_shown_no_secret_says_little(monkeypatch):
    """A length alone must not make us keep what comes until it is there."""
    monkeypatch.setattr(link_module, "_GREETING_SECONDS", 600)
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as threads:
        accepted = threads.submit(accept, listening, b"k" * 16, 5.0)
        with socket.create_connection(listening.getsockname()) as stranger:
            stranger.sendall(b"orcaserve-link-1" + b"n" * 32 + (5000).to_bytes(4, "little") + b"m" * 32)
            assert accepted.result(10) is None


def test_who_has_shown_its_secret_may_say_much():
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as threads:
        accepted = threads.submit(accept, listening, b"k" * 16, 5.0)
        host = connect(listening.getsockname(), b"k" * 16)
        host.send(b"me")
        came = accepted.result(10)
        assert came is not None and came[1] == b"me"
        reading = threads.submit(came[0].read)
        host.send(bytes(100_000))
        assert len(reading.result(10)) == 100_000
        for link in (host, came[0]):
            link.close()


def test_silence_is_heard_while_a_frame_is_stuck_on_its_way():
    """The other side neither reads nor speaks, as on a link that is cut, and a large batch is half sent."""
    head, host = link_over(*tcp_pair(), b"k" * 16, b"k" * 16)
    remote = RemoteHost(1, head)
    threading.Thread(target=remote.run, args=(bytes(50 << 20),), daemon=True).start()
    try:
        end = time.monotonic() + 30
        while remote.lost is None and time.monotonic() < end:
            time.sleep(0.05)
        assert remote.lost == "host 1: nothing is heard of it"
    finally:
        host.close()
        remote.close()


def test_addresses():
    assert parse_address("10.0.0.1:7000") == ("10.0.0.1", 7000)
    for text in ("10.0.0.1", ":7000", "host:", "host:0", "host:70000", "host:x"):
        with pytest.raises(ValueError, match="not an address"):
            parse_address(text)
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(ValueError, match=r"203\.0\.113\.7"):
        interface_of("203.0.113.7")


def test_the_interface_of_a_second_address():
    """In a network namespace of its own, where one can be made."""
    code = "from orcaserve.executors.link import interface_of as of; print(of('10.9.0.1'), of('10.9.0.2'))"
    there = "ip link set lo up && ip addr add 10.9.0.1/24 dev lo && ip addr add 10.9.0.2/24 dev lo"
    own = ["unshare", "--net", "--map-root-user", "sh", "-c"]
    if any(shutil.which(name) is None for name in ("unshare", "ip")) or subprocess.run([*own, there]).returncode:
        pytest.skip("needs iproute2 and the right to make network namespaces")
    done = subprocess.run([*own, f'{there} && "$0" -c "$1"', sys.executable, code], stdout=subprocess.PIPE, text=True)
    assert done.stdout.split() == ["lo", "lo"]
