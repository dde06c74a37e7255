"""R1, R2, R3: requests of random shape, of clients that hang up and are cancelled, over a KV cache far too small.

What is left behind, whether each token came once, and whether each reply has the bits that it has alone. Of servers of
other makes the same is asked as far as their API goes: nobody is cancelled there, and the KV cache is what it is.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import httpx
from e2e.serving import Serving

from torture.asking import Ask, Reply, ask_all, faults, new_client
from torture.neighbours import known_features, model_of
from torture.rows import Outcome, Row, Setup
from torture.shapes import COMMON, OURS, TWIN, draw
from torture.shrink import shrink
from torture.watching import WATCHED, all_holdings, holdings, leftovers, metrics

R1 = Row(
    "R1",
    "10 000 HTTP requests of random shape; 30 % disconnect at a random point, 10 % cancelled, KV pool so small that "
    "there are ≥ 1 000 preemptions",
    "2 s later: every KV block free or cached, no request, fd, task or shared memory left",
)
R2 = Row("R2", "same run", "no token lost or repeated; exactly one finish per choice; stream == non-stream")
R3 = Row(
    "R3",
    "same run against solo runs, greedy and seeded, fp32 and bf16, any pipeline depth",
    "bit-identical ids and logprobs, all of them",
)
ROWS = (R1, R2, R3)
HAS_NEIGHBOURS = True

IN_FLIGHT = 48
_BOTH = ("--max-model-len", "256")
_CROWDED = (*_BOTH, "--threads", "2", "--max-batch-tokens", "64", "--max-batch-size", "32", "--check")


@dataclass(frozen=True)
class Variant:
    """Options of the server in the crowd, and of the one that answers alone, which has another pace and room."""

    name: str
    crowded: tuple[str, ...]
    alone: tuple[str, ...]


VARIANTS = (
    Variant("float32", ("--dtype", "float32", "--kv-memory", "1536KiB"), ("--dtype", "float32")),
    Variant(
        "bfloat16", ("--dtype", "bfloat16", "--kv-memory", "768KiB", "--policy", "priority"), ("--dtype", "bfloat16")
    ),
    Variant(
        "bfloat16 in two stages",
        ("--dtype", "bfloat16", "--kv-memory", "768KiB", "--pipeline-parallel-size", "2", "--swap-space", "2MiB"),
        ("--dtype", "bfloat16"),
    ),
)


@dataclass
class Crowd:
    """What one run has shown. Owned by `run`.

    left: what there was still when patience ended, and clean_after the seconds until there was nothing more.
    wrong, unequal: by the request's number, what R2 and R3 object to. pairs: requests asked streamed and not.
    """

    replies: dict[int, Reply] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    clean_after: float = 0.0
    preemptions: int = 0
    wrong: dict[int, str] = field(default_factory=dict)
    unequal: dict[int, str] = field(default_factory=dict)
    pairs: int = 0
    solos: int = 0

    @property
    def fails(self) -> bool:
        return bool(self.left or self.wrong or self.unequal)

    @property
    def why(self) -> str:
        found = [*self.left, *(f"request {number}: {why}" for number, why in (self.wrong | self.unequal).items())]
        return found[0] if found else ""


def torture(setup: Setup) -> Iterator[Outcome]:
    if setup.url is not None:
        yield from _neighbour(setup, setup.url)
        return
    chance = setup.random("variants")
    variants = VARIANTS if setup.scale == "full" else chance.sample(VARIANTS[:2], 1)
    count = setup.size("requests", 150, 10_000)
    crowds: dict[str, Crowd] = {}
    trace: list[str] = []
    for variant in variants:
        asks = [draw(setup, variant.name, number, OURS) for number in range(count)]
        crowds[variant.name] = crowd = run(setup, variant, asks)
        if crowd.fails:
            trace += _smaller(setup, variant, asks, crowd)
    yield from _outcomes(setup, crowds, tuple(trace))


def run(setup: Setup, variant: Variant, asks: Sequence[Ask]) -> Crowd:
    """The crowd, what it leaves behind, and as many of its requests as are wanted alone on a server of their own."""
    crowd = Crowd()
    with ExitStack() as servers:
        server, alone = _started(variant, servers)
        warm = [draw(setup, f"warm {variant.name}", number, OURS) for number in range(IN_FLIGHT)]
        asyncio.run(_rush(server.url, warm))
        before = _at_rest(server.url, lambda: all_holdings(server))
        crowd.replies = asyncio.run(_rush(server.url, asks))
        _clean(setup, crowd, lambda: leftovers(server.url, before, all_holdings(server)))
        crowd.preemptions = int(server.gauge("vllm:num_preemptions_total"))
        told = [one for one in asks if crowd.replies[one.number].choices]
        chosen = setup.random("solos").sample(told, min(len(told), setup.size("solos", 40, 2500)))
        solos = asyncio.run(_alone(alone.url, [one.alone(stream=not one.streams) for one in chosen]))
    _judge(crowd, asks)
    _compare(crowd, solos)
    return crowd


def _started(variant: Variant, servers: ExitStack) -> tuple[Serving, Serving]:
    """The server of the crowd and the one that answers alone, which start at the same time and end with the stack."""
    with ThreadPoolExecutor() as starting:
        other = starting.submit(Serving, *_BOTH, "--threads", "1", *variant.alone)
        try:
            server = servers.enter_context(Serving(*_CROWDED, *variant.crowded, program=(WATCHED,)))
        finally:
            alone = servers.enter_context(other.result())
    return server, alone


def _at_rest(url: str, look: Callable[[], dict[str, int]]) -> dict[str, int]:
    """What a server holds when it has been idle for a while; as it is after half a minute if it never seems so."""
    end = time.monotonic() + 30
    held = look()
    while leftovers(url, held, now := look()) or now != held:
        held = now
        if time.monotonic() > end:
            break
        time.sleep(0.3)
    return held


def _clean(setup: Setup, crowd: Crowd, look: Callable[[], list[str]]) -> None:
    """Until nothing is left, or patience ends."""
    began = time.monotonic()
    while (left := look()) and time.monotonic() < began + setup.size("patience", 20, 2):
        time.sleep(0.05)
    crowd.left, crowd.clean_after = left, time.monotonic() - began


async def _rush(url: str, asks: Sequence[Ask]) -> dict[int, Reply]:
    async with new_client(url, IN_FLIGHT) as client, httpx.AsyncClient(base_url=url, trust_env=False) as operator:
        wishes = {one.headers["x-request-id"]: one.patience[1] / 2 for one in asks if one.fate == "cancelled"}
        cancelling = asyncio.create_task(_cancel(operator, wishes)) if wishes else None
        try:
            return await ask_all(client, asks, IN_FLIGHT)
        finally:
            if cancelling is not None:
                cancelling.cancel()
                await asyncio.gather(cancelling, return_exceptions=True)


async def _cancel(operator: httpx.AsyncClient, wishes: Mapping[str, float]) -> None:
    """Cancels requests so many seconds after the server has told of them. Some have ended by then."""

    async def one(id: int, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await operator.post("/page/cancel", json={"id": id}, timeout=60)

    async with asyncio.TaskGroup() as tasks, operator.stream("GET", "/page/events", timeout=None) as feed:
        async for line in feed.aiter_lines():
            for event in json.loads(line[5:])["events"] if line.startswith("data:") else ():
                seconds = wishes.get(event.get("name", "").partition("-")[2]) if event["type"] == "arrived" else None
                if seconds is not None:
                    tasks.create_task(one(event["id"], seconds))


async def _alone(url: str, asks: Sequence[Ask]) -> dict[int, Reply]:
    async with new_client(url, 1) as client:
        return await ask_all(client, asks, 1)


# -- judging ---------------------------------------------------------------------------------------------------------


def _judge(crowd: Crowd, asks: Sequence[Ask]) -> None:
    """Each reply by itself, and with its twin's."""
    for one in asks:
        reply = crowd.replies[one.number]
        found = faults(one, reply)
        if reply.is_whole and not reply.is_done:
            found.append("it ended without [DONE]")
        if found:
            crowd.wrong[one.number] = "; ".join(found)
        twin = crowd.replies.get(one.number - 1) if one.number % TWIN == TWIN - 1 else None
        if twin is None or not (twin.is_whole or reply.is_whole):
            continue
        crowd.pairs += 1
        part, whole = (reply, twin) if twin.is_whole else (twin, reply)
        if difference := part.differs(whole):
            crowd.wrong[one.number] = f"streamed and not it differs: {difference}"


