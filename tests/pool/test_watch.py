"""`Watch`, `FrameReader`, `Receiver` and `FlightRecorder` by themselves: no process, no clock."""

import random
import socket

import msgspec
import pytest

from orcaserve.core.config import EngineInfo
from orcaserve.core.request import NewRequest, Output, SamplingParams, TokenLogprobs
from orcaserve.engine.framing import FrameReader, encode
from orcaserve.engine.messages import Abort, Stats, Step, Stop, Submit
from orcaserve.serve.flight_recorder import FlightRecorder, Record
from orcaserve.serve.frames import Beat, Failed, FromEngine, Loading, Ready, ToEngine
from orcaserve.serve.supervisor import Watch
from orcaserve.worker.receiver import Receiver

READY = Ready(
    EngineInfo(
        architecture="none", dtype="none", vocab_size=9, max_model_len=9, block_size=1, num_blocks=9, profile="none"
    )
)
STEP = Step(num_tokens=10, seconds=1.0, stats=Stats())


def test_three_missed_beats_of_a_process_that_does_nothing() -> None:
    watch = Watch(0.0)
    watch.hear(READY, 0.0)
    verdicts = []
    for tick in range(1, 8):
        if tick <= 3:
            watch.hear(Beat(), tick)
        verdicts.append(watch.tick(tick, False, "asleep"))
    assert verdicts == [None, None, None, None, None, "frozen", "frozen"]


@pytest.mark.parametrize(
    ("pulse", "first", "most"),
    [
        (range(1000), READY, 40),
        ([None] * 1000, READY, 40),
        (["asleep"] * 1000, Loading("weights", 1, 2), 40),
        (range(1000), Loading("weights", 1, 2), 240),
    ],
)
def test_a_process_that_works_or_loads_may_be_late_but_not_silent(
    pulse: list[object], first: FromEngine, most: int
) -> None:
    watch = Watch(0.0)
    watch.hear(first, 0.0)
    verdicts = [watch.tick(tick, False, pulse[tick]) for tick in range(most + 1)]
    assert verdicts[:most] == [None] * most
    assert verdicts[-1] == "frozen"


def test_a_frontend_that_was_held_up_blames_nobody() -> None:
    watch = Watch(0.0)
    watch.tick(1.0, True, "asleep")
    watch.hear(Beat(), 500.0)
    watch.hear(STEP, 500.0)
    assert watch.tick(500.0, True, "asleep") is None


def test_a_step_is_stuck_when_it_takes_far_longer_than_its_tokens_should() -> None:
    watch = Watch(0.0)

    def verdict(now: float, is_busy: bool = True) -> str | None:
        watch.hear(Beat(num_tokens=100), now)
        return watch.tick(now, is_busy, None)

    assert verdict(299) is None  # the first step has no measure
    watch.hear(STEP, 299.0)  # 0.1 s a token, so that 100 tokens should take 10 s
    assert watch.limit == pytest.approx(0.1 * 100 * 20)
    assert verdict(299 + 199) is None
    assert watch.age(299 + 199) == 199
    assert verdict(299 + 201) == "stuck"
    assert verdict(600, is_busy=False) is None
    assert verdict(1000, is_busy=False) is None
    assert verdict(1199) is None  # idleness is no progress, and needs none


def test_frames_survive_any_tear() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    request = NewRequest(
        id=2**40,
        token_ids=tuple(range(300)),
        num_prompt=200,
        max_tokens=9,
        params=SamplingParams(stop=("é",), logit_bias=((3, -1.5),), logprobs=2),
        seed=2**63 - 1,
    )
    down = [Submit(request), Abort(5), Stop()] * 20
    entry = TokenLogprobs(3, -0.1000000014901161, 1, ((3, -0.1000000014901161),))
    output = Output(id=1, token_ids=(3,), logprobs=(entry,), finish_reason="stop")
    up = [
        Step(outputs=(output,), started=(1,), stats=Stats(num_steps=3)),
        Beat(3, Stats()),
        Loading("a", 1, 2),
        Failed("b"),
    ]
    for frames, union in ((down, ToEngine), (up, FromEngine)):
        data = b"".join(map(encode, frames))
        reader, got = FrameReader(union), []
        while data:
            cut = rng.choice([1, 3, 7, 100, 10_000])
            got += reader.feed(data[:cut])
            data = data[cut:]
        assert got == frames


def test_a_receiver_takes_no_new_memory() -> None:
    """What it took and gave back, 256 KiB a frame, made the heaps of threads grow: nothing small found room again."""
    ours, theirs = socket.socketpair()
    with ours:
        receiver = Receiver(ours)
        with theirs:
            theirs.sendall(b"one")
            first = receiver.receive()
            assert bytes(first) == b"one"
            theirs.sendall(b"another")
            second = receiver.receive()
            assert bytes(second) == b"another" and second.obj is first.obj
        assert not receiver.receive()


def test_a_frame_of_another_kind_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        FrameReader(FromEngine).feed(encode(Stop()))


def test_the_flight_recorder_keeps_the_last_record() -> None:
    recorder = FlightRecorder.create()
    try:
        assert recorder.read() is None
        recorder.hear(0)
        assert recorder.read() == Record()
        for heard, ids in enumerate(((1, 2, 3), tuple(range(2**40, 2**40 + 1000)), (), (7,)), start=2**50):
            recorder.fly(ids)
            recorder.hear(heard)
            assert recorder.read() == Record(heard, ids)
    finally:
        recorder.close()
