"""Tokens' bytes agree with the library's own decoding, for byte-level and for SentencePiece-like vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from orcaserve.core.config import ModelError
from orcaserve.serve.tokenizer import Tokenizer

TEXT = ["The quick brown fox  jumps. Grüße, 世界! " * 3, "def f(x):\n\treturn x + 1\n"]


def byte_level(folder: Path) -> Path:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    library.add_tokens([AddedToken("    ", normalized=False), AddedToken("<tool>", normalized=False)])
    return save(library, folder)


def sentencepiece(folder: Path) -> Path:
    """As Llama 2 has it: blanks as ▁, bytes as <0x..>, and a blank put before every text and taken away again."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: id for id, piece in enumerate([*pieces, "▁", "T", "h", "e", "x", "▁T", "▁Th", "▁The", "▁x"])}
    merges = [("▁", "T"), ("▁T", "h"), ("▁Th", "e"), ("▁", "x")]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)  # noqa: S106
    library = Library(model)
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return save(library, folder)


def word_piece(folder: Path) -> Path:
    """A decoder that is not spelled out in our code."""
    library = Library(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "c": 3}, unk_token="[UNK]"))  # noqa: S106
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    return save(library, folder)


def save(library: Library, folder: Path) -> Path:
    library.enable_truncation(4)  # as left over from training; must not cut prompts
    library.save(str(folder / "tokenizer.json"))
    return folder


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.text_bytes, ids)).decode(errors="replace")


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Library]:
    folder = byte_level(tmp_path_factory.mktemp("byte_level"))
    return Tokenizer(folder), Library.from_file(str(folder / "tokenizer.json"))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 331), max_size=20), st.booleans())
def test_byte_level_ids_as_the_library_decodes_them(
    levels: tuple[Tokenizer, Library], ids: list[int], skip: bool
) -> None:
    tokenizer, library = levels
    bytes_of = tokenizer.text_bytes if skip else tokenizer.token_bytes
    assert b"".join(map(bytes_of, ids)).decode(errors="replace") == library.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_survives(levels: tuple[Tokenizer, Library], text: str) -> None:
    tokenizer, _ = levels
    ids = tokenizer.encode(text)
    assert text_of(tokenizer, ids) == text == tokenizer.decode(ids)


def test_sentencepiece_keeps_the_blank_that_begins_a_continuation(tmp_path: Path) -> None:
    tokenizer = Tokenizer(sentencepiece(tmp_path))
    ids = tokenizer.encode("The x 世")
    assert tokenizer.decode(ids) == "The x 世"
    assert text_of(tokenizer, ids) == " The x 世"
    assert tokenizer.token_bytes(tokenizer.encode("世")[-1]) == "世".encode()[-1:]
    assert tokenizer.text_bytes(1) == b""
    assert tokenizer.token_bytes(1) == b"<s>"


def test_other_decoders_are_asked(tmp_path: Path) -> None:
    tokenizer = Tokenizer(word_piece(tmp_path))
    ids = tokenizer.encode("ab c")
    assert ids == [1, 2, 3]
    assert [tokenizer.token_bytes(id) for id in ids] == [b" a", b"b", b" c"]


def test_ids_without_a_token_are_empty(levels: tuple[Tokenizer, Library]) -> None:
    tokenizer, _ = levels
    assert tokenizer.token_bytes(10_000) == tokenizer.token_bytes(-1) == b""


def test_special_tokens_and_template_are_found_where_they_may_be(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "</s>", "bos_token": {"content": "<s>"}})
    )
    template = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": None}))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template) == (0, 1, "y")
    (tmp_path / "chat_template.jinja").write_text("z")
    assert Tokenizer(tmp_path).chat_template == "z"


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model":\n 3}')
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read") as raised:
        Tokenizer(tmp_path)
    assert "\n" not in str(raised.value)
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer(tmp_path)
