"""What has come of a choice before an error is told before it, however much of it nobody had taken by then."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from plain_job import JOB

from orcaserve.serve.detokenize import StopStrings
from orcaserve.serve.errors import ApiError
from orcaserve.serve.generate import Generation
from orcaserve.serve.metrics import Metrics
from orcaserve.serve.served_model import ServedModel
from orcaserve.serve.stream import CutOff, Stream, Update
from orcaserve.serve.terms import Terms

TEXT = "The quick fox"


class Full:
    """A pool with a single stream, in which there are all updates already."""

    def __init__(self, updates: list[Update]) -> None:
        self.stream = Stream([0], lambda index: None)
        for update in updates:
            self.stream.push(update)

    def submit_all(self, *args: Any, **options: Any) -> list[Stream]:
        return [self.stream]


def sample(metrics: Metrics, name: str) -> float:
    [line] = [line for line in metrics.render().decode().splitlines() if line.startswith(name + "{")]
    return float(line.split()[-1])


async def measured(model: ServedModel, updates: list[Update], arrived: float | None) -> Metrics:
    metrics = Metrics("m")
    generation = Generation(JOB, Terms(arrived=arrived), Full(updates), model.tokenizer, metrics)
    with suppress(ApiError):
        async for _ in generation:
            pass
    return metrics


def test_a_prompt_counts_once_it_has_been_computed(model_dir: Path) -> None:
    """One whose time was up in the queue cost nothing."""
    model, size = ServedModel("m", model_dir), len(JOB.prompts[0].ids)
    late = Update(choice=0, finish_reason="error", error="too late", cut_off="deadline_passed")
    for updates, count in (([late], 0), ([Update(choice=0, token_ids=(5,)), late], size)):
        metrics = asyncio.run(measured(model, updates, None))
        assert sample(metrics, "vllm:prompt_tokens_total") == count


def test_times_count_from_the_arrival_and_not_from_when_the_body_was_read(model_dir: Path) -> None:
    updates = [Update(choice=0, token_ids=(5,), finish_reason="length")]
    metrics = asyncio.run(measured(ServedModel("m", model_dir), updates, time.monotonic() - 1000))
    assert sample(metrics, "vllm:time_to_first_token_seconds_sum") >= 1000
    assert sample(metrics, "vllm:e2e_request_latency_seconds_sum") >= 1000


async def told(model: ServedModel, updates: list[Update], stops: list[str]) -> tuple[str, str | None, ApiError | None]:
    """Text, finish reason, and the error that ended it."""
    job, text, reason = replace(JOB, stops=StopStrings(stops)), "", None
    generation = Generation(job, Terms(), Full(updates), model.tokenizer, Metrics("m"))
    try:
        async for _, piece in generation:
            text += piece.text
            reason = piece.finish_reason or reason
    except ApiError as error:
        return text, reason, error
    return text, reason, None


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize(("cut_off", "status"), [("timeout", 408), ("draining", 503), (None, 500)])
@pytest.mark.parametrize(("stops", "text"), [([], TEXT), (["quick"], "The "), (["never"], TEXT)])
def test_tokens_before_an_error_count(
    model_dir: Path, size: int, cut_off: CutOff | None, status: int, stops: list[str], text: str
) -> None:
    """A stop string among them makes the response whole, as it would be if they had been read one by one."""
    model = ServedModel("m", model_dir)
    ids = model.tokenizer.encode(TEXT, add_special_tokens=False)
    updates = [Update(choice=0, token_ids=tuple(ids[at : at + size])) for at in range(0, len(ids), size)]
    failed = Update(choice=0, finish_reason="error", error="it broke", cut_off=cut_off)
    said, reason, error = asyncio.run(told(model, [*updates, failed], stops))
    assert said == text
    if text == TEXT:
        assert error is not None and (error.status, reason) == (status, None)
    else:
        assert (error, reason) == (None, "stop")
