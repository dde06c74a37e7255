"""`Detokenizer`: bytes of tokens in, text out, piece by piece; the same text however the bytes were cut.

Text leaves it as soon as it is certain: never in the middle of a character, and never while it may still turn out to be
the beginning of a stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class StopStrings:
    """Stop strings as bytes, with what is needed to look for all of them in one pass. Immutable; choices share it.

    The one whose last byte comes first ends the text; of several that end at the same byte, the longest.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.patterns = tuple(pattern for text in strings if (pattern := text.encode()))
        self.failures = tuple(_failure_table(pattern) for pattern in self.patterns)


class Detokenizer:
    """The text of one choice. Owns its state; one per choice.

    is_stopped: a stop string has been found; nothing more comes out.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.patterns)  # how much of each pattern the latest bytes are
        self._held = b""  # bytes that may be the beginning of a stop string
        self._decoder = _Utf8Decoder(errors="replace")
        self.is_stopped = False

    def feed(self, data: bytes, *, may_stop: bool = True) -> str:
        """The text that has become certain with these bytes.

        may_stop: False lets the bytes pass unexamined, and no stop string can begin in them.
        """
        if self.is_stopped:
            return ""
        if not self._stops.patterns:
            return self._decoder.decode(data)
        if not may_stop:
            data, self._held = self._held + data, b""
            self._matched = [0] * len(self._matched)
            return self._decoder.decode(data)
        seen = self._held + data
        for end in range(len(self._held), len(seen)):
            found = self._advance(seen[end])
            if found:
                self.is_stopped = True
                self._held = b""
                return self._decoder.decode(seen[: end + 1 - found], final=True)
        certain = len(seen) - max(self._matched)
        self._held = seen[certain:]
        return self._decoder.decode(seen[:certain])

    def finish(self) -> str:
        """What was held back, now that nothing follows; a character that was never completed becomes U+FFFD."""
        if self.is_stopped:
            return ""
        data, self._held = self._held, b""
        return self._decoder.decode(data, final=True)

    def _advance(self, byte: int) -> int:
        """Takes one byte in; the length of the longest stop string that it completes, else 0."""
        found = 0
        for index, pattern in enumerate(self._stops.patterns):
            length, failure = self._matched[index], self._stops.failures[index]
            while length and pattern[length] != byte:
                length = failure[length - 1]
            if pattern[length] == byte:
                length += 1
            if length == len(pattern):
                found = max(found, length)
                length = failure[length - 1]
            self._matched[index] = length
        return found


def _failure_table(pattern: bytes) -> list[int]:
    """For each prefix of the pattern the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[length] != pattern[index]:
            length = table[length - 1]
        if pattern[length] == pattern[index]:
            length += 1
        table[index] = length
    return table
