"""A host of the tests that runs ledger engines for a frontend elsewhere: HOST:PORT SECRET_FILE [engine options]."""

import sys
from pathlib import Path

from orcaserve.executors.link import parse_address
from orcaserve.serve.replica_host import offer

ENGINE = (sys.executable, str(Path(__file__).with_name("ledger_engine.py")))


def say(line: str) -> None:
    print(line, flush=True)


offer("ledger", parse_address(sys.argv[1]), Path(sys.argv[2]).read_bytes().strip(), say, [*ENGINE, *sys.argv[3:]])
