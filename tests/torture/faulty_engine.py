"""The real engine, but for a model whose forward pass raises when the token `--raise-on TOKEN` is among its input."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

from orcaserve.core.config import EngineInfo, EngineOptions
from orcaserve.engine.executor import Executor
from orcaserve.serve.engine_process import Lost, Progress, main


class RaisingModel:
    """The model that it is given, in everything but that token."""

    def __init__(self, model: Any, token_id: int) -> None:
        self._model = model
        self._token_id = token_id

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, x: Any, *more: Any) -> Any:
        if bool((x == self._token_id).any()):
            raise RuntimeError("a fault of the forward pass")
        return self._model.forward(x, *more)


def build(options: EngineOptions, progress: Progress, on_lost: Lost) -> tuple[Executor, EngineInfo]:
    from orcaserve.executors import local  # torch comes with it: late, as in the real one
    from orcaserve.executors.build import build as real

    load_part = local.load_part

    def load_faulty(*given: Any, **named: Any) -> Any:
        part = load_part(*given, **named)
        return dataclasses.replace(part, model=RaisingModel(part.model, token_id))

    local.load_part = load_faulty
    return real(options, progress, on_lost)


if __name__ == "__main__":
    _, token, *fds = sys.argv[1:]
    token_id = int(token)
    os._exit(main(*map(int, fds), build=build))
