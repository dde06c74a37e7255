"""The command `orcaserve` as it is, but on SIGUSR1 it says on stderr how many asyncio tasks its process has."""

import asyncio
import gc
import signal
import sys

from orcaserve.cli import main


def say(*_: object) -> None:
    tasks = [one for one in gc.get_objects() if issubclass(type(one), asyncio.Task) and not one.done()]
    print(f"tasks {len(tasks)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, say)
    main()