def _compare(crowd: Crowd, solos: Mapping[int, Reply]) -> None:
    """Whatever came of a request with what it gets alone, the other way, streamed or not."""
    crowd.solos = len(solos)
    for number, solo in solos.items():
        reply = crowd.replies[number]
        if not solo.is_whole:
            crowd.unequal[number] = f"alone it gets {solo.broken or solo.error or solo.faults}"
        elif difference := reply.differs(solo):
            crowd.unequal[number] = f"not as alone: {difference}"


def _smaller(setup: Setup, variant: Variant, asks: Sequence[Ask], crowd: Crowd) -> list[str]:
    """The fewest requests found that fail again, written down, and how to repeat the whole."""
    latest = crowd

    def fails(fewer: Sequence[Ask]) -> bool:
        nonlocal latest
        again = run(setup, variant, fewer)
        latest = again if again.fails else latest
        return again.fails

    fewer = shrink(asks, fails, setup.size("shrinks", 4, 16))
    path = setup.folder / f"crowd-{variant.name.replace(' ', '-')}.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in fewer))
    return [
        f"{variant.name}: {len(fewer)} of {len(asks)} requests fail still, {path.name} has them: {latest.why[:500]}",
        f"python -m torture --rows R1 --seed {setup.seed} --scale {setup.scale} --size requests={len(asks)}",
    ]


