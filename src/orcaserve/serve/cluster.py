"""`placed`: the parts of a server that run on the nodes of a Ray cluster, and how this host finds them.

Either replicas, each an engine of its own behind the router, or the ranks of one model beyond this host's own.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.executors.hosts import read_secret
from orcaserve.executors.link import parse_address

RELAY = (sys.executable, "-m", "orcaserve.serve.relay")


Commands = tuple[tuple[str, ...], ...]


@contextmanager
def elsewhere(
    cluster: str | None, address: str | None, model: str, engine: EngineOptions, replicas: int
) -> Iterator[tuple[EngineOptions, Commands | None]]:
    """What runs on other hosts, for as long as it is open: the engine's options, and a command for each replica.

    cluster: of Ray. address: where replicas join that somebody else starts; replica i at the port + i. With neither
    there is nothing to do. Raises ModelError in one line.
    """
    if cluster is None and address is None:
        yield engine, None
        return
    if engine.step_log is not None and engine.nnodes == 1:
        raise ModelError("a step log is written where the engine runs, so not for replicas on other hosts")
    if cluster is not None:
        if address is not None:
            raise ModelError("with --ray replicas are placed by Ray, which needs no --replicas-join")
        with placed(cluster, model, engine, replicas) as found:
            yield found
    else:
        if engine.secret_file is None or address is None:
            raise ModelError("replicas that join need --secret-file")
        read_secret(engine.secret_file)
        try:
            host, port = parse_address(address)
        except ValueError as error:
            raise ModelError(str(error)) from error
        yield engine, tuple((*RELAY, f"{host}:{port + index}", engine.secret_file) for index in range(replicas))


@contextmanager
def placed(
    cluster: str, model: str, engine: EngineOptions, replicas: int
) -> Iterator[tuple[EngineOptions, Commands | None]]:
    """Places replicas, or ranks, as long as it is open: the engine's options, and a command for each replica, if any.

    cluster: as `ray.init` takes it. model: its name, which every node can resolve. Raises ModelError in one line.
    """
    if replicas > 1 and engine.nnodes > 1:
        raise ModelError("with --ray either replicas or one model's hosts are placed, not both")
    try:
        from orcaserve.serve.ray_hosts import SECRET, RayHosts, address_of
    except ImportError:
        raise ModelError("--ray needs the extra: pip install 'orcaserve[ray]'") from None
    host = address_of(cluster)
    secret = secrets.token_hex(32).encode()
    fd = os.memfd_create("orcaserve-secret")
    os.write(fd, secret)
    path = f"/proc/{os.getpid()}/fd/{fd}"  # for the processes that this one starts, and theirs
    # As many as Ray reserves: without a number each host would take all processors of its node, whoever else has them.
    engine = msgspec.structs.replace(engine, threads=engine.threads or 1)
    try:
        commands: Commands | None = None
        if engine.nnodes > 1:
            [port] = free_ports(host, 1)
            engine = msgspec.structs.replace(engine, head_address=f"{host}:{port}", secret_file=path)
            arguments = [_rank(model, engine, node, SECRET) for node in range(1, engine.nnodes)]
        else:
            ports = free_ports(host, replicas)
            commands = tuple((*RELAY, f"{host}:{port}", path) for port in ports)
            arguments = [
                ["replica", model, "--join", f"{host}:{port}", "--secret-file", SECRET, "--end-with-parent"]
                for port in ports
            ]
        hosts = RayHosts(arguments, engine.threads or 1, secret)
        try:
            yield engine, commands
        finally:
            hosts.close()
    finally:
        os.close(fd)


def _rank(model: str, engine: EngineOptions, node: int, secret: str) -> list[str]:
    """The arguments of a host of one model's ranks. How to compute it is told by the head."""
    return [
        "serve", model, "--nnodes", str(engine.nnodes), "--node-rank", str(node),
        "--head-address", str(engine.head_address), "--secret-file", secret, "--end-with-parent",
    ]  # fmt: skip


def free_ports(host: str, count: int) -> Sequence[int]:
    """Ports of this host that nobody listens on now."""
    listening = [socket.create_server((host, 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in listening]
    for sock in listening:
        sock.close()
    return ports
