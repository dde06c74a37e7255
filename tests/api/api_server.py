"""A server process of the tests. argv: the model, HttpOptions, Limits and Replication as JSON, the engine's argv."""

import sys

import msgspec

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.serve.admission import Limits
from orcaserve.serve.frontend import HttpOptions
from orcaserve.serve.replicas import Replication
from orcaserve.serve.server import run


def say(info: EngineInfo, url: str) -> None:
    print(url, flush=True)


if __name__ == "__main__":
    model, http, limits, replication, *command = sys.argv[1:]
    code = run(
        EngineOptions(model=model, max_batch_size=64, max_batch_tokens=256),
        msgspec.json.decode(http, type=HttpOptions),
        replication=msgspec.json.decode(replication, type=Replication),
        limits=msgspec.json.decode(limits, type=Limits),
        command=command,
        on_ready=say,
    )
    print("torch" in sys.modules, flush=True)
    sys.exit(code)
