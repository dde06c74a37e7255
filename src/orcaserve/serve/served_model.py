"""`ServedModel`: what the frontend knows of the model that it serves: its names, tokenizer, template and defaults."""

from __future__ import annotations

from pathlib import Path

import msgspec

from orcaserve.core.config import ModelError
from orcaserve.core.request import Pooling
from orcaserve.model.config import Generation, read_generation
from orcaserve.serve.chat_template import ChatTemplate
from orcaserve.serve.structured import Structures
from orcaserve.serve.tokenizer import Tokenizer
from orcaserve.worker.process import give_back_freed_memory


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request is silent: what the checkpoint's generation_config.json says, else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class _PoolingConfig(msgspec.Struct):
    """1_Pooling/config.json, as sentence-transformers writes it."""

    pooling_mode_mean_tokens: bool = False


class ServedModel:
    """Read-only once loaded. end_token_ids: tokens that end a response unless it ignores them.

    pooling: how embeddings are made of hidden values, where a request does not say.
    """

    def __init__(self, name: str, folder: str | Path) -> None:
        """Reads the folder; raises ModelError."""
        folder = Path(folder)
        self.name = name
        self.tokenizer = Tokenizer(folder)
        source = self.tokenizer.chat_template
        self.chat_template = None if source is None else ChatTemplate(source, self.tokenizer.special_tokens)
        self.pooling = _pooling(folder)
        generation = read_generation(folder)
        self.defaults = _defaults(generation)
        ends = {*generation.eos_token_ids, self.tokenizer.eos_token_id}
        self.end_token_ids = tuple(sorted(id for id in ends if id is not None))
        vocab_size = self.tokenizer.num_tokens if generation.vocab_size is None else generation.vocab_size
        self.structures = Structures(folder, vocab_size, self.end_token_ids)
        give_back_freed_memory()


def _pooling(folder: Path) -> Pooling:
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return "last"
    try:
        config = msgspec.json.decode(path.read_bytes(), type=_PoolingConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{folder.name}/1_Pooling/config.json cannot be read: {error}") from None
    return "mean" if config.pooling_mode_mean_tokens else "last"


def _defaults(generation: Generation) -> SamplingDefaults:
    """Values outside the ranges that requests have are left out."""
    ranges = {
        "temperature": (0.0, 2.0),
        "top_p": (0.0, 1.0),
        "top_k": (0, 2**31 - 1),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (1e-3, 10.0),
    }
    given = {name: getattr(generation, name) for name in ranges}
    fit = {
        name: value
        for name, value in given.items()
        if value is not None and ranges[name][0] <= value <= ranges[name][1]
    }
    return SamplingDefaults(**fit)
