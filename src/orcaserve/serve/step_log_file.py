"""`StepLogFile`: a step log's way to the disk, by a thread of its own: a full or slow disk never harms the engine."""

from __future__ import annotations

import threading
from pathlib import Path

from orcaserve.worker.process import tell

WRITE_SECONDS = 0.5
MOST_BYTES = 64 << 20  # that wait for a disk; if there are more, the log ends


class StepLogFile:
    """Owner of the lines that wait and of the thread that appends them to the file.

    The first failure ends the log, with one line on stderr.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[bytes] = []
        self._size = 0
        self._is_lost = False
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="step log", daemon=True)
        self._thread.start()

    def write(self, lines: bytes) -> None:
        with self._lock:
            if self._is_lost:
                return
            self._lines.append(lines)
            self._size += len(lines)
            is_full = self._size > MOST_BYTES
        if is_full:
            self._lose("the disk is too slow")

    def close(self, within: float = 5.0) -> None:
        """Writes what waits, for at most so many seconds."""
        self._closing.set()
        self._thread.join(within)

    def _run(self) -> None:
        try:
            with self._path.open("ab", buffering=0) as file:
                while True:
                    is_last = self._closing.wait(WRITE_SECONDS)
                    with self._lock:
                        data, self._lines, self._size = b"".join(self._lines), [], 0
                    while data and not self._is_lost:
                        data = data[file.write(data) :]
                    if is_last or self._is_lost:
                        return
        except OSError as error:
            self._lose(error.strerror or str(error))

    def _lose(self, why: str) -> None:
        with self._lock:
            was_lost, self._is_lost = self._is_lost, True
            self._lines, self._size = [], 0
        if not was_lost:
            tell(f"orcaserve engine: the step log {self._path} ends here: {why}")
