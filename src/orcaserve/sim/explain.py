"""The stories of a step log in plain words: one request's from its arrival to its end, and what all waited for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from orcaserve.core.scheduler import SchedulerConfig
from orcaserve.engine.step_log import Log, Submitted
from orcaserve.sim.story import Cause, Kind, Loss, Story, Stretch, Wait

ENDS = {
    None: "the log ends here",
    "stop": "an end token ended it",
    "length": "it had all its tokens",
    "error": "its row failed",
    "abort": "its client left, or what it asked for was complete",
}
_PHASES: tuple[Kind, ...] = ("queue", "prefill", "decode", "lost")
MOST_NAMED = 3  # requests that one line names
_AT_ONCE = 0.0005  # seconds: less is shown as nothing
_INDENT = " " * 20


class Reasoned(msgspec.Struct, frozen=True):
    """A reason for which requests waited: how long all together, how many, and how long one at most."""

    why: Cause
    seconds: float
    requests: int
    longest: float


def because(why: Cause, config: SchedulerConfig) -> str:
    """A reason, to follow "waited 1.2 s"."""
    match why:
        case "rows":
            return f"because all {config.max_batch_size} rows were taken"
        case "tokens":
            return f"because all {config.max_batch_tokens} tokens of an iteration were given out"
        case "blocks":
            return "because KV blocks were lacking"
        case "memory":
            return "because a running request was short of KV blocks itself"
        case "preemption":
            return "because KV blocks had just been taken away for an older request"
        case "closed":
            return "because the static batch was closed"
        case "shape":
            return "because it could not be stacked with those that ran"
        case "prefix":
            return "because another was computing the beginning of its prompt"
        case "yields":
            return "to make way for an older request as soon as its newest token was there"
        case "iteration":
            return "until the next iteration was put together"
        case "unknown":
            return "for reasons that this log does not hold"


def reasons(found: Iterable[Story]) -> list[Reasoned]:
    """What requests waited for in the queue, the longest sum first."""
    sums: dict[Cause, dict[int, float]] = {}
    for number, story in enumerate(found):
        for wait in story.waits:
            if not wait.is_left_out:
                of_one = sums.setdefault(wait.why, {})
                of_one[number] = of_one.get(number, 0.0) + wait.seconds
    table = [Reasoned(why, sum(by.values()), len(by), max(by.values())) for why, by in sums.items()]
    return sorted(table, key=lambda line: -line.seconds)


def overview(log: Log, found: Sequence[Story]) -> str:
    """A life in one line."""
    batches = [len(event.rows) for event in log.events if isinstance(event, Submitted)]
    ended = sum(story.end in ("stop", "length") for story in found)
    mean = sum(batches) / len(batches) if batches else 0.0
    losses = sum(len(story.losses) for story in found)
    return (
        f"{_count(len(found), 'request')}, {ended} of them answered, in {_s(_until(log))}; {len(batches)} iterations "
        f"of {mean:.1f} rows on average ({max(batches, default=0)} at most); {_count(losses, 'preemption')}; policy "
        f"{log.header.config.policy.name}, {log.header.config.num_blocks} KV blocks of {log.header.config.block_size}"
    )


def tell(story: Story, config: SchedulerConfig) -> Iterator[str]:
    """One request's story, a line for each thing that happened: the time, and what it was."""
    name = f" ({story.name})" if story.name else ""
    before = f", of which {story.done} were generated before a crash" if story.done else ""
    asked = f"a prompt of {_count(story.prompt, 'token')}, {story.max_tokens} more at most"
    yield f"request {story.id}{name}: {asked}{before}"
    events: list[tuple[float, int, str]] = [(story.arrived, 0, "arrived")]
    if story.began is not None:
        waited = _waited(story, story.arrived, story.began, config)
        known = f", {story.cached} of its tokens known to the prefix cache," if story.cached else ""
        events.append((story.began, 2, f"ran for the first time{known}{waited}"))
    if story.first_token is not None and not story.done:
        text = f"first token, {_s(story.first_token - story.arrived)} after its arrival"
        events.append((story.first_token, 4, text + _company("; its prompt took", story.stretches.get("prefill"))))
    for loss in story.losses:
        events += _loss(story, loss, config)
    for wait in _left_out(story):
        text = f"went on, after {_s(wait.seconds)} left out {because(wait.why, config)}"
        events.append((wait.end, 3, text))
    ended = ENDS[story.end]
    if story.end in ("stop", "length"):
        ended += f": {_count(story.generated, 'token')}"
    events.append((story.ended, 8, ended + _company("; decoding took", story.stretches.get("decode"))))
    if story.began is None:
        events[-1] = (story.ended, 8, f"{ended}; it never ran{_waited(story, story.arrived, story.ended, config)}")
    burned = story.seconds("burned")
    if burned:
        events.append((story.ended + burned, 9, "its static batch ended, in which it was computed on for nothing"))
    for at, _, text in sorted(events):
        yield from f"{at:11.3f} s  {text}".split("\n")
    yield from f"{'together':>11}    {_totals(story)}".split("\n")


