"""A worker process of the tests that computes for ever."""

import time

from orcaserve.worker.process import die_with_parent, dump_when_told, tell


def compute() -> None:
    tell("computes for ever")
    time.sleep(3600)


if __name__ == "__main__":
    die_with_parent()
    dump_when_told()
    compute()
