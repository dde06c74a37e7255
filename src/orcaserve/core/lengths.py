"""`Lengths`: how long answers get, learnt from those that have ended; and the `Histogram` that it is made of."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict

EDGES: list[float] = [2.0 ** (i / 4) for i in range(96)]  # where bins begin: quarters of an octave, up to 2^24
DECAY = 1 - 1 / 256  # what a sample weighs less with each one after it
ENOUGH = 10  # samples from which on a cell speaks for itself
MOST_CELLS = 4096
_ALL = -1  # prompts of any length


class Histogram:
    """Samples from 0 on, newer ones weighing more. Instead of shrinking the old, each weighs more than the one before.

    mean: of the samples as they weigh now; as `quantile` and `below`, only after the first one.
    """

    __slots__ = ("_bins", "_next", "_sum", "_weight", "count")

    def __init__(self) -> None:
        self.count = 0
        self._bins: array[float] = array("d", bytes(8 * len(EDGES)))
        self._weight = 0.0
        self._sum = 0.0
        self._next = 1.0  # what the next sample weighs

    def learn(self, value: float) -> None:
        self._bins[_bin(value)] += self._next
        self._weight += self._next
        self._sum += self._next * value
        self.count += 1
        self._next /= DECAY
        if self._next > 1e9:
            self._bins = array("d", [value / self._next for value in self._bins])
            self._weight /= self._next
            self._sum /= self._next
            self._next = 1.0

    @property
    def mean(self) -> float:
        return self._sum / self._weight

    def quantile(self, share: float) -> float:
        """What a `share` (0 … 1) of the samples stays within, to a quarter of an octave."""
        left = share * self._weight
        last = max(i for i, weight in enumerate(self._bins) if weight)
        for i, weight in enumerate(self._bins[:last]):
            if weight and left <= weight:
                return _at(i, left / weight)
            left -= weight
        return _at(last, min(1.0, max(0.0, left / self._bins[last])))

    def below(self, value: float) -> float:
        """The share of the samples that are less; half of those in the same bin count."""
        i = _bin(value)
        return (sum(self._bins[:i]) + self._bins[i] / 2) / self._weight


def _bin(value: float) -> int:
    return max(0, bisect_right(EDGES, value) - 1)


def _at(i: int, share: float) -> float:
    """A bin is taken to be filled evenly."""
    end = EDGES[i + 1] if i + 1 < len(EDGES) else 2 * EDGES[i]
    return EDGES[i] + (end - EDGES[i]) * share


class Lengths:
    """Generated tokens by tenant and length of the prompt (powers of two). Owner of its histograms.

    One that has seen less than ENOUGH says nothing: the tenant's prompts of all lengths are asked, then everybody's.
    It keeps MOST_CELLS at most; the one that has learnt nothing for the longest time goes first.
    """

    def __init__(self) -> None:
        self._cells: OrderedDict[tuple[str, int], Histogram] = OrderedDict()
        self._everybody = Histogram()

    def learn(self, tenant: str, num_prompt: int, num_generated: int) -> None:
        """A request has ended by itself: its prompt and what it generated, in tokens."""
        for name in ((tenant, _ALL), (tenant, num_prompt.bit_length())):
            cell = self._cells.get(name)
            if cell is None:
                cell = self._cells[name] = Histogram()
            cell.learn(num_generated)
            self._cells.move_to_end(name)
        self._everybody.learn(num_generated)
        while len(self._cells) > MOST_CELLS:
            self._cells.popitem(last=False)

    def quantile(self, tenant: str, num_prompt: int, share: float) -> float | None:
        """Tokens that a `share` (0 … 1) of such requests stays within. None: nothing learnt."""
        cell = self._cell(tenant, num_prompt)
        return None if cell is None else cell.quantile(share)

    def expected(self, tenant: str, num_prompt: int) -> float | None:
        """The mean, in tokens. None: nothing learnt."""
        cell = self._cell(tenant, num_prompt)
        return None if cell is None else cell.mean

    def _cell(self, tenant: str, num_prompt: int) -> Histogram | None:
        for name in ((tenant, num_prompt.bit_length()), (tenant, _ALL)):
            cell = self._cells.get(name)
            if cell is not None and cell.count >= ENOUGH:
                return cell
        return self._everybody if self._everybody.count else None