# -- in words --------------------------------------------------------------------------------------------------------


def _outcomes(setup: Setup, crowds: Mapping[str, Crowd], trace: tuple[str, ...]) -> Iterator[Outcome]:
    runs = list(crowds.values())
    replies = [reply for crowd in runs for reply in crowd.replies.values()]
    errors = [reply.error for reply in replies]
    late = sum(error not in (None, "cancelled") for error in errors)
    preemptions = sum(crowd.preemptions for crowd in runs)
    left = [f"{name}: {what}" for name, crowd in crowds.items() for what in crowd.left]
    enough = preemptions >= (1000 if setup.scale == "full" and "requests" not in setup.sizes else 1)
    yield Outcome(
        R1,
        f"{len(replies)} requests ({', '.join(crowds)}): {sum(reply.has_left for reply in replies)} hung up, "
        f"{errors.count('cancelled')} cancelled, {late} refused or ended by deadlines, {preemptions} preemptions; "
        + (f"left: {'; '.join(left)}" if left else f"nothing left {_longest(runs):.1f} s later"),
        not left and enough,
        "" if enough else "too few preemptions",
        trace if left else (),
    )
    yield _exactly_once(crowds, trace)
    unequal = sum(len(crowd.unequal) for crowd in runs)
    yield Outcome(
        R3,
        ", ".join(f"{one.solos - len(one.unequal)} of {one.solos} ({name})" for name, one in crowds.items())
        + " have the ids and the bits of log-probability that they have alone",
        unequal == 0,
        trace=trace if unequal else (),
    )


def _longest(runs: Sequence[Crowd]) -> float:
    return max(crowd.clean_after for crowd in runs)


def _exactly_once(crowds: Mapping[str, Crowd], trace: tuple[str, ...]) -> Outcome:
    runs = list(crowds.values())
    wrong = sum(len(crowd.wrong) for crowd in runs)
    replies = [reply for crowd in runs for reply in crowd.replies.values()]
    finishes = sum(choice.finish is not None for reply in replies for choice in reply.choices.values())
    tokens = sum(len(choice.ids or ()) for reply in replies for choice in reply.choices.values())
    return Outcome(
        R2,
        f"{wrong} of {len(replies)} replies wrong; {finishes} choices with one finish each, {tokens} tokens; "
        f"{sum(crowd.pairs for crowd in runs)} pairs compared streamed and not",
        wrong == 0,
        trace=trace if wrong else (),
    )


# -- servers of other makes ------------------------------------------------------------------------------------------


