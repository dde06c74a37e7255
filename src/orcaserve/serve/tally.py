"""`Tally`: what a body will cost to parse, counted while it arrives, so that it can be refused before.

A parser of JSON cannot be interrupted, and while it works nobody else is answered. Text is read at a gigabyte a second;
everything else has a limit by what it costs, far beyond what requests need.
"""

from __future__ import annotations

MOST_VALUES = 1 << 18
MOST_NAMES = 1 << 16  # of the fields of objects
MOST_CONTAINERS = 1 << 15
MOST_FRACTIONS = 1 << 12  # a number has up to two; some take 10 µs each
MOST_ESCAPES = 1 << 21
MOST_BETWEEN = 1 << 22


class Tally:
    """Fed with a body's parts. counts: what there is so far. excess: what there is too much of, and the limit."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(_LIMITS, 0)
        self.excess: tuple[str, int] | None = None
        self._is_text = False  # whether the next byte stands in a string
        self._rest = b""  # a backslash that ended the last part

    def add(self, part: bytes) -> None:
        """What stands in strings, which their quotes tell apart, counts by its escapes only."""
        data = self._rest + part
        self._rest = b"\\" if (len(data) - len(data.rstrip(b"\\"))) % 2 else b""
        data = data[: len(data) - len(self._rest)]
        escapes = data.count(b"\\")
        if escapes:
            data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
        pieces = data.split(b'"')
        between = b"".join(pieces[self._is_text :: 2])
        self._is_text ^= len(pieces) % 2 == 0
        exponents = sum(map(between.count, (b"e", b"E"))) - sum(map(between.count, (b"ue", b"se")))  # not true, false
        new = {
            "values": between.count(b","),
            "fields": between.count(b":"),
            "lists and objects": between.count(b"[") + between.count(b"{"),
            "fractions": between.count(b".") + exponents,
            "escapes in its texts": escapes,
            "bytes outside its texts": len(between),
        }
        for name, number in new.items():
            self.counts[name] += number
            if self.counts[name] > _LIMITS[name]:
                self.excess = (name, _LIMITS[name])


_LIMITS = {
    "values": MOST_VALUES,
    "fields": MOST_NAMES,
    "lists and objects": MOST_CONTAINERS,
    "fractions": MOST_FRACTIONS,
    "escapes in its texts": MOST_ESCAPES,
    "bytes outside its texts": MOST_BETWEEN,
}
