"""The rows of faults, each at its short scale. What is late on a busy machine is reported, not asserted."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import pytest

from torture import r04_isolation, r05_deaths, r15_surface, r17_start_failures
from torture.rows import Setup


@pytest.mark.parametrize(
    "row", [r04_isolation, r05_deaths, r15_surface, r17_start_failures], ids=lambda row: row.ROWS[0].name
)
def test_row(row: ModuleType, tmp_path: Path) -> None:
    setup = Setup("short", int(time.time()), tmp_path)
    print(f"seed {setup.seed}")
    for outcome in row.torture(setup):
        print(outcome.line())
        assert outcome.trace == ()


def test_a_call_to_elsewhere_would_be_seen(tmp_path: Path) -> None:
    """What strace writes of a connection to the loopback interface, to another host, and to a Unix socket."""
    (tmp_path / "calls").write_text(
        '10 connect(5, {sa_family=AF_INET, sin_port=htons(4321), sin_addr=inet_addr("127.0.0.1")}, 16) = 0\n'
        '10 connect(5, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("192.0.2.7")}, 16) = -1 ENETUNREACH\n'
        '11 sendto(6, "x", 1, 0, {sa_family=AF_INET6, sin6_port=htons(53), sin6_flowinfo=htonl(0), '
        'inet_pton(AF_INET6, "2001:db8::1", &sin6_addr), sin6_scope_id=0}, 28) = 1\n'
        '11 connect(7, {sa_family=AF_UNIX, sun_path="/run/nscd/socket"}, 110) = -1 ENOENT\n'
        "12 sendto(8, [{nlmsg_len=20}], 20, 0, {sa_family=AF_NETLINK, nl_pid=0, nl_groups=00000000}, 12) = 20\n"
    )
    elsewhere = ["connect to 192.0.2.7:80", "sendto to 2001:db8::1:53", 'connect to the Unix socket "/run/nscd/socket"']
    assert r15_surface._outbound(tmp_path / "calls", is_data_plane_allowed=True) == elsewhere
    assert len(r15_surface._outbound(tmp_path / "calls", is_data_plane_allowed=False)) == 4
