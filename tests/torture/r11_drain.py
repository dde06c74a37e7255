"""R11: SIGTERM while 50 streams run or wait. All get what they get undisturbed, new requests are refused in words.

A server of another make is asked the same if its process may be ended: `--size pid=N` names it. What it exits with
cannot be seen then.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import httpx
from e2e.serving import Serving, is_alive

from torture.asking import Ask, Reply, ask_all, faults, new_client
from torture.neighbours import known_features, model_of
from torture.rows import Outcome, Row, Setup
from torture.shapes import OURS
from torture.watching import metrics, processes

ROWS = (Row("R11", "SIGTERM with 50 streams", "all finish, exit 0"),)
HAS_NEIGHBOURS = True

STREAMS = 50
_PROMPTS = ["Once upon a time", "The fox", "In the morning", "Tell me about the sea.", "A small boat"]


@dataclass
class Drain:
    """What one drain has shown. Owned by `_drained`.

    refusals: how new requests were answered, and how often. unfinished: streams that ran or waited at the signal.
    """

    replies: dict[int, Reply] = field(default_factory=dict)
    refusals: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0


def torture(setup: Setup) -> Iterator[Outcome]:
    if setup.url is not None:
        yield _neighbour(setup, setup.url)
        return
    asks = _streams(setup, OURS, {"return_token_ids": True, "logprobs": 1})
    with Serving("--max-batch-size", "32", "--kv-memory", "16MiB") as server:
        calm = asyncio.run(_calm(server.url, asks))
        pid = server.process.pid
        family = [process.pid for _, process in processes(pid)]
        taken = 2 * len(asks)  # those of the calm, and these
        drain = asyncio.run(
            _drained(server.url, pid, asks, lambda: metrics(server.url)["vllm:request_prompt_tokens_count"] >= taken)
        )
        code = server.process.wait(60)
        orphans = sum(map(is_alive, family))
    equal = sum(drain.replies[number].differs(reply) is None for number, reply in calm.items())
    refused = {"503 draining, Retry-After", "nobody listens"}
    yield Outcome(
        ROWS[0],
        f"{drain.unfinished} of {len(asks)} streams unfinished at the signal, {_ended(asks, drain)} finished, {equal} "
        f"as undisturbed; exit {code}, {orphans} processes left; new requests: {_said(drain)}",
        _ended(asks, drain) == equal == len(asks)
        and code == orphans == 0 < drain.unfinished
        and "503 draining, Retry-After" in drain.refusals
        and set(drain.refusals) <= refused,
        trace=_wrong(asks, drain),
    )


def _streams(setup: Setup, features: Collection[str], more: Mapping[str, object]) -> list[Ask]:
    """Long enough that all of them have begun, or wait, before the first one ends."""
    found = []
    for number in range(setup.size("streams", STREAMS, STREAMS)):
        chance = setup.random("drain", number)
        body: dict[str, object] = {"prompt": chance.choice(_PROMPTS), "max_tokens": chance.randint(30, 80)}
        body |= {"temperature": 1.0, "seed": number} if "seed" in features and number % 2 else {"temperature": 0}
        if "ignore_eos" in features:
            body["ignore_eos"] = True
        found.append(Ask(number, "completions", {**body, **more, "stream": True}))
    return found


async def _calm(url: str, asks: Sequence[Ask]) -> dict[int, Reply]:
    async with new_client(url, len(asks)) as client:
        return await ask_all(client, asks, len(asks))


async def _drained(url: str, pid: int, asks: Sequence[Ask], is_time: Callable[[], bool], silence: float = 600) -> Drain:
    """The streams, and the signal when some of them have begun and it is time; new requests all the while."""
    drain = Drain()
    seen: dict[int, Reply] = {}
    async with new_client(url, len(asks), silence) as client:
        running = asyncio.create_task(ask_all(client, asks, len(asks), lambda reply: seen.update({id(reply): reply})))
        while not (seen and await asyncio.to_thread(is_time)) and not running.done():
            await asyncio.sleep(0.01)
        finished = sum(choice.finish is not None for reply in seen.values() for choice in reply.choices.values())
        drain.unfinished = len(asks) - finished
        os.kill(pid, signal.SIGTERM)
        refusing = asyncio.create_task(_refusals(url, drain))
        drain.replies = await running
        await asyncio.sleep(0.2)
        refusing.cancel()
        await asyncio.gather(refusing, return_exceptions=True)
    return drain


async def _refusals(url: str, drain: Drain) -> None:
    """Asks again and again. What is asked before the first refusal may be served: a signal takes a moment to arrive."""
    body = {"prompt": "x", "max_tokens": 1}
    while True:
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
            try:
                response = await client.post("/v1/completions", json=body)
            except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
                # The kernel may have taken a connection up that the server, at its end, did not see any more.
                drain.refusals["nobody listens"] += 1
            except httpx.HTTPError as error:
                drain.refusals[type(error).__name__] += 1
            else:
                if response.status_code != 200:
                    drain.refusals[_refusal(response)] += 1
                elif drain.refusals:
                    drain.refusals["served after a refusal"] += 1
        await asyncio.sleep(0.02)


def _refusal(response: httpx.Response) -> str:
    try:
        code = response.json()["error"]["code"]
    except (ValueError, LookupError, TypeError):
        code = "without a code"
    return f"{response.status_code} {code}" + (", Retry-After" if "retry-after" in response.headers else "")


def _ended(asks: Sequence[Ask], drain: Drain) -> int:
    return sum(drain.replies[one.number].is_whole and not faults(one, drain.replies[one.number]) for one in asks)


def _said(drain: Drain) -> str:
    return ", ".join(f"{count} × {what}" for what, count in drain.refusals.items()) or "none was refused"


def _wrong(asks: Sequence[Ask], drain: Drain) -> tuple[str, ...]:
    found = [(one.number, faults(one, drain.replies[one.number])) for one in asks]
    return tuple(f"stream {number}: {'; '.join(why)}" for number, why in found if why)[:5]


def _neighbour(setup: Setup, url: str) -> Outcome:
    if (pid := setup.sizes.get("pid")) is None:
        return Outcome(ROWS[0], "", None, "it is not ours to end; --size pid=N would allow it")
    model = model_of(setup, url)
    asks = _streams(setup, asyncio.run(known_features(setup, url, model)), {"model": model})
    time_is_up = time.monotonic() + setup.size("lead", 2, 2)  # seconds that it has to take all of them
    drain = asyncio.run(_drained(url, pid, asks, lambda: time.monotonic() > time_is_up, setup.size("silence", 30, 60)))
    end = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    ended = _ended(asks, drain)
    return Outcome(
        ROWS[0],
        f"{drain.unfinished} of {len(asks)} streams unfinished at the signal, {ended} finished; "
        f"{'it has not ended' if is_alive(pid) else 'it has ended'}; new requests: {_said(drain)}",
        ended == len(asks) and not is_alive(pid),
        "its exit code cannot be seen",
        _wrong(asks, drain),
    )
