"""`SocketInbox`: commands on their way to the loop, and requests that wait there until their grammar is compiled."""

from __future__ import annotations

import threading
import time
from functools import partial

from orcaserve.engine.executor import Preparing
from orcaserve.engine.loop import Outbox
from orcaserve.engine.messages import Abort, Command, Step, Submit


class SocketInbox:
    """Commands as they come from the socket, which it times. Filled by the reader thread, emptied by the loop.

    A request that follows a grammar is let in once that is compiled: to the loop it has come late, and nobody waits for
    it. Owner of those that are not ready, which the thread that compiles takes from it, too. grammars: who compiles;
    None: nobody has to.
    """

    def __init__(self) -> None:
        self.grammars: Preparing | None = None
        self._unready: dict[int, tuple[float, Submit]] = {}
        self._commands: list[tuple[float, Command]] = []
        self._some = threading.Condition()

    def put(self, command: Command) -> None:
        came = time.monotonic()
        if self.grammars is not None and isinstance(command, Submit) and command.request.params.grammar is not None:
            id = command.request.id
            with self._some:
                self._unready[id] = came, command
            self.grammars.prepare(command.request, partial(self._is_ready, id))
            return
        with self._some:
            is_unready = isinstance(command, Abort) and self._unready.pop(command.id, None) is not None
            if not is_unready:
                self._let_in(came, command)
        if is_unready and self.grammars is not None and isinstance(command, Abort):
            self.grammars.release(command.id)

    def take(self, block: bool) -> list[Command]:
        with self._some:
            while block and not self._commands:
                self._some.wait()
            commands, self._commands = self._commands, []
        if self.grammars is not None:
            for _, command in commands:
                if isinstance(command, Abort):  # no batch has it from here on
                    self.grammars.release(command.id)
        now = time.monotonic()
        return [
            Submit(command.request, now - came) if isinstance(command, Submit) else command
            for came, command in commands
        ]

    def _is_ready(self, id: int) -> None:
        with self._some:  # an abort comes before this, or after what it is about
            if (waiting := self._unready.pop(id, None)) is not None:
                self._let_in(*waiting)

    def _let_in(self, came: float, command: Command) -> None:
        """The lock is held."""
        self._commands.append((came, command))
        self._some.notify()


class Releasing:
    """The loop's way out, on which the grammars of requests that have ended are let go of."""

    def __init__(self, outbox: Outbox, grammars: Preparing) -> None:
        self._outbox = outbox
        self._grammars = grammars

    def put(self, step: Step) -> None:
        for output in step.outputs:
            if output.finish_reason is not None:
                self._grammars.release(output.id)
        self._outbox.put(step)
