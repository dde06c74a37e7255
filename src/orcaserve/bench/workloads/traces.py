"""Published request traces, read as they are: arrivals from 0 seconds on, lengths in tokens, no text.

Azure's LLM inference traces (https://github.com/Azure/AzurePublicDataset) are CSV: TIMESTAMP, ContextTokens,
GeneratedTokens. Mooncake's (https://github.com/kvcache-ai/Mooncake) are JSON lines: timestamp in milliseconds,
input_length, output_length, hash_ids of blocks of 512 tokens.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

BLOCK = 512
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class Row(msgspec.Struct, frozen=True):
    """One request of a trace. at: seconds after the first one."""

    at: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def azure(path: Path) -> list[Row]:
    """In the order of arrival. ValueError names the line that is not one of such a trace."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            if not set(_AZURE) <= set(lines.fieldnames or ()):
                raise ValueError(f"its first line should name {', '.join(_AZURE)}")
            for number, line in enumerate(lines, 2):
                when, num_in, num_out = (line[key] for key in _AZURE)
                try:
                    row = Row(_seconds(when), int(num_in), int(num_out))
                except (ValueError, TypeError):
                    raise ValueError(f"line {number} is no time and two numbers of tokens") from None
                if min(row.input_length, row.output_length) < 0:
                    raise ValueError(f"line {number} has less than no tokens")
                rows.append(row)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no trace of Azure: {error}") from None
    return _from_zero(rows)


def mooncake(path: Path, rng: random.Random, spread: float = 3.0) -> list[Row]:
    """In the order of arrival. ValueError names the line that is not one of such a trace.

    The traces know an arrival only to 3 seconds: those of the same `spread` seconds are dealt out over them at random,
    in the order in which they stand. 0 leaves them where they are.
    """
    read: list[_MooncakeRow] = []
    decode = msgspec.json.Decoder(_MooncakeRow).decode
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = decode(line)
                if row.timestamp < 0:
                    raise ValueError("a timestamp before the trace begins")
                if min(row.input_length, row.output_length) < 0:
                    raise ValueError("less than no tokens")
                if (row.input_length + BLOCK - 1) // BLOCK != len(row.hash_ids):
                    raise ValueError(f"there must be a hash id for every {BLOCK} tokens")
            except ValueError as error:
                raise ValueError(f"{path} is no trace of Mooncake: line {number}: {error}") from None
            read.append(row)
    read.sort(key=lambda row: row.timestamp)
    times = [row.timestamp / 1000 for row in read]
    if spread:
        # Some stand a few milliseconds beside their bucket.
        buckets = [round(time / spread) for time in times]
        times = sorted((bucket + rng.random()) * spread for bucket in buckets)
    lengths = ((row.input_length, row.output_length, row.hash_ids) for row in read)
    return _from_zero([Row(at, *of_row) for at, of_row in zip(times, lengths, strict=True)])


def _seconds(when: str) -> float:
    time = datetime.fromisoformat(when)
    # Without a zone it would be taken for this machine's, whose hours jump twice a year.
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _from_zero(rows: Sequence[Row]) -> list[Row]:
    first = min((row.at for row in rows), default=0.0)
    return sorted((msgspec.structs.replace(row, at=row.at - first) for row in rows), key=lambda row: row.at)