def _loss(story: Story, loss: Loss, config: SchedulerConfig) -> Iterator[tuple[float, int, str]]:
    by = f" for request {loss.by}" if loss.by is not None else ""
    yield loss.at, 5, f"preempted{by}: the K and V of {_count(loss.tokens, 'token')} were lost"
    if loss.resumed is not None:
        yield loss.resumed, 6, f"ran again{_waited(story, loss.at, loss.resumed, config)}"
    if loss.caught_up is not None:
        yield loss.caught_up, 7, f"had computed as much again: {_s(loss.caught_up - loss.at)} lost"


def _totals(story: Story) -> str:
    parts = [f"{_s(story.seconds(kind))} {kind}" for kind in _PHASES if kind != "lost" or story.seconds(kind)]
    again = f", {_count(story.recomputed, 'token')} computed once more" if story.recomputed else ""
    return f"{_s(story.ended - story.arrived)} = {' + '.join(parts)}\n{_INDENT}{_iterations(story.together)}{again}"


def _waited(story: Story, begin: float, end: float, config: SchedulerConfig) -> str:
    """How long it waited then, and why: to follow "ran". Several reasons have a line each."""
    if end - begin < _AT_ONCE:
        return " at once"
    within = [wait for wait in story.waits if not wait.is_left_out and begin <= wait.begin and wait.end <= end]
    by_reason: dict[Cause, list[Wait]] = {}
    for wait in within:
        by_reason.setdefault(wait.why, []).append(wait)
    sums = sorted(
        ((sum(wait.seconds for wait in waits), waits) for waits in by_reason.values()), key=lambda one: -one[0]
    )
    listed = [(seconds, waits) for seconds, waits in sums if seconds >= _AT_ONCE] or sums[:1]
    texts = [f"{_s(seconds)} {_because(waits, config)}" for seconds, waits in listed]
    others = list(dict.fromkeys(id for wait in within for id in wait.others))
    if sum(wait.behind for wait in within) >= _AT_ONCE:
        named = ", ".join(map(str, others[:MOST_NAMED])) + (", …" if len(others) > MOST_NAMED else "")
        whom = f"request {named}" if len(others) == 1 else f"{len(others)} others in the queue ({named})"
        texts.append(f"{_s(sum(wait.behind for wait in within))} of it behind {whom}")
    if len(texts) == 1:
        return f" after {_s(end - begin)} {_because(listed[0][1], config)}"
    return "".join([f" after {_s(end - begin)}", *(f"\n{_INDENT}{text}" for text in texts)])


def _because(waits: Sequence[Wait], config: SchedulerConfig) -> str:
    """One reason, with what its first wait knows beyond that."""
    text, first = because(waits[0].why, config), waits[0]
    if first.why == "blocks" and first.holders:
        most = ", ".join(f"{id} ({count})" for id, count in first.holders)
        text += f" ({first.blocks} at first; of the requests that ran, {most} held most)"
    elif first.why == "memory" and first.by is not None:
        text = f"because request {first.by}, which ran, was short of KV blocks itself"
    elif first.why == "preemption" and first.by is not None:
        text = f"because KV blocks had just been taken away for request {first.by}"
    return text


def _left_out(story: Story) -> Iterator[Wait]:
    """Iterations that went without it: stretches of one reason that took time."""
    return (wait for wait in story.waits if wait.is_left_out and wait.seconds >= _AT_ONCE)


def _company(text: str, stretch: Stretch | None) -> str:
    return "" if stretch is None or not stretch.iterations else f"{text} {_iterations(stretch)}"


def _iterations(stretch: Stretch) -> str:
    mean, most = stretch.mean_mates, stretch.most_mates
    beside = "alone" if not most else f"beside {_count(most, 'other')}"
    if most and abs(mean - most) >= 0.05:
        beside = f"beside {mean:.1f} others on average ({most} at most)"
    return f"{_count(stretch.iterations, 'iteration')} {beside}"


def _until(log: Log) -> float:
    return log.events[-1].at if log.events else 0.0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _s(seconds: float) -> str:
    return f"{seconds:.3f} s"
