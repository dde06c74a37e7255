"""An engine that is a library and no server: a command that does works in a process of its own, beside the servers.

The process says READY on a line of its output when its model is loaded. Then it gets lines of JSON on its input,
{"work": path, "out": path}: it does the work (`workloads.save` wrote it: a line of JSON with the work's name and kind,
then one for each request: at, prompt_ids, max_tokens) and writes to `out` a list of {"token_times": [...]}, one for
each request in the same order, in seconds after the work began; then it says DONE. Other lines are passed over. Its
input ends when the comparison does.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import cast

import msgspec

from orcaserve.bench import workloads
from orcaserve.bench.client import BenchError, Record
from orcaserve.bench.workloads import Work

_LOADING = 1800.0  # seconds
_LEAVING = 10.0


class Offline(msgspec.Struct, frozen=True):
    """What to run: its name in the report, and the command as a shell would split it."""

    name: str
    command: str

    @property
    def address(self) -> str:
        return self.command

    @property
    def model(self) -> None:
        return None

    @property
    def version(self) -> None:
        return None

    @property
    def concurrency(self) -> None:
        return None


def offline_from(texts: Sequence[str], servers: Sequence[str] = ()) -> tuple[Offline, ...]:
    """Commands as they are written, NAME=COMMAND; servers: NAME=…, whose names are taken.

    ValueError says what is wrong.
    """
    taken = {text.partition("=")[0] for text in servers}
    found = []
    for text in texts:
        name, _, command = text.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or not command.strip():
            raise ValueError(f"{text!r} is not NAME=COMMAND, as in other='python other.py'")
        if name in taken:
            raise ValueError(f"two servers are called {name!r}")
        taken.add(name)
        found.append(Offline(name, command))
    return tuple(found)


class _Done(msgspec.Struct):
    token_times: tuple[float, ...]
    sent: float | None = None


_decode = msgspec.json.Decoder(list[_Done]).decode


class Program:
    """A running command that does one work at a time. Owner of its process while the context lasts."""

    def __init__(self, what: Offline, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._what = what
        self._process = process
        self._input = cast(asyncio.StreamWriter, process.stdin)  # both are pipes
        self._output = cast(asyncio.StreamReader, process.stdout)
        self._folder = folder

    @classmethod
    @contextlib.asynccontextmanager
    async def started(cls, what: Offline, loading: float = _LOADING) -> AsyncIterator[Program]:
        """The program, ready for works. BenchError if it cannot be started or is not ready after `loading` seconds."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(*shlex.split(what.command), stdin=pipe, stdout=pipe)
        except (OSError, ValueError) as error:
            raise BenchError(f"{what.name}: {what.command} cannot be started: {error}") from None
        with tempfile.TemporaryDirectory() as folder:
            program = cls(what, process, Path(folder))
            try:
                try:
                    await asyncio.wait_for(program._said("READY"), loading)
                except TimeoutError:
                    raise BenchError(f"{what.name}: not READY after {loading:.0f} s; what does it print?") from None
                yield program
            finally:
                await program._end()

    async def run(self, work: Work) -> list[Record]:
        """Does a work. BenchError if the process ends, or writes something else than one list of times per request."""
        path, out = self._folder / "work.jsonl", self._folder / "out.json"
        workloads.save(work, path)
        out.unlink(missing_ok=True)
        with contextlib.suppress(ConnectionError):  # that it has ended is seen when it says nothing
            self._input.write(msgspec.json.encode({"work": str(path), "out": str(out)}) + b"\n")
            await self._input.drain()
        await self._said("DONE")
        try:
            done = _decode(out.read_bytes())
        except (OSError, msgspec.MsgspecError) as error:
            raise BenchError(
                f"{self._what.name}: after DONE, no list of token_times in the file `out`: {error}"
            ) from None
        if len(done) != len(work.items):
            raise BenchError(f"{self._what.name}: token_times of {len(done)} requests instead of {len(work.items)}")
        return [
            Record(
                due=item.at,
                sent=item.at if one.sent is None else one.sent,
                token_times=one.token_times,
                max_tokens=item.max_tokens,
                prompt_tokens=len(item.prompt_ids),
                counted="ids",
                error=None if one.token_times else "no token",
                ended=one.token_times[-1] if one.token_times else None,
            )
            for item, one in zip(work.items, done, strict=True)
        ]

    async def _said(self, word: str) -> None:
        while True:
            try:
                line = await self._output.readline()
            except ValueError:  # longer than a line may be: none of ours
                continue
            if line.strip() == word.encode():
                return
            if not line:
                code = await self._process.wait()
                raise BenchError(f"{self._what.name}: the command ended (exit code {code}) before it said {word}")

    async def _end(self) -> None:
        self._input.close()
        try:
            await asyncio.wait_for(self._process.wait(), _LEAVING)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
