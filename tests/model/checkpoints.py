"""Small random checkpoints of every architecture, saved by transformers itself, and a bench that drives our decoder."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import kernel_sets
import torch
import transformers

from orcaserve.core.config import Dtype
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder, compute_dtype
from orcaserve.ops.kernels import Kernels
from orcaserve.ops.layout import Layout

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB = 97
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB,
    "word_embed_proj_dim": 32,
}
_BLOOM = {
    "hidden_size": 32,
    "n_layer": 3,
    "n_head": 4,
    "seq_length": 128,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MPT = {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128, "vocab_size": VOCAB}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
_QWEN = {**_SMALL, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
_GEMMA = {**_SMALL, "head_dim": 12}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA3 = {**_GEMMA, "sliding_window": 6, "layer_types": _MIXED, "query_pre_attn_scalar": 20}
_VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28}
_MOE = {**_SMALL, "head_dim": 12, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


# id -> (transformers' config class, its arguments)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2),
    "gpt2-untied": (
        "GPT2Config",
        {**_GPT2, "tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"},
    ),
    "opt": ("OPTConfig", _OPT),
    "opt-350m": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "opt-no-bias": ("OPTConfig", {**_OPT, "enable_bias": False, "activation_function": "gelu"}),
    "gpt-neox": ("GPTNeoXConfig", {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"}),
    "gpt-neox-sequential": (
        "GPTNeoXConfig",
        {
            **_SMALL,
            "use_parallel_residual": False,
            "attention_bias": False,
            **_rope("default", partial_rotary_factor=0.5),
        },
    ),
    "bloom": ("BloomConfig", _BLOOM),
    "bloom-six-heads": ("BloomConfig", {**_BLOOM, "hidden_size": 48, "n_head": 6, "tie_word_embeddings": False}),
    "mpt": ("MptConfig", _MPT),
    "mpt-six-heads": ("MptConfig", {**_MPT, "d_model": 48, "n_heads": 6, "attn_config": {"alibi_bias_max": 8}}),
    "llama-2": ("LlamaConfig", _SMALL),
    "llama-tied-biased": (
        "LlamaConfig",
        {**_SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-3": ("LlamaConfig", {**_SMALL, "head_dim": 16, **_rope("llama3", **_LLAMA3)}),
    "llama-linear": ("LlamaConfig", {**_SMALL, **_rope("linear", factor=4.0)}),
    "llama-dynamic": ("LlamaConfig", {**_SMALL, **_rope("dynamic", factor=4.0)}),
    "llama-yarn": ("LlamaConfig", {**_SMALL, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)}),
    "mistral": ("MistralConfig", {**_SMALL, "sliding_window": 7}),
    "mistral-full": ("MistralConfig", {**_SMALL, "sliding_window": None, "head_dim": 24}),
    "qwen2": ("Qwen2Config", {**_SMALL, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2Config", _QWEN),
    "qwen3": ("Qwen3Config", {**_SMALL, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-window": ("Qwen3Config", {**_QWEN, "head_dim": 12, "attention_bias": True}),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma-2": (
        "Gemma2Config",
        {**_GEMMA, "sliding_window": 6, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0},
    ),
    "gemma-3": ("Gemma3TextConfig", _GEMMA3),
    "gemma-3-multimodal": (
        "Gemma3Config",
        {"text_config": _GEMMA3, "vision_config": _VISION, "mm_tokens_per_image": 1},
    ),
    "phi-3": ("Phi3Config", {**_SMALL, "sliding_window": 11}),
    "phi-3-long": (
        "Phi3Config",
        {
            **_SMALL,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 128,
            **_rope("longrope", short_factor=[1.0, 1.25], long_factor=[2.0, 3.0], partial_rotary_factor=0.5),
        },
    ),
    "mixtral": ("MixtralConfig", {**_SMALL, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": (
        "MixtralConfig",
        {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 8},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**_MOE, "norm_topk_prob": True}),
    "qwen3-moe-every-other": ("Qwen3MoeConfig", {**_MOE, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "qwen3-moe-mixed": (
        "Qwen3MoeConfig",
        {**_MOE, "norm_topk_prob": False, "mlp_only_layers": [1], "attention_bias": True},
    ),
}


def make_model(config_class: str, arguments: dict[str, Any], seed: int) -> Any:
    """A transformers model, fp32, eager attention; every parameter is random, none is left at zero or one."""
    config = getattr(transformers, config_class)(**arguments)
    torch.manual_seed(seed)
    maker = transformers.AutoModelForCausalLM
    if config.model_type == "gemma3":
        maker = transformers.AutoModelForImageTextToText
    model = maker.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5 if "embed" not in name else 0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def expected_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """transformers' own logits of a whole prompt, float32 [n, V]."""
    with torch.no_grad():
        return model(torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()


def expected_tokens(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The tokens that transformers' own greedy generation adds to a prompt, whatever they are."""
    model.generation_config.eos_token_id = None
    ids = torch.tensor([list(prompt)])
    mask = torch.ones_like(ids)  # else it would take token 0 for padding
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


class Bench:
    """Runs requests through stages of a decoder over a paged cache with scattered blocks; owns the caches."""

    def __init__(self, stages: Sequence[Decoder], num_blocks: int = 64, seed: int = 0) -> None:
        self.stages = stages
        self.block_size = max(4, stages[0].kernels.block_multiple)
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.tables: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.kv = [
            [
                stage.kernels.kv_cache(num_blocks, self.block_size, stage.num_kv_heads, stage.head_dim, stage.dtype)
                for _ in range(stage.num_layers)
            ]
            for stage in stages
        ]
        # What no request has written is NaN, so that reading it shows.
        for cache in chain(*self.kv):
            kernel_sets.fill_cache(cache, float("nan"))

    def step(self, rows: Iterable[tuple[int, Sequence[int]]]) -> list[torch.Tensor]:
        """One iteration: (request, its next tokens) of each row -> logits [n, V] of each row."""
        rows = list(rows)
        return list(self.stages[-1].logits(self.hidden(rows)).split([len(tokens) for _, tokens in rows]))

    def hidden(self, rows: Sequence[tuple[int, Sequence[int]]]) -> torch.Tensor:
        """The same -> the hidden values behind the last layer [ΣL, H]."""
        parts = []
        for request, tokens in rows:
            start = self.computed.setdefault(request, 0)
            table = self.tables.setdefault(request, [])
            while len(table) * self.block_size < start + len(tokens):
                table.append(self.free.pop())
            parts.append((start, len(tokens), list(table)))
            self.computed[request] = start + len(tokens)
        layout = Layout.build(parts, self.block_size)
        x = torch.tensor([token for _, tokens in rows for token in tokens])
        for stage, kv in zip(self.stages, self.kv, strict=True):
            x = stage.forward(x, layout, kv)
        return x


def load(
    folder: Path, dtype: Dtype = "float32", cuts: Sequence[int] = (), kernels: Kernels | None = None
) -> list[Decoder]:
    """Our decoder of a checkpoint, in stages cut at the given layers."""
    config = read_config(folder)
    borders = [0, *cuts, config.num_layers]
    wanted = compute_dtype(config, dtype)
    return [Decoder.load(config, folder, wanted, a, b, kernels=kernels) for a, b in pairwise(borders)]
