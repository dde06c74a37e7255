"""Writes a checkpoint of a real shape with random weights and a tokenizer that knows every id, for benchmarks.

    python tools/random_checkpoint.py qwen3-0.6b DIR

Needs transformers (the extra of that name). Shapes: see SHAPES; "medium" and "small" are quick on a single core, "tiny"
is for tests of the tools themselves.
"""

from __future__ import annotations

import argparse
import itertools
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

SHAPES = {
    "qwen3-0.6b": {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
    "medium": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 16000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "small": {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 4096,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: a space and up to four letters are a token, each of the token that is a letter shorter.

    So text that a model makes of words is the same tokens again, and programs that ask for merges find some.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (
        "Ġ" + "".join(letters)
        for size in range(1, 5)
        for letters in itertools.product(string.ascii_lowercase, repeat=size)
    )
    words = list(itertools.islice(words, vocab_size - len(alphabet) - 1))
    tokens = ["<|end|>", *alphabet, *words]
    merges = [(word[:-1], word[-1]) for word in words]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT_TEMPLATE)  # noqa: S106


def write(shape: str, folder: Path, seed: int = 0) -> None:
    """Saves the checkpoint (bf16) and its tokenizer into `folder`."""
    torch.manual_seed(seed)
    config = Qwen3Config(**SHAPES[shape], eos_token_id=0, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer(config.vocab_size).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write(arguments.shape, arguments.folder)
    print(f"wrote {arguments.shape} to {arguments.folder}")
