"""`Pace`: learns what iterations take, and says how much of the prompts one may read while streams run.

The time between two tokens of a stream is a turn of the pipe: from the return of a batch that carries it to the return
of the next one that does. With one stage that is one iteration; with several, and as many batches in flight, it is as
many.

Only what the scheduler is told decides, in plain arithmetic: the same calls at the same times learn the same.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from math import sqrt
from typing import NamedTuple

from orcaserve.core.batch import Batch, ScheduledRequest
from orcaserve.core.slack import Slack

SMALLEST_CHUNK = 32  # tokens: less of a prompt is not worth an iteration of its own
GROWTH = 2  # a chunk may be so many times the longest one whose time is known
LEAST_SHARE = 1 / 8  # prompts may always take so much of the time that the decodes beside them take

KEPT = 0.99  # of what is known, at every iteration of its kind: some hundred of them count
SWEEPS = 4
SOLVED_EVERY = 8  # iterations that only decode, of which the next one tells little new
HUBER = 2.0  # spreads from which on an error counts by its size, not its square
BOUND = 4.0  # no iteration is taken to be off by more than so many times its expected time
SHARE = 0.9  # of the iterations with prompts are to stay below the limit
MOST_SLACK = 1.5
SLACK_STEP = 0.02


class Load(NamedTuple):
    """What batches hold, as the cost counts it; also a mean of several.

    tokens: of rows with several tokens, which read prompts. decodes: rows of one token. context: tokens whose K and V
    are read. pairs: of query and key in the rows that read prompts; those of a decode are its context.
    """

    tokens: float
    batches: float
    decodes: float
    context: float
    pairs: float


NOTHING = Load(0, 0, 0, 0, 0)


def load_of(rows: Iterable[ScheduledRequest]) -> Load:
    """The load of one batch."""
    tokens = decodes = context = pairs = 0
    for row in rows:
        count = row.num_tokens
        end = row.start + count
        context += end
        if count == 1:
            decodes += 1
        else:
            tokens += count
            pairs += count * row.start + count * (count + 1) // 2
    return Load(tokens, 1, decodes, context, pairs)


class IterationCost:
    """Seconds of an iteration, learned while iterations run: a sum of five terms from 0 on, one for each field of Load.

    Least squares of relative errors, as in `orcaserve.sim.fit`, but with normal equations that forget. Iterations that
    only decode and iterations that read prompts have equations of their own, so that an hour of the ones does not wash
    out what is known of the others. What is disturbed counts by the size of its error, not its square (Huber).
    """

    def __init__(self) -> None:
        self._terms = [0.0] * len(NOTHING)
        self._reading, self._decoding = _Equations(), _Equations()
        self._unsolved = 0

    def __call__(self, load: Sequence[float]) -> float:
        a, b, c, d, e = self._terms
        tokens, batches, decodes, context, pairs = load
        return a * tokens + b * batches + c * decodes + d * context + e * pairs

    @property
    def slack(self) -> float:
        """Times as long as expected, and no longer, take SHARE of the iterations that read prompts; from 1 on."""
        return self._reading.slack.value

    def tokens_within(self, seconds: float, start: int) -> int:
        """The longest chunk of a prompt, from `start` on, that adds no more than so many seconds to an iteration."""
        per_token, _, _, per_context, per_pair = self._terms
        # per_token n + per_context (start + n) + per_pair (n start + n (n + 1) / 2) = seconds
        left = seconds - per_context * start
        if left <= 0:
            return 0
        slope = per_token + per_context + per_pair * (start + 0.5)
        root = slope + sqrt(slope * slope + 2 * per_pair * left)
        return min(sys.maxsize, int(2 * left / root)) if root > 2 * left / sys.maxsize else sys.maxsize

    def of_chunk(self, start: int, count: int) -> float:
        """What a chunk of a prompt adds to an iteration, in seconds."""
        return self((count, 0, 0, start + count, count * start + count * (count + 1) / 2))

    def learn(self, load: Sequence[float], seconds: float) -> None:
        """An iteration has taken so long, more than 0 seconds."""
        expected = self(load)
        equations = self._reading if load[0] else self._decoding
        equations.add(load, seconds, expected)
        self._unsolved += 1
        if load[0] or not expected or self._unsolved >= SOLVED_EVERY:
            self._solve()
            self._unsolved = 0

    def _solve(self) -> None:
        """Coordinate descent from where it stood; terms stay from 0 on.

        What several terms can explain goes to the first of them: a first prompt's time to its tokens.
        """
        x = self._terms
        ours, theirs = self._reading, self._decoding
        gram = [[p + q for p, q in zip(*lines, strict=True)] for lines in zip(ours.gram, theirs.gram, strict=True)]
        right = [p + q for p, q in zip(ours.right, theirs.right, strict=True)]
        for _ in range(SWEEPS):
            for i, line in enumerate(gram):
                if line[i] > 0:
                    a, b, c, d, e = line
                    slope = right[i] - (a * x[0] + b * x[1] + c * x[2] + d * x[3] + e * x[4])
                    x[i] = max(0.0, x[i] + slope / line[i])


class _Equations:
    """Normal equations of one kind of iterations, which forget. Owner of how far those are off, too."""

    def __init__(self) -> None:
        count = len(NOTHING)
        self.gram = [[0.0] * count for _ in range(count)]
        self.right = [0.0] * count
        self.slack = Slack(SHARE, MOST_SLACK, SLACK_STEP)
        self._spread = 1.0  # half of the relative errors are smaller

    def add(self, load: Sequence[float], seconds: float, expected: float) -> None:
        scale = max(expected, seconds / BOUND) if expected > 0 else seconds
        error = abs(seconds - expected) / scale
        weight = 1 / (scale * scale)
        if error > HUBER * self._spread:
            weight *= HUBER * self._spread / error
        # In small steps, as large errors must not move it further than others.
        self._spread = max(0.01, self._spread * (1.05 if error > self._spread else 0.95))
        if expected > 0:
            self.slack.learn(seconds, expected)
        for i, value in enumerate(load):
            scaled = weight * value
            self.right[i] = KEPT * self.right[i] + scaled * seconds
            line = self.gram[i]
            for j, other in enumerate(load):
                line[j] = KEPT * line[j] + scaled * other


class _Flight(NamedTuple):
    """A batch in flight: its load, from when its streams wait for it, and the load of all that had returned then."""

    load: Load
    since: float
    before: Load


class Pace:
    """Keeps the time between two tokens of a stream within `max_itl` seconds. Owner of what it has learned.

    Decodes always go. Prompts get what is left of the time, but at least `share` of what the decodes take, and a token:
    where decodes alone take too long, prompts are slow, but never stand still. It begins with chunks of SMALLEST_CHUNK
    tokens and trusts itself with GROWTH times the longest one that it has seen.
    """

    def __init__(self, max_itl: float, stages: int, share: float = LEAST_SHARE) -> None:
        if not 0 < max_itl < float("inf"):
            raise ValueError(f"max_itl is a number of seconds above 0, not {max_itl}")
        if share <= 0:
            raise ValueError(f"prompts need a share of the time that is above 0, not {share}")
        self.cost = IterationCost()
        self._share = share
        self._seconds = max_itl / stages  # batches in flight are to be equally long
        self._stages = stages
        self._longest = 0.0  # tokens of prompts in a batch whose time is known
        self._flying: deque[_Flight] = deque()
        self._returned = NOTHING
        self._last = 0.0  # when the last one returned

    def prompt_tokens(self, decodes: int, context: int, prompts: Iterable[tuple[int, int]], most: int) -> int:
        """How many tokens of prompts, at most `most`, the next batch may take beside its decodes.

        context: tokens whose K and V the decodes read. prompts: (start, tokens left) of those that come next, in order;
        only as many are asked for as there is time.
        """
        alone = self.cost((0, 1, decodes, context, 0))
        left = self._left(alone)
        most = min(most, max(SMALLEST_CHUNK, int(GROWTH * self._longest)))
        taken = 0
        for start, count in prompts:
            chunk = min(count, most - taken, self.cost.tokens_within(left, start))
            taken += chunk
            if chunk < count or taken == most:
                break
            left -= self.cost.of_chunk(start, chunk)
        return min(most, max(1, taken))

    def _left(self, alone: float) -> float:
        """Seconds for prompts beside decodes that take so many alone."""
        return max(self._seconds / self.cost.slack - alone, self._share * alone)

    def submitted(self, batch: Batch, now: float) -> None:
        """A batch is made. Who was in one before has waited since the last return, not only since `now`."""
        goes_on = len(batch.new) < len(batch.rows)
        self._flying.append(_Flight(load_of(batch.rows), self._last if goes_on else now, self._returned))

    def returned(self, now: float) -> None:
        """The oldest batch is back: a turn of the pipe has ended, which took what its batches take together."""
        load, since, before = self._flying.popleft()
        self._returned = Load(*[a + b for a, b in zip(self._returned, load, strict=True)])
        turn = [a - b for a, b in zip(self._returned, before, strict=True)]
        seconds = (now - since) / self._stages
        self._last = now
        if len(self._flying) >= self._stages:  # it was submitted ahead: its turn begins only now
            at = self._stages - 1
            self._flying[at] = self._flying[at]._replace(since=now, before=self._returned)
        if seconds > 0:
            self.cost.learn([value / turn[1] for value in turn], seconds)
            self._longest = max(self._longest, load.tokens)