def _neighbour(setup: Setup, url: str) -> Iterator[Outcome]:
    model = model_of(setup, url)
    features = asyncio.run(known_features(setup, url, model))
    count = setup.size("requests", 100, 1000)
    asks = [draw(setup, "neighbour", number, features, model) for number in range(count)]
    pid = setup.sizes.get("pid")

    def look() -> dict[str, int]:
        return holdings(pid) if pid is not None else {}

    warm = [draw(setup, "warm", number, features, model) for number in range(setup.size("warm", IN_FLIGHT, IN_FLIGHT))]
    asyncio.run(_rush(url, warm))
    before = _at_rest(url, look)
    crowd = Crowd(replies=asyncio.run(_rush(url, asks)))
    # Some servers write their gauges down only when they compute something.
    asyncio.run(_alone(url, [warm[0].alone(stream=False)]))
    _clean(setup, crowd, lambda: leftovers(url, before, look()))
    chosen = setup.random("solos").sample(asks, min(count, setup.size("solos", 40, 300)))
    same = asyncio.run(_alone(url, [one.alone(stream=one.streams) for one in chosen]))
    flipped = asyncio.run(_alone(url, [one.alone(stream=not one.streams) for one in chosen]))
    lacking = ", ".join(name for name in COMMON if name not in features)
    yield from _of_neighbour(url, asks, crowd, (same, flipped), f"it has no {lacking}" if lacking else "")


def _of_neighbour(
    url: str, asks: Sequence[Ask], crowd: Crowd, solos: tuple[Mapping[int, Reply], Mapping[int, Reply]], lacks: str
) -> Iterator[Outcome]:
    same, flipped = solos
    known = metrics(url)
    gauges = [name for name in ("vllm:num_requests_running", "llamacpp:requests_processing") if name in known]
    preemptions = known.get("vllm:num_preemptions_total")
    figure = f"{len(asks)} requests, {sum(reply.has_left for reply in crowd.replies.values())} hung up"
    figure += "" if preemptions is None else f", {preemptions:.0f} preemptions"
    figure += f"; left {crowd.clean_after:.1f} s later: {'; '.join(crowd.left) or 'nothing'}"
    if gauges:
        yield Outcome(R1, figure, not crowd.left, "what its metrics, and its process if its id was given, say")
    else:
        yield Outcome(R1, figure, None, "it has no metrics of what runs and waits")
    for one in asks:
        if found := faults(one, crowd.replies[one.number]):
            crowd.wrong[one.number] = "; ".join(found)
    pairs = [(same[number], flipped[number]) for number in same if same[number].is_whole and flipped[number].is_whole]
    alike = sum(_texts(one) == _texts(other) for one, other in pairs)
    whys = tuple(f"request {number}: {why}"[:500] for number, why in list(crowd.wrong.items())[:5])
    yield Outcome(
        R2,
        f"{len(crowd.wrong)} of {len(asks)} replies wrong; {alike} of {len(pairs)} texts equal streamed and not, alone",
        not crowd.wrong and alike == len(pairs),
        lacks,
        whys,
    )
    yield _equal_to_solo(asks, crowd, same, lacks)


def _equal_to_solo(asks: Sequence[Ask], crowd: Crowd, solos: Mapping[int, Reply], lacks: str) -> Outcome:
    """Texts of whole replies, greedy and seeded; ids and log-probabilities where the server gives them."""
    counts = {"greedy texts": [0, 0], "seeded texts": [0, 0], "ids": [0, 0], "log-probabilities": [0, 0]}

    def count(name: str, is_equal: bool) -> None:
        counts[name][0] += is_equal
        counts[name][1] += 1

    for one in asks:
        reply, solo = crowd.replies[one.number], solos.get(one.number)
        if solo is None or not (solo.is_whole and reply.is_whole):
            continue
        count("seeded texts" if "seed" in one.body else "greedy texts", _texts(reply) == _texts(solo))
        choices = [(choice, solo.choices[index]) for index, choice in reply.choices.items() if index in solo.choices]
        if any(choice.ids is not None for choice, _ in choices):
            count("ids", all(choice.ids == other.ids for choice, other in choices))
        if any(choice.logprobs for choice, _ in choices):
            count("log-probabilities", all(choice.logprobs == other.logprobs for choice, other in choices))
    figure = ", ".join(f"{equal} of {asked} {name}" for name, (equal, asked) in counts.items() if asked)
    if not figure:
        return Outcome(R3, "", None, "no reply was whole both in the crowd and alone")
    return Outcome(R3, f"equal to solo: {figure}", all(equal == asked for equal, asked in counts.values()), lacks)


def _texts(reply: Reply) -> dict[int, tuple[str, str | None]]:
    return {index: (choice.text, choice.finish) for index, choice in reply.choices.items()}
