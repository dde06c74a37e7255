"""`ChoiceText`: the pool's updates of one choice become pieces of a response, cut where a stop string is."""

from __future__ import annotations

from typing import Literal

import msgspec

from orcaserve.core.request import TokenLogprobs
from orcaserve.serve.detokenize import Detokenizer
from orcaserve.serve.job import Job
from orcaserve.serve.stream import Update
from orcaserve.serve.tokenizer import Tokenizer

_MOST_PIECES = 256  # of a text before they are joined


class Piece(msgspec.Struct):
    """What a choice gained. The last token may be the one that completed a stop string or ended the choice.

    text: what has become certain, which may lag behind the tokens. prompt_logprobs: all at once, or none.
    pooled: the prompt as one vector, float32, where that is all that is wanted.
    is_cut: a stop string has ended the choice, and the engine has to be told.
    """

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooled: bytes = b""
    finish_reason: Literal["stop", "length"] | None = None
    is_cut: bool = False


class Joined:
    """A text that comes in pieces, of which each by itself would take ten times its letters. Owner of it."""

    def __init__(self) -> None:
        self._pieces: list[str] = []

    def add(self, piece: str) -> None:
        self._pieces.append(piece)
        if len(self._pieces) == _MOST_PIECES:
            self._pieces = ["".join(self._pieces)]

    @property
    def text(self) -> str:
        return "".join(self._pieces)


class ChoiceText:
    """Owner of what is known of one choice's text. One per choice; takes its updates in order."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._bytes_of = tokenizer.text_bytes if job.skip_special_tokens else tokenizer.token_bytes
        self._kept = job.kept
        self._detokenizer = Detokenizer(job.stops)
        self._min_tokens = job.min_tokens
        self.num_tokens = 0

    def take(self, update: Update) -> Piece:
        """update: not one that reports an error."""
        last = len(update.token_ids) - 1
        texts = []
        taken = 0
        for index, id in enumerate(update.token_ids):
            taken += 1
            self.num_tokens += 1
            is_end = update.finish_reason == "stop" and index == last  # the end token: it is counted, but not read
            if not is_end:
                data = self._token_bytes(id) if id in self._kept else self._bytes_of(id)
                texts.append(self._detokenizer.feed(data, may_stop=self.num_tokens > self._min_tokens))
            if self._detokenizer.is_stopped:
                break
        is_cut = self._detokenizer.is_stopped
        if update.finish_reason is not None and not is_cut:
            texts.append(self._detokenizer.finish())
        return Piece(
            text="".join(texts),
            token_ids=list(update.token_ids[:taken]),
            logprobs=list(update.logprobs[:taken]),
            prompt_logprobs=update.prompt_logprobs,
            pooled=update.pooled,
            finish_reason="stop" if is_cut else _finish_reason(update),
            is_cut=is_cut and update.finish_reason is None,
        )


def _finish_reason(update: Update) -> Literal["stop", "length"] | None:
    match update.finish_reason:
        case "stop" | "length" as reason:
            return reason
        case _:
            return None
