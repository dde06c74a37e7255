"""What a process asks of its system: to die with its parent, to keep memory; its last words; how it is seen outside."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

KEPT_BYTES = 32 << 20  # of one array; as much as glibc allows
DUMP = signal.SIGUSR1  # of an engine or worker process: write down every thread's stack, and end
DUMP_SECONDS = 0.5  # that it gets for that


def die_with_parent() -> None:
    """Asks Linux to kill this process when the thread that started it ends: not even a stopped one stays behind.

    Elsewhere, and for a parent that is gone already, the end of the socket says the same to a process that runs.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def give_back_freed_memory() -> None:
    """Asks glibc to give back to the kernel what reading files left behind: of a tokenizer's, as much as it keeps."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def keep_freed_memory() -> None:
    """Asks glibc to hand out again what an iteration frees, instead of giving it back to the kernel.

    Every iteration takes and frees the same few arrays. As fresh pages from the kernel, the logits of sixteen rows
    alone cost milliseconds of page faults. What loading the model left behind goes back first.
    """
    give_back_freed_memory()
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(mmap_threshold, KEPT_BYTES)
        libc.mallopt(trim_threshold, 2 * KEPT_BYTES)


@contextlib.contextmanager
def uncollected(module: str) -> Iterator[None]:
    """For the first import of a module: no garbage is looked for meanwhile, nor ever again in what it leaves.

    torch's modules make objects by the hundred thousand, and all of them stay. To walk them takes a fifteenth of the
    import, and each full collection later on would hold up an iteration for tens of milliseconds.
    """
    if module in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def dump_when_told() -> None:
    """Has DUMP and fatal signals write the stacks of all threads to stderr, and then end this process as ever.

    That needs no lock: it works in a process that computes for ever, or waits for what never comes.
    """
    faulthandler.enable()
    faulthandler.register(DUMP, all_threads=True, chain=True)


def tell_to_dump(pid: int) -> None:
    """Sends DUMP to a process's first thread, which does nothing else before; a stopped process goes on for that."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    with contextlib.suppress(ProcessLookupError):
        if libc is not None and hasattr(libc, "tgkill"):
            libc.tgkill(pid, pid, DUMP)
        else:
            os.kill(pid, DUMP)
        os.kill(pid, signal.SIGCONT)


def tell(line: str) -> None:
    """A line for the operator, on stderr. One that cannot be written, for the disk is full, is no reason to fail."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def in_one_line(error: Exception) -> str:
    """An exception in one line, with the place that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return " ".join(f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})".split())


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are there; none where the system does not tell."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or waits only for its parent to hear of its end."""
    return _stat(pid)[:1] in ([], ["Z"])


def _stat(pid: int) -> list[str]:
    """What Linux tells of a process, from its state on (proc(5)); nothing of one that is gone, or elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def pulse(pid: int) -> object:
    """Something that changes while a process gets work done; None where the system does not tell."""
    if not (fields := _stat(pid)):
        return None
    state, cpu_ticks = fields[0], (fields[11], fields[12])
    waits_for_a_disk_or_a_core = state in ("D", "R")
    return time.monotonic() if waits_for_a_disk_or_a_core else cpu_ticks
