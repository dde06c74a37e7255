"""`LedgerExecutor`: a model that needs no torch. Its KV cache stores entries, its answer is a hash of all it reads.

An entry depends on its token and on the entry before it, as a key or value does on its context. The ledger writes each
scheduled token's entry at its slot, reads the whole context back through the block table and hashes it. Any slip in
block tables, prefix reuse, preemption, swapping, chunking, pipelining or overlap changes the answer; `ledger_answer` is
the sequential loop that says what it must be.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate
from zlib import crc32

from orcaserve.core.batch import Batch, RowResult, ScheduledRequest, StepResult, Swap
from orcaserve.core.request import FinishReason, NewRequest, Pooling, TokenLogprobs

EMPTY = -1  # a slot that was never written


def _hash(*values: int) -> int:
    return crc32(array("q", values).tobytes())


def ledger_entries(token_ids: Sequence[int]) -> list[int]:
    """What the KV cache must hold for `token_ids`."""
    return list(accumulate(token_ids, lambda before, token_id: _hash(before, token_id), initial=0))[1:]


def _read(entries: Sequence[int], *asked: int) -> int:
    """The hash of what is asked and all that is read for it; it goes on from that of a part."""
    return crc32(array("q", entries).tobytes(), _hash(*asked))


def ledger_token(entries: Sequence[int], seed: int, choice: int, vocab_size: int) -> int:
    """The token that follows a context."""
    return _read(entries, seed, choice) % vocab_size


def ledger_logprobs(entries: Sequence[int], token_id: int) -> TokenLogprobs:
    """The log-probability of `token_id` after a context."""
    return TokenLogprobs(token_id, -_read(entries, token_id) / 2**32, 1)


def ledger_vector(entries: Sequence[int], pooling: Pooling) -> bytes:
    """A prompt as one vector, by its entries: all of them in order, or the last one."""
    chain = 0
    for entry in entries if pooling == "mean" else entries[-1:]:
        chain = _hash(chain, entry)
    return chain.to_bytes(4, "little")


def ledger_answer(new: NewRequest, vocab_size: int) -> tuple[list[int], FinishReason]:
    """What a request must get, whatever the load: the oracle."""
    tokens = list(new.token_ids)
    entries = ledger_entries(tokens)
    entry, read = entries[-1], _read(entries, new.seed, new.choice)
    while len(tokens) - new.num_prompt < new.max_tokens:
        tokens.append(read % vocab_size)
        if tokens[-1] in new.end_token_ids:
            return tokens[new.num_prompt :], "stop"
        entry = _hash(entry, tokens[-1])
        read = crc32(array("q", (entry,)).tobytes(), read)
    return tokens[new.num_prompt :], "length"


class _Known:
    """What a worker knows of a request."""

    def __init__(self, new: NewRequest) -> None:
        self.new = new
        self.token_ids = list(new.token_ids)
        self.drawn: list[int] = []  # tokens after those, which it sampled itself and was not told yet
        self.block_table: list[int] = []
        self.chain = 0  # over the entries that were computed since it was described: a mean, half done

    def told(self, token_ids: Sequence[int]) -> None:
        """The host tells what was sampled. ValueError if that is not what comes next here."""
        if list(token_ids) != self.drawn[: len(token_ids)]:
            raise ValueError(f"request {self.new.id} is told {token_ids}, but sampled {self.drawn}")
        del self.drawn[: len(token_ids)]
        self.token_ids.extend(token_ids)

    def token(self, position: int) -> int:
        ahead = position - len(self.token_ids)
        return self.token_ids[position] if ahead < 0 else self.drawn[ahead]


class LedgerPending:
    """A ledger iteration. With `eager` it ran when it was submitted, else it runs when its result is wanted."""

    def __init__(self, executor: LedgerExecutor, batch: Batch, eager: bool) -> None:
        self._executor = executor
        self._batch = batch
        self._result = executor.run(batch) if eager else None

    def result(self) -> StepResult:
        if self._result is None:
            self._result = self._executor.run(self._batch)
        return self._result


class LedgerExecutor:
    """Owner of the ledger's slots (one entry each) and of what its imaginary workers know.

    swap_blocks: blocks whose entries its swap space holds.
    """

    def __init__(
        self, num_blocks: int, block_size: int, vocab_size: int, eager: bool = True, swap_blocks: int = 0
    ) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._eager = eager
        self._slots = array("q", [EMPTY]) * (num_blocks * block_size)
        self._swapped = array("q", [EMPTY]) * (swap_blocks * block_size)
        self.known: dict[int, _Known] = {}

    def submit(self, batch: Batch) -> LedgerPending:
        return LedgerPending(self, batch, self._eager)

    def run(self, batch: Batch) -> StepResult:
        for swap in batch.swaps:
            self._copy(swap)
        for id in batch.freed:
            del self.known[id]
        for new in batch.new:
            if new.id in self.known:
                raise ValueError(f"request {new.id} is described twice")
            self.known[new.id] = _Known(new)
        for row in batch.rows:
            self._write(row)
        return StepResult(tuple([self._read(row) for row in batch.rows]))

    def _copy(self, swap: Swap) -> None:
        size = self._block_size
        for block, slot in zip(swap.blocks, swap.slots, strict=True):
            inside, outside = slice(block * size, (block + 1) * size), slice(slot * size, (slot + 1) * size)
            if swap.out:
                self._swapped[outside] = self._slots[inside]
            else:
                self._slots[inside] = self._swapped[outside]

    def _write(self, row: ScheduledRequest) -> None:
        known = self.known[row.id]
        known.block_table.extend(row.new_blocks)
        known.told(row.token_ids)
        for position in range(row.start, row.start + row.num_tokens):
            before = self._slots[self._slot(known, position - 1)] if position else 0
            self._slots[self._slot(known, position)] = _hash(before, known.token(position))

    def _read(self, row: ScheduledRequest) -> RowResult:
        known = self.known[row.id]
        end = row.start + row.num_tokens
        entries, size = array("q"), self._block_size
        for block in known.block_table[: -(-end // size)]:
            entries.extend(self._slots[block * size : (block + 1) * size])
        del entries[end:]
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if known.new.params.prompt_logprobs is not None:
            positions = range(row.start + 1, min(end + 1, known.new.num_prompt))
            prompt_logprobs = tuple([ledger_logprobs(entries[:p], known.token_ids[p]) for p in positions])
        pooled = self._pool(known, row, entries)
        if not row.samples:
            return RowResult(id=row.id, prompt_logprobs=prompt_logprobs, pooled=pooled)
        token_id = ledger_token(entries, known.new.seed, known.new.choice, self._vocab_size)
        known.drawn.append(token_id)
        logprobs = None if known.new.params.logprobs is None else ledger_logprobs(entries, token_id)
        return RowResult(id=row.id, token_id=token_id, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _pool(self, known: _Known, row: ScheduledRequest, entries: Sequence[int]) -> bytes:
        """The vector with the row that ends the prompt; what rows before it gave, workers keep."""
        pooling = known.new.params.pooling
        if pooling is None:
            return b""
        if pooling == "mean":
            for entry in entries[row.start :]:
                known.chain = _hash(known.chain, entry)
        if len(entries) < known.new.num_prompt:
            return b""
        return known.chain.to_bytes(4, "little") if pooling == "mean" else ledger_vector(entries, pooling)

    def _slot(self, known: _Known, position: int) -> int:
        return known.block_table[position // self._block_size] * self._block_size + position % self._block_size
