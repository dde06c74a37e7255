"""Models to measure, as their config.json describes them; weights are drawn, so that there is nothing to download."""

from __future__ import annotations

from typing import Any


def _qwen3(layers: int, hidden: int, mlp: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": tied,
    }


_LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 1000, "dtype": "float32"}
_SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024}

MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, tied=True),
    "Qwen3-8B": _qwen3(36, 4096, 12288, 32, tied=False),
    "Llama-3.1-8B": _LLAMA_8B,
    "toy": _qwen3(1, 32, 48, 2, tied=True)
    | _SMALL
    | {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 128}
    | {"num_attention_heads": 2, "num_key_value_heads": 1},
    "Qwen3-30B-A3B": _qwen3(48, 2048, 6144, 32, tied=False)
    | _EXPERTS
    | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8},
    "toy mixture": _qwen3(1, 32, 48, 2, tied=True)
    | _SMALL
    | _EXPERTS
    | {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 128, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "tiny Qwen3": _qwen3(2, 64, 96, 4, tied=True) | _SMALL,
    "tiny Llama": _LLAMA_8B | _SMALL | {"rope_scaling": None},
    "tiny GPT-2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": "float32",
        "vocab_size": 1000,
        "n_positions": 1024,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "tie_word_embeddings": True,
    },
}
SMALL = ("tiny GPT-2", "tiny Llama", "tiny Qwen3")  # in float32, to compare tokens with those of another device
