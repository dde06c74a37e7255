"""Writes a checkpoint of Llama's architecture with random bfloat16 weights: something to measure, not to talk to."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes as in a Llama config; heads are of hidden / heads. max_positions: longest context in tokens."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int
    max_positions: int


def write_random(folder: Path, shape: Shape, seed: int = 0) -> None:
    """Fills an existing folder with config.json and model.safetensors; the same bytes for the same shape and seed.

    Weights are normal with variance 1 / inputs, so that values keep their size through the layers.
    """
    generator = torch.Generator().manual_seed(seed)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=generator).mul_(inputs**-0.5).to(torch.bfloat16)

    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {
        "model.embed_tokens.weight": matrix(shape.vocab, hidden),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": matrix(shape.vocab, hidden),
    }
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": ones.clone(),
            f"{layer}.post_attention_layernorm.weight": ones.clone(),
            f"{layer}.self_attn.q_proj.weight": matrix(hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(kv, hidden),
            f"{layer}.self_attn.v_proj.weight": matrix(kv, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": matrix(shape.mlp, hidden),
            f"{layer}.mlp.up_proj.weight": matrix(shape.mlp, hidden),
            f"{layer}.mlp.down_proj.weight": matrix(hidden, shape.mlp),
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
