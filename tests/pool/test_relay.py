"""A replica's engine on another host, over a real link: it passes for a local one, and so do its ends."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import psutil
import pytest
from pool_world import PATIENCE, Wish, gather, is_alive, run, submit, until, wishes

from orcaserve.core.config import EngineOptions
from orcaserve.executors.hosts import _accept
from orcaserve.executors.link import connect
from orcaserve.executors.messages import Joined
from orcaserve.serve.pool import Pool
from orcaserve.serve.relay import Offer, _host

HOST = str(Path(__file__).with_name("ledger_host.py"))
POISON = 5000  # outside of the vocabulary, so that no other request has it


class Host:
    """A host's process. Owner of it."""

    def __init__(self, address: str, secret: Path, *engine: str) -> None:
        self.process = subprocess.Popen([sys.executable, HOST, address, str(secret), *engine])

    async def engine(self) -> int:
        """The pid of the engine process that it runs, waited for."""
        found: list[int] = []

        def is_there() -> bool:
            children = psutil.Process(self.process.pid).children()
            found[:] = [child.pid for child in children if is_alive(child.pid)]
            return bool(found)

        await until(is_there, "the host runs an engine")
        return found[0]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


async def connected(address: str) -> socket.socket:
    """To who listens there, as soon as somebody does."""
    found: list[socket.socket] = []

    def is_there() -> bool:
        try:
            found.append(socket.create_connection(address.split(":")))
        except ConnectionRefusedError:
            return False
        return True

    await until(is_there, "somebody listens")
    return found[0]


@asynccontextmanager
async def relayed(tmp_path: Path, *engine: str) -> AsyncIterator[tuple[Pool, Host, str, Path]]:
    """A pool whose engine runs on a host, and where that joins."""
    secret = tmp_path / "secret"
    secret.write_text(secrets.token_hex(32))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "orcaserve.serve.relay", address, str(secret)]
    pool = Pool(EngineOptions(model="somewhere else", check=True), command=command)
    await pool.start()
    host = Host(address, secret, *engine)
    try:
        await asyncio.wait_for(pool.ready(), PATIENCE)
        yield pool, host, address, secret
    finally:
        await pool.close()
        host.close()


async def ended_engine(pid: int) -> None:
    await until(lambda: not is_alive(pid), "the engine of a lost link has ended")


def test_streams_survive_the_ends_of_a_remote_engine(tmp_path: Path) -> None:
    """The engine is killed, the host is killed and comes again, the host freezes."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")

    async def main() -> None:
        async with relayed(tmp_path, "--step-seconds", "0.002") as (pool, host, address, secret):
            asked = wishes(seed, 120, most_tokens=150)
            results = [asyncio.ensure_future(gather(submit(pool, wish))) for wish in asked]

            async def ended(share: float) -> None:
                await until(lambda: pool.num_unfinished <= 120 * (1 - share), "some have ended")
                assert pool.num_unfinished > 0

            await ended(1 / 4)
            os.kill(await host.engine(), signal.SIGKILL)
            await ended(2 / 4)
            engine = await host.engine()
            host.close()
            await ended_engine(engine)
            second = Host(address, secret, "--step-seconds", "0.002")
            third = None
            try:
                await ended(3 / 4)
                engine = await second.engine()
                os.kill(second.process.pid, signal.SIGSTOP)
                third = Host(address, secret, "--step-seconds", "0.002")
                got = await asyncio.gather(*results)
                second.close()
                await ended_engine(engine)
            finally:
                second.close()
                if third is not None:
                    third.close()
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in asked]
            assert pool.num_restarts == 3

    run(main())


def test_poison_on_a_remote_engine_ends_alone(tmp_path: Path) -> None:
    """What was in flight comes over the link before the relay ends."""

    async def main() -> None:
        async with relayed(tmp_path, "--crash-on", str(POISON), "--step-seconds", "0.01") as (pool, *_):
            innocent = wishes(5, 20)
            results = [asyncio.ensure_future(gather(submit(pool, wish))) for wish in innocent]
            _, reason, last = await gather(submit(pool, Wish((POISON,), 1, 5)))
            assert reason == "error" and "crash" in str(last.error)
            got = await asyncio.gather(*results)
            assert [(tokens, reason) for tokens, reason, _ in got] == [wish.answer() for wish in innocent]

    run(main())


@pytest.mark.parametrize("door", [_accept, _host])
def test_a_host_of_another_command_is_sent_away(door: Callable[..., object]) -> None:
    """It knows the secret, but has come to the wrong port; whoever is meant comes after it."""
    secret = secrets.token_bytes(32)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address: tuple[str, int] = listening.getsockname()
        if door is _accept:  # it listens by itself
            listening.close()
            waits = partial(door, address, secret, 2, None)
            wrong, right = Offer(), Joined(1)
        else:
            waits = partial(door, listening, secret)
            wrong, right = Joined(1), Offer()
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(waits)
            links = []
            for said in (wrong, right):
                while True:
                    try:
                        links.append(connect(address, secret))
                        break
                    except ConnectionRefusedError:
                        time.sleep(0.01)
                links[-1].send(msgspec.msgpack.encode(said))
            assert found.result(timeout=20)
            for link in links:
                link.close()


def test_who_does_not_know_the_secret_is_not_let_in(tmp_path: Path) -> None:
    async def main() -> None:
        secret, wrong = tmp_path / "secret", tmp_path / "wrong"
        secret.write_text(secrets.token_hex(32))
        wrong.write_text(secrets.token_hex(32))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [sys.executable, "-m", "orcaserve.serve.relay", address, str(secret)]
        pool = Pool(EngineOptions(model="ledger"), command=command)
        await pool.start()
        stranger = Host(address, wrong)
        silent = await connected(address)  # says nothing, and the relay does not freeze over it
        relay = pool.replicas[0].pid
        try:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.ready(), 3)
            assert pool.replicas[0].pid == relay
            assert not psutil.Process(stranger.process.pid).children()
            friend = Host(address, secret)
            try:
                await asyncio.wait_for(pool.ready(), PATIENCE)
            finally:
                friend.close()
        finally:
            silent.close()
            await pool.close()
            stranger.close()

    run(main())
