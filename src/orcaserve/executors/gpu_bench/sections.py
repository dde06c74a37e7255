"""`sections`: what `orcaserve bench gpu` measures, ready to be run in turn, and the report that it fills."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version

import torch

from orcaserve.bench.gpu.plan import FULL, TINY
from orcaserve.bench.gpu.report import Line, Report
from orcaserve.bench.gpu.run import Measure
from orcaserve.bench.report import Machine
from orcaserve.core.config import ModelError
from orcaserve.executors.gpu_bench.check import check
from orcaserve.executors.gpu_bench.lab import AS_IT_IS, Lab
from orcaserve.executors.gpu_bench.paper import paper
from orcaserve.executors.gpu_bench.peer import peer
from orcaserve.executors.gpu_bench.promise import promise
from orcaserve.executors.gpu_bench.shared import shared
from orcaserve.executors.gpu_bench.steps import steps
from orcaserve.ops.gpu.benchmark import Benchmark, measure_card
from orcaserve.ops.gpu.stopwatch import stopwatch

_MEASURES = {
    "steps": steps,
    "shared": shared,
    "promise": promise,
    "peer": peer,
    "paper": paper,
    "check": check,
}


def sections(names: Sequence[str], is_tiny: bool) -> tuple[Report, dict[str, Measure]]:
    """Those named, of which the card's limits always come first. Raises ModelError where there is no GPU to measure."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu and not is_tiny:
        raise ModelError("there is no GPU here that torch can use; --tiny shows without one that everything works")
    device, plan = torch.device("cuda" if has_gpu else "cpu"), TINY if is_tiny else FULL
    watch = stopwatch(device)
    card, limits = measure_card(device, watch, plan)
    lab = Lab(device, watch, card, plan)
    report = Report(
        date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        machine=Machine.this(),
        device=torch.cuda.get_device_name(device) if has_gpu else "a CPU, under Triton's interpreter",
        versions=_versions(),
        is_tiny=is_tiny,
        card=card,
        sections=[],
    )
    measures: dict[str, Measure] = {"ceilings": lambda: limits}
    for name in names:
        if name == "kernels":
            measures[name] = partial(_kernels, lab)
        elif name != "ceilings":
            measures[name] = partial(_MEASURES[name], lab)
    return report, measures


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "torch": str(torch.__version__), "Triton": version("triton")}
    return found if torch.version.cuda is None else found | {"CUDA": torch.version.cuda}


def _kernels(lab: Lab) -> Iterator[Line]:
    lab.let_go()
    kernels = lab.kernels(AS_IT_IS, max(lab.plan.rows) + 1)
    yield from Benchmark(kernels, lab.watch, lab.plan, lab.card).lines()
