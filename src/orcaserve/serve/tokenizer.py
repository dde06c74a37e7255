"""`Tokenizer`: text to ids, ids to text, and the exact bytes of every token. Read-only once made, for any thread.

A generated token stands for the same bytes wherever it occurs, so that text can be cut between any two tokens: the text
of a response is the UTF-8 decoding of its tokens' bytes, one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from orcaserve.core.config import ModelError

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "a"  # text before a piece whose bytes can only be found by decoding


class _TokenizerFile(msgspec.Struct):
    """The part of tokenizer.json that says how pieces become text; the rest is read by the `tokenizers` library."""

    decoder: dict[str, Any] | None = None


class _TokenizerConfig(msgspec.Struct):
    """tokenizer_config.json, or special_tokens_map.json, as far as serving needs it. A token is text or an object."""

    bos_token: str | dict[str, Any] | None = None
    eos_token: str | dict[str, Any] | None = None
    pad_token: str | dict[str, Any] | None = None
    unk_token: str | dict[str, Any] | None = None
    chat_template: str | list[dict[str, str]] | None = None


class Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Attributes: num_tokens (ids are below it, but not every one must exist), special_tokens (name → text, e.g.
    "bos_token" → "<s>"), bos_token_id, eos_token_id, chat_template (its source), longest_token (in characters).
    Raises ModelError if the folder has no tokenizer.json or one that cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        path = folder / "tokenizer.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            missing = f"{folder.name} has no tokenizer.json: without a tokenizer the model cannot be served"
            raise ModelError(missing) from None
        except OSError as error:
            raise ModelError(f"{folder.name}/tokenizer.json cannot be read: {error.strerror}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
            file = msgspec.json.decode(data, type=_TokenizerFile)
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{folder.name}/tokenizer.json cannot be read: {_line(error)}") from None
        self._tokenizer.no_truncation()  # files saved in training carry limits that would cut prompts in silence
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.num_tokens = max(vocabulary.values(), default=-1) + 1
        self.longest_token = max(map(len, vocabulary), default=1)
        self._special = frozenset(
            id for id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        )
        self._bytes: dict[int, bytes] = {}  # filled as tokens occur; bounded by the vocabulary
        self._piece_bytes = _piece_decoder(file.decoder) or self._bytes_by_decoding

        config = _read_config(folder / "tokenizer_config.json")
        other = _read_config(folder / "special_tokens_map.json")
        self.special_tokens: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = getattr(config, name) or getattr(other, name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                self.special_tokens[name] = content
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.chat_template = _chat_template(folder, config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """add_special_tokens: also what the model expects around a text, such as a beginning token."""
        # Of the library's calls this one leaves the other threads running while it works.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of a whole sequence. Ids that the tokenizer does not know are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, id: int) -> bytes:
        """What a token stands for in the middle of a text; special tokens by their name; empty for unknown ids."""
        known = self._bytes.get(id)
        if known is None:
            piece = self._tokenizer.id_to_token(id) if id >= 0 else None
            known = b"" if piece is None else self._piece_bytes(piece)
            if id < self.num_tokens:
                self._bytes[id] = known
        return known

    def text_bytes(self, id: int) -> bytes:
        """What a token adds to a response: nothing if it is special."""
        return b"" if id in self._special else self.token_bytes(id)

    def special_id(self, text: str) -> int | None:
        """Of a special token, by its text; None if there is no such one, or it is plain text to the model."""
        id = self._tokenizer.token_to_id(text)
        return id if id in self._special else None

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def _bytes_by_decoding(self, piece: str) -> bytes:
        """For the decoders that are not spelled out here: what the piece adds to a text that is there already."""
        ids = self._tokenizer.encode(_ANCHOR, add_special_tokens=False).ids
        before = self._tokenizer.decode(ids, skip_special_tokens=False)
        id = self._tokenizer.token_to_id(piece)
        after = self._tokenizer.decode([*ids, *([] if id is None else [id])], skip_special_tokens=False)
        return str(after[len(before) :]).encode()


def _piece_decoder(decoder: dict[str, Any] | None) -> Callable[[str], bytes] | None:
    """How the pieces of a vocabulary become bytes, from tokenizer.json's decoder; None if it is of another kind.

    What decoders do to the very beginning of a text (taking a blank away) is left out: a prompt stands before it.
    """
    steps = _flatten(decoder)
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _from_byte_level
    replacements: list[tuple[str, str]] = []
    has_bytes = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
                replacements.append((pattern, content))
            case {"type": "Metaspace", "replacement": str(blank)}:
                replacements.append((blank, " "))
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Fuse"} | {"type": "Strip", "stop": 0}:
                pass
            case _:
                return None
    if not replacements:
        return None

    def convert(piece: str) -> bytes:
        if has_bytes and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return convert


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for inner in decoder.get("decoders", []) for step in _flatten(inner)]
    return [decoder]


def _byte_alphabet() -> dict[str, int]:
    """Byte-level vocabularies write each byte as one visible character: itself if it is one, else one from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + rank): byte for rank, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()


def _from_byte_level(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in piece)
    except KeyError:  # an added token, which is plain text
        return piece.encode()


def _read_config(path: Path) -> _TokenizerConfig:
    if not path.is_file():
        return _TokenizerConfig()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_TokenizerConfig)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} cannot be read: {_line(error)}") from None


def _chat_template(folder: Path, config: _TokenizerConfig) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{folder.name}/chat_template.jinja is not UTF-8 text") from None
    if isinstance(config.chat_template, list):
        named = {entry.get("name"): entry.get("template") for entry in config.chat_template}
        return named.get("default")
    return config.chat_template


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
