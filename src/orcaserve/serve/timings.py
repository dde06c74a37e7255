"""Where the choices of a response spent their time, in the shape of the API."""

from __future__ import annotations

from orcaserve.serve.generate import Generation
from orcaserve.serve.protocol import ChoiceTiming


def choice_timings(generation: Generation) -> list[ChoiceTiming]:
    """Of every choice whose timing is known, by index. Seconds are rounded to microseconds."""
    return [
        ChoiceTiming(
            index=index,
            engine_ids=list(timing.ids),
            queue_seconds=round(timing.queue_seconds, 6),
            prefill_seconds=round(timing.prefill_seconds, 6),
            decode_seconds=round(timing.decode_seconds, 6),
            lost_seconds=round(timing.lost_seconds, 6),
            preemptions=timing.preemptions,
            recomputed_tokens=timing.recomputed_tokens,
            swapped_tokens=timing.swapped_tokens,
            cached_tokens=timing.cached_tokens,
            iterations=timing.iterations,
            mean_batch_mates=round(timing.mean_mates, 3),
            max_batch_mates=timing.most_mates,
        )
        for index, timing in enumerate(generation.timings)
        if timing is not None
    ]
