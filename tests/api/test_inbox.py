"""Requests that wait for their grammar on their way to the loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import msgspec
import pytest

from orcaserve import builtin
from orcaserve.core.request import NewRequest, Output, SamplingParams
from orcaserve.engine.messages import Abort, Command, Stats, Step, Stop, Submit
from orcaserve.serve.inbox import Releasing, SocketInbox
from orcaserve.serve.protocol import CompletionRequest
from orcaserve.serve.structured import Structures
from orcaserve.worker.grammars import GrammarError, Grammars

VOCAB_SIZE, ENDS = 3072, (1,)
SLOW = {"properties": {f"p{i}": {"pattern": f"^(a|b)*{i}$"} for i in range(400)}}


@pytest.fixture
def grammars() -> Grammars:
    return Grammars(builtin.MODEL_DIR, VOCAB_SIZE)


@pytest.fixture
def inbox(grammars: Grammars) -> SocketInbox:
    inbox = SocketInbox()
    inbox.grammars = grammars
    return inbox


def grammar(**fields: object) -> str:
    request = msgspec.convert({"prompt": "x", **fields}, CompletionRequest)
    found = asyncio.run(Structures(builtin.MODEL_DIR, VOCAB_SIZE, ENDS).grammar(request))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def slow() -> str:
    return grammar(guided_json=SLOW)


def submit(id: int, grammar: str | None = None) -> Submit:
    params = SamplingParams(grammar=grammar)
    return Submit(NewRequest(id=id, token_ids=(1, 2), num_prompt=2, max_tokens=5, params=params, end_token_ids=ENDS))


def ids(commands: list[Command]) -> list[int]:
    return [command.request.id for command in commands if isinstance(command, Submit)]


def test_who_is_ready_comes_in_first(inbox: SocketInbox, grammars: Grammars, slow: str) -> None:
    """A slow grammar holds up neither those without one nor those whose grammar is known."""
    known = grammar(guided_regex="[0-9]+")
    inbox.put(submit(1, known))
    assert ids(inbox.take(block=True)) == [1]
    for command in (submit(2, slow), submit(3), submit(4, known)):
        inbox.put(command)
    assert ids(inbox.take(block=True)) == [3, 4]
    [late] = inbox.take(block=True)
    assert isinstance(late, Submit) and late.request.id == 2
    assert late.waited > 0, "the time that it took counts as waiting"
    assert grammars.num_prepared == 3


class Held:
    """Compiles nothing; whoever prepares says when it is ready."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], None]] = []
        self.released: list[int] = []

    def prepare(self, request: NewRequest, ready: Callable[[], None]) -> None:
        self.ready.append(ready)

    def release(self, id: int) -> None:
        self.released.append(id)


def test_an_abort_does_not_overtake_its_request_as_it_becomes_ready() -> None:
    """The grammar is ready while the loop has the commands, and the abort comes at the same time."""
    for _ in range(300):
        inbox, held = SocketInbox(), Held()
        inbox.grammars = held
        inbox.put(submit(1, "g"))
        threads = [threading.Thread(target=held.ready[0]), threading.Thread(target=inbox.put, args=(Abort(1),))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        inbox.put(Stop())
        kinds = [type(command) for command in inbox.take(block=True)]
        assert kinds in ([Submit, Abort, Stop], [Stop]), kinds
        assert held.released == [1]


def test_who_is_cancelled_while_its_grammar_is_compiled_leaves_nothing(
    inbox: SocketInbox, grammars: Grammars, slow: str
) -> None:
    """Whether that has begun or not; and the loop never hears of it."""
    inbox.put(submit(1, slow))
    inbox.put(submit(2, slow + " "))
    inbox.put(Abort(2))
    inbox.put(Abort(1))
    inbox.put(submit(3, grammar(guided_regex="a")))  # compiled after them
    commands = inbox.take(block=True)
    assert ids(commands) == [3] and len(commands) == 1
    assert grammars.num_prepared == 1
    inbox.put(Abort(3))
    assert inbox.take(block=True) == [Abort(3)]
    assert grammars.num_prepared == 0


def test_what_has_ended_is_let_go_of(inbox: SocketInbox, grammars: Grammars) -> None:
    steps: list[Step] = []

    class Outbox:
        def put(self, step: Step) -> None:
            steps.append(step)

    releasing = Releasing(Outbox(), grammars)
    for id in (1, 2):
        inbox.put(submit(id, grammar(guided_regex="a")))
    while grammars.num_prepared and len(ids(inbox.take(block=True))) == 0:
        pass
    step = Step(outputs=(Output(id=1, token_ids=(5,)), Output(id=2, finish_reason="stop")), stats=Stats())
    releasing.put(step)
    assert steps == [step] and grammars.num_prepared == 1


def test_the_loop_can_be_stopped_meanwhile(inbox: SocketInbox, slow: str) -> None:
    inbox.put(submit(1, slow))
    inbox.put(Stop())
    assert inbox.take(block=True) == [Stop()]


def test_what_cannot_be_compiled_is_ready_too_and_its_row_says_why(grammars: Grammars) -> None:
    """In the words in which it would have said so without being prepared."""
    from test_grammar_walks import Response

    over = threading.Event()
    bad = submit(1, "this is no grammar").request
    grammars.prepare(bad, over.set)
    assert over.wait(30)
    prepared, alone = Response("this is no grammar", id=1), Response("this is no grammar", id=2)
    grammars.look([prepared, alone])
    assert isinstance(prepared.allowed, GrammarError)
    assert str(prepared.allowed) == str(alone.allowed)
