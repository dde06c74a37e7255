"""`Backlog`: how long the work ahead of a request will take, by what iterations have taken lately.

An iteration takes `fixed + per_prompt_token * p + per_row * d` seconds for p tokens of prompts and d rows that decode.
The three numbers are fitted to the iterations themselves, the older ones counting ever less, and none is negative.
"""

from __future__ import annotations

from itertools import combinations

import msgspec

FORGET = 0.99  # what an iteration counts after the next one: a hundred of them make the mean
_RIDGE = 1e-9
_SUBSETS = tuple(subset for size in (3, 2, 1) for subset in combinations(range(3), size))


class Ahead(msgspec.Struct, frozen=True, kw_only=True):
    """What a request at the end of a queue finds before it, on one engine.

    num_running, num_waiting: requests. prompt_tokens: of those that have no output yet. output_tokens: that all of them
    are expected to generate, those that they have included. kv_tokens: that they will have in the KV cache in the end.
    """

    num_running: float = 0
    num_waiting: float = 0
    prompt_tokens: float = 0
    output_tokens: float = 0
    kv_tokens: float = 0


class Backlog:
    """Learns from iterations, and tells times in seconds: 0 until it has. Owner of what it has learnt.

    max_rows, max_tokens: of an iteration. kv_tokens: that the KV cache holds; None: not known.
    """

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        self.kv_tokens: int | None = None
        self._products = [[0.0] * 3 for _ in range(3)]
        self._times = [0.0] * 3
        self._pace: tuple[float, float, float] | None = None  # None: to be fitted
        self._num_read = 0.0  # prompt tokens of late, and how many of them the prefix cache did not know
        self._num_fresh = 0.0

    def learn(self, num_prefill: int, num_decode: int, seconds: float) -> None:
        """An iteration has computed so many tokens of prompts, and so many rows that decode."""
        row = (1.0, float(num_prefill), float(num_decode))
        for i in range(3):
            self._times[i] = FORGET * self._times[i] + row[i] * seconds
            for j in range(3):
                self._products[i][j] = FORGET * self._products[i][j] + row[i] * row[j]
        self._pace = None

    def learn_prompt(self, num_prompt: int, num_cached: int) -> None:
        """A prompt has been read, so much of it from the prefix cache."""
        self._num_read = FORGET * self._num_read + num_prompt
        self._num_fresh = FORGET * self._num_fresh + num_prompt - num_cached

    def until_start(self, ahead: Ahead) -> float:
        """Until a request that comes now has its first iteration, first come, first served.

        All prompts ahead are computed by then. If there is no place left, so many must have ended that there is one.
        Places become free evenly, as they do once the requests that run are at all stages: in as many iterations as a
        request generates tokens each place does once.
        """
        present = ahead.num_running + ahead.num_waiting
        if present <= 0:
            return 0.0
        places = self._places(ahead)
        must_end = min(present, max(0.0, present + 1 - places))
        rows = max(1.0, min(present, places))
        prompt_tokens = ahead.prompt_tokens * self._fresh_share
        decodes = ahead.output_tokens * must_end / present / rows
        return self._seconds(prompt_tokens, max(prompt_tokens / self.max_tokens, decodes), rows)

    def until_first_token(self, ahead: Ahead, num_prompt: int) -> float:
        """The same, and its own prompt computed."""
        rows = max(1.0, min(ahead.num_running + ahead.num_waiting, self._places(ahead)))
        fresh = num_prompt * self._fresh_share
        return self.until_start(ahead) + self._seconds(fresh, max(1.0, fresh / self.max_tokens), rows - 1)

    def until_end(self, ahead: Ahead, num_prompt: int, num_output: float) -> float:
        """The same, and so many tokens generated. Prompts that come later take time too; they are left out."""
        rows = max(1.0, min(ahead.num_running + ahead.num_waiting, self._places(ahead)))
        return self.until_first_token(ahead, num_prompt) + self._seconds(0, max(0.0, num_output - 1), rows)

    def _places(self, ahead: Ahead) -> float:
        """How many requests run at a time, at most: by rows, and by the KV cache.

        What runs now is possible: shared prefixes can make room for more than the sum of lengths suggests.
        """
        present = ahead.num_running + ahead.num_waiting
        if self.kv_tokens is None or ahead.kv_tokens <= 0:
            return self.max_rows
        return min(self.max_rows, max(1.0, ahead.num_running, self.kv_tokens * present / ahead.kv_tokens))

    @property
    def _fresh_share(self) -> float:
        return self._num_fresh / self._num_read if self._num_read else 1.0

    def _seconds(self, prompt_tokens: float, iterations: float, rows: float) -> float:
        if self._pace is None:
            self._pace = _fit(self._products, self._times)
        fixed, per_prompt_token, per_row = self._pace
        return per_prompt_token * prompt_tokens + iterations * (fixed + per_row * rows)


def _fit(products: list[list[float]], times: list[float]) -> tuple[float, float, float]:
    """Least squares under x >= 0: of the fits with some of the numbers, the others being 0, the best one allowed."""
    best, found = 0.0, (0.0, 0.0, 0.0)
    for subset in _SUBSETS:
        x = _solve([[products[i][j] for j in subset] for i in subset], [times[i] for i in subset])
        # With x the solution, the squared error is a constant less x · times.
        gain = sum(value * times[i] for value, i in zip(x, subset, strict=True))
        if all(value >= 0 for value in x) and gain > best * (1 + 1e-9):
            whole = [0.0] * 3
            for value, i in zip(x, subset, strict=True):
                whole[i] = value
            best, found = gain, (whole[0], whole[1], whole[2])
            if len(subset) == 3:
                break  # fewer numbers fit no better
    return found


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Of a symmetric system, positive but for what is lifted a little where columns depend on each other (Cholesky)."""
    size = len(right)
    lower = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            if i == j:
                lower[i][i] = max(rest, _RIDGE * matrix[i][i], 1e-30) ** 0.5
            else:
                lower[i][j] = rest / lower[j][j]
    forth: list[float] = []
    for i in range(size):
        forth.append((right[i] - sum(lower[i][k] * forth[k] for k in range(i))) / lower[i][i])
    back = [0.0] * size
    for i in reversed(range(size)):
        back[i] = (forth[i] - sum(lower[k][i] * back[k] for k in range(i + 1, size))) / lower[i][i]
    return back
