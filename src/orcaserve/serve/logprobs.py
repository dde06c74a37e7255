"""Log-probabilities in the three shapes that clients know: completions, chat, and prompt. Numbers are never rounded."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Sequence

from orcaserve.core.request import TokenLogprobs
from orcaserve.serve.protocol import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

TokenBytes = Callable[[int], bytes]

_LEAST = -9999.0  # OpenAI's word for minus infinity, which JSON cannot say
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Offsets:
    """Where tokens begin in a text, in characters. Takes a text's tokens in order; owns its position."""

    def __init__(self) -> None:
        self._decoder = _Utf8Decoder(errors="replace")
        self._position = 0

    def place(self, data: bytes) -> int:
        """The beginning of a token of these bytes; inside a character, that character's."""
        begin = self._position
        pending, _ = self._decoder.getstate()
        if pending and data and not _continues(pending, data[:1]):
            begin += 1  # what was pending will never be a character; U+FFFD stands for it
        self._position += len(self._decoder.decode(data))
        return begin


def _continues(pending: bytes, byte: bytes) -> bool:
    """Whether the beginning of a character goes on with this byte."""
    try:
        _Utf8Decoder(errors="strict").decode(pending + byte)
    except UnicodeDecodeError:
        return False
    return True


def token_text(data: bytes) -> str:
    """A token as text; one that is no text by itself as OpenAI writes it: bytes:\\xe4\\xbd."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(entries: Sequence[TokenLogprobs], num_top: int, token_bytes: TokenBytes) -> ChatLogprobs:
    content = []
    for entry in entries:
        data = token_bytes(entry.token_id)
        top = []
        for id, logprob in entry.top[:num_top]:
            other = token_bytes(id)
            top.append(TopLogprob(token_text(other), max(logprob, _LEAST), list(other)))
        content.append(TokenLogprob(token_text(data), max(entry.logprob, _LEAST), list(data), top))
    return ChatLogprobs(content)


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None],
    ids: Sequence[int],
    num_top: int,
    token_bytes: TokenBytes,
    texts: Sequence[bytes],
    offsets: Offsets,
) -> CompletionLogprobs:
    """entries: one per id; None where there is no log-probability, at the first token of a prompt. texts: what each id
    adds to the choice's text.

    The chosen token is always among the alternatives. Tokens of equal text share an entry, which is the likeliest's.
    """
    found = CompletionLogprobs([], [], [], [])
    for id, entry, added in zip(ids, entries, texts, strict=True):
        found.tokens.append(token_text(token_bytes(id)))
        found.text_offset.append(offsets.place(added))
        if entry is None:
            found.token_logprobs.append(None)
            found.top_logprobs.append(None)
            continue
        top: dict[str, float] = {}
        for other, logprob in itertools.chain(entry.top[:num_top], [(id, entry.logprob)]):
            top.setdefault(token_text(token_bytes(other)), max(logprob, _LEAST))
        found.token_logprobs.append(max(entry.logprob, _LEAST))
        found.top_logprobs.append(top)
    return found


def prompt_logprobs(entries: Sequence[TokenLogprobs], num_top: int, token_bytes: TokenBytes) -> PromptLogprobs:
    """vLLM's shape: per prompt token a map from token id; null for the first."""
    found: PromptLogprobs = [None]
    for entry in entries:
        ranked = {
            str(id): PromptLogprob(max(logprob, _LEAST), rank, token_text(token_bytes(id)))
            for rank, (id, logprob) in enumerate(entry.top[:num_top], 1)
        }
        ranked.setdefault(
            str(entry.token_id),
            PromptLogprob(max(entry.logprob, _LEAST), entry.rank, token_text(token_bytes(entry.token_id))),
        )
        found.append(ranked)
    return found
