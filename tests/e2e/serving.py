"""A real server for the end-to-end tests: the installed command, the built-in model, real sockets."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import httpx
import psutil

_URL = re.compile(r"http://[\d.]+:\d+")


class Serving:
    """`orcaserve serve MODEL …` on a free port. Owner of the process; ends it, and checks that nothing is left.

    program: what Python runs in the place of the command. prefix: argv of what becomes the server, such as a tracer.
    """

    def __init__(
        self,
        *arguments: str,
        timeout: float = 120,
        program: Sequence[str] = ("-m", "orcaserve"),
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        command = [*prefix, sys.executable, *program, "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.lines: list[str] = []
        self.url = ""
        self._up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._up.wait(timeout) or not self.url:
            self.process.kill()
            raise AssertionError("the server did not come up:\n" + "\n".join(self.lines))
        self.client = httpx.Client(base_url=self.url, timeout=300)

    def _read(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if "serving " in line and (found := _URL.search(line)):
                self.url = found[0]
                self._up.set()
        self._up.set()

    @property
    def engine(self) -> psutil.Process:
        """The engine process that runs now, or the relay in its place; not one that is dead and waits to be reaped."""
        while True:
            for child in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any(word.startswith("orcaserve.serve.") for word in child.cmdline()):
                        return child
            time.sleep(0.01)

    def gauge(self, name: str) -> float:
        """One number of /metrics."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(name) and line[len(name)] in " {":
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no metric {name}")

    def __enter__(self) -> Serving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        engine = self.engine.pid if self.process.poll() is None else None
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        if error is None:
            self._reader.join(10)  # its last words
            assert code == 0, "\n".join([f"exit code {code}", *self.lines])
            assert engine is None or not psutil.pid_exists(engine), "the engine process outlived the server"


def is_alive(pid: int) -> bool:
    """Whether a process runs: one that is dead and waits to be reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
