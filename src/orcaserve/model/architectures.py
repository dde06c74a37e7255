"""The table of architectures: everything in which one decoder differs from another, as rows of data. No torch.

A row says which shape the blocks have, what the tensors are called in the files, and under which names config.json
keeps the numbers. `orcaserve.model.config` reads a checkpoint's numbers through its row; `orcaserve.model.decoder` is
the one decoder that all rows share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

Keys = Mapping[str, tuple[str, ...]]
Block = Literal["pre", "parallel", "post"]

# Our name of a number -> the names config.json may keep it under, the first one found wins.
COMMON_KEYS: Keys = MappingProxyType(
    {
        "vocab_size": ("vocab_size",),
        "hidden_size": ("hidden_size",),
        "num_layers": ("num_hidden_layers",),
        "num_heads": ("num_attention_heads",),
        "num_kv_heads": ("num_key_value_heads",),
        "head_dim": ("head_dim",),
        "intermediate_size": ("intermediate_size",),
        "max_positions": ("max_position_embeddings",),
        "norm_eps": ("rms_norm_eps",),
        "activation": ("hidden_act",),
        "num_experts": ("num_experts", "num_local_experts"),
        "experts_per_token": ("num_experts_per_tok",),
        "expert_size": ("moe_intermediate_size", "intermediate_size"),
    }
)

# Role of a tensor -> its name in the file, without ".weight" and ".bias"; {i} is the layer, {e} the expert.
_LLAMA = MappingProxyType(
    {
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "head": "lm_head",
        "attention_norm": "model.layers.{i}.input_layernorm",
        "q": "model.layers.{i}.self_attn.q_proj",
        "k": "model.layers.{i}.self_attn.k_proj",
        "v": "model.layers.{i}.self_attn.v_proj",
        "qkv": "model.layers.{i}.self_attn.qkv_proj",
        "q_norm": "model.layers.{i}.self_attn.q_norm",
        "k_norm": "model.layers.{i}.self_attn.k_norm",
        "o": "model.layers.{i}.self_attn.o_proj",
        "mlp_norm": "model.layers.{i}.post_attention_layernorm",
        "gate": "model.layers.{i}.mlp.gate_proj",
        "up": "model.layers.{i}.mlp.up_proj",
        "gate_up": "model.layers.{i}.mlp.gate_up_proj",
        "down": "model.layers.{i}.mlp.down_proj",
        "router": "model.layers.{i}.mlp.gate",
        "expert_gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
        "expert_up": "model.layers.{i}.mlp.experts.{e}.up_proj",
        "expert_down": "model.layers.{i}.mlp.experts.{e}.down_proj",
    }
)
_MIXTRAL = MappingProxyType(
    {
        **_LLAMA,
        "router": "model.layers.{i}.block_sparse_moe.gate",
        "expert_gate": "model.layers.{i}.block_sparse_moe.experts.{e}.w1",
        "expert_up": "model.layers.{i}.block_sparse_moe.experts.{e}.w3",
        "expert_down": "model.layers.{i}.block_sparse_moe.experts.{e}.w2",
    }
)
_GEMMA2 = MappingProxyType(
    {
        **_LLAMA,
        "attention_out_norm": "model.layers.{i}.post_attention_layernorm",
        "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
        "mlp_out_norm": "model.layers.{i}.post_feedforward_layernorm",
    }
)
_GEMMA3_MULTIMODAL = MappingProxyType({role: f"language_model.{name}" for role, name in _GEMMA2.items()})
_GPT2 = MappingProxyType(
    {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
        "attention_norm": "transformer.h.{i}.ln_1",
        "qkv": "transformer.h.{i}.attn.c_attn",
        "o": "transformer.h.{i}.attn.c_proj",
        "mlp_norm": "transformer.h.{i}.ln_2",
        "up": "transformer.h.{i}.mlp.c_fc",
        "down": "transformer.h.{i}.mlp.c_proj",
    }
)
_OPT = MappingProxyType(
    {
        "embed": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "project_in": "model.decoder.project_in",
        "project_out": "model.decoder.project_out",
        "final_norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
        "attention_norm": "model.decoder.layers.{i}.self_attn_layer_norm",
        "q": "model.decoder.layers.{i}.self_attn.q_proj",
        "k": "model.decoder.layers.{i}.self_attn.k_proj",
        "v": "model.decoder.layers.{i}.self_attn.v_proj",
        "o": "model.decoder.layers.{i}.self_attn.out_proj",
        "mlp_norm": "model.decoder.layers.{i}.final_layer_norm",
        "up": "model.decoder.layers.{i}.fc1",
        "down": "model.decoder.layers.{i}.fc2",
    }
)
_NEOX = MappingProxyType(
    {
        "embed": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "attention_norm": "gpt_neox.layers.{i}.input_layernorm",
        "qkv": "gpt_neox.layers.{i}.attention.query_key_value",
        "o": "gpt_neox.layers.{i}.attention.dense",
        "mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
        "up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
        "down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    }
)
_BLOOM = MappingProxyType(
    {
        "embed": "transformer.word_embeddings",
        "embed_norm": "transformer.word_embeddings_layernorm",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
        "attention_norm": "transformer.h.{i}.input_layernorm",
        "qkv": "transformer.h.{i}.self_attention.query_key_value",
        "o": "transformer.h.{i}.self_attention.dense",
        "mlp_norm": "transformer.h.{i}.post_attention_layernorm",
        "up": "transformer.h.{i}.mlp.dense_h_to_4h",
        "down": "transformer.h.{i}.mlp.dense_4h_to_h",
    }
)
_MPT = MappingProxyType(
    {
        "embed": "transformer.wte",
        "final_norm": "transformer.norm_f",
        "head": "lm_head",
        "attention_norm": "transformer.blocks.{i}.norm_1",
        "qkv": "transformer.blocks.{i}.attn.Wqkv",
        "o": "transformer.blocks.{i}.attn.out_proj",
        "mlp_norm": "transformer.blocks.{i}.norm_2",
        "up": "transformer.blocks.{i}.ffn.up_proj",
        "down": "transformer.blocks.{i}.ffn.down_proj",
    }
)


@dataclass(frozen=True)
class Architecture:
    """One row.

    norm: "rms", "rms_plus_one" (the stored weight is added to one), "layer".
    block: "pre": x += f(norm(x)), twice. "parallel": both halves read the same x. "post": x = norm(x + f(x)), twice.
        With the roles attention_out_norm and mlp_out_norm, what is added to x is normed as well.
    block_switch: (config.json's switch, the block where that switch is false).
    qkv: three matrices; one with q, k and v below each other; or one with them side by side for every head.
    mlp: "plain": down(act(up(x))); "gated": down(act(gate(x)) * up(x)); "gated_fused": gate and up in one matrix.
    norm_bias: layer norms have a bias; rms norms never do.
    learned_positions: None, or the number of rows that the table of learned positions has before position 0.
    alibi: positions are told by ALiBi, with slopes that follow from the number of heads; neither learned nor rotated.
    windows: which layers see only the last `sliding_window` positions where config.json does not list them.
    biases: which roles have a bias: pairs (config.json's switch or None for always, roles).
    transposed: matrices are stored as [in, out].
    experts: layers may be mixtures of experts.
    scaled_embedding: embeddings are multiplied by the root of hidden_size.
    nested: the key of config.json's object that holds numbers as well, and first of all; None: config.json alone.
    keys: exceptions to COMMON_KEYS; () where the family does not have the number.
    defaults: values of config.json's keys that checkpoints leave out.
    unsupported: values of config.json's keys that mean another computation than ours.
    unknown: keys of config.json that do so whatever they are set to, unless to null.
    aliases: other names that checkpoints give the architecture.
    """

    name: str
    model_type: str
    names: Mapping[str, str]
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    block: Block = "pre"
    block_switch: tuple[str, Block] | None = None
    qkv: Literal["separate", "stacked", "per_head"] = "separate"
    mlp: Literal["plain", "gated", "gated_fused"] = "gated"
    norm_bias: bool = True
    learned_positions: int | None = None
    alibi: bool = False
    windows: Literal["none", "all", "alternate", "pattern", "upper"] = "none"
    biases: tuple[tuple[str | None, tuple[str, ...]], ...] = ()
    qk_norm: bool = False
    transposed: bool = False
    experts: bool = False
    scaled_embedding: bool = False
    nested: str | None = None
    keys: Keys = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unsupported: tuple[tuple[str, Any], ...] = ()
    unknown: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


_ATTENTION = ("q", "k", "v", "o")
_ATTENTION_BIAS = (("attention_bias", _ATTENTION),)
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA_KEYS: Keys = {"activation": ("hidden_activation",)}
_GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}

_GEMMA3 = Architecture(
    name="Gemma3ForCausalLM",
    model_type="gemma3_text",
    names=_GEMMA2,
    norm="rms_plus_one",
    windows="pattern",
    biases=_ATTENTION_BIAS,
    qk_norm=True,
    scaled_embedding=True,
    keys=_GEMMA_KEYS,
    defaults={
        **_GEMMA_DEFAULTS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262208,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    unsupported=(("use_bidirectional_attention", True),),
)

ROWS: tuple[Architecture, ...] = (
    Architecture(
        name="GPT2LMHeadModel",
        model_type="gpt2",
        names=_GPT2,
        norm="layer",
        qkv="stacked",
        mlp="plain",
        learned_positions=0,
        biases=((None, ("qkv", "o", "up", "down")),),
        transposed=True,
        keys={
            "hidden_size": ("n_embd",),
            "num_layers": ("n_layer",),
            "num_heads": ("n_head",),
            "num_kv_heads": (),
            "intermediate_size": ("n_inner",),
            "max_positions": ("n_positions",),
            "norm_eps": ("layer_norm_epsilon",),
            "activation": ("activation_function",),
        },
        defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        unsupported=(
            ("scale_attn_weights", False),
            ("scale_attn_by_inverse_layer_idx", True),
            ("add_cross_attention", True),
        ),
    ),
    Architecture(
        name="OPTForCausalLM",
        model_type="opt",
        names=_OPT,
        norm="layer",
        block_switch=("do_layer_norm_before", "post"),
        mlp="plain",
        learned_positions=2,
        biases=(("enable_bias", (*_ATTENTION, "up", "down")),),
        keys={
            "num_kv_heads": (),
            "intermediate_size": ("ffn_dim",),
            "activation": ("activation_function",),
            "norm_eps": ("norm_eps",),
        },
        defaults={
            "activation_function": "relu",
            "enable_bias": True,
            "norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        unsupported=(("layer_norm_elementwise_affine", False), ("_remove_final_layer_norm", True)),
    ),
    Architecture(
        name="GPTNeoXForCausalLM",
        model_type="gpt_neox",
        names=_NEOX,
        norm="layer",
        block="parallel",
        block_switch=("use_parallel_residual", "pre"),
        qkv="per_head",
        mlp="plain",
        biases=(("attention_bias", ("qkv", "o")), (None, ("up", "down"))),
        keys={"num_kv_heads": (), "norm_eps": ("layer_norm_eps",)},
        defaults={
            "attention_bias": True,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000.0,
        },
    ),
    Architecture(
        name="BloomForCausalLM",
        model_type="bloom",
        names=_BLOOM,
        norm="layer",
        qkv="per_head",
        mlp="plain",
        alibi=True,
        biases=((None, ("qkv", "o", "up", "down")),),
        keys={
            "hidden_size": ("hidden_size", "n_embed"),
            "num_layers": ("n_layer", "num_hidden_layers"),
            "num_heads": ("n_head", "num_attention_heads"),
            "num_kv_heads": (),
            "intermediate_size": ("n_inner",),
            "max_positions": ("seq_length",),
            "norm_eps": ("layer_norm_epsilon",),
        },
        defaults={
            "hidden_act": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "seq_length": 2048,
            "tie_word_embeddings": True,
        },
        unsupported=(("apply_residual_connection_post_layernorm", True),),
    ),
    Architecture(
        name="MptForCausalLM",
        model_type="mpt",
        names=_MPT,
        norm="layer",
        norm_bias=False,
        qkv="stacked",
        mlp="plain",
        alibi=True,
        nested="attn_config",
        keys={
            "hidden_size": ("d_model",),
            "num_layers": ("n_layers",),
            "num_heads": ("n_heads",),
            "num_kv_heads": (),
            "intermediate_size": (),
            "max_positions": ("max_seq_len",),
            "norm_eps": ("layer_norm_epsilon",),
        },
        defaults={"hidden_act": "gelu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        unsupported=(
            ("alibi", False),
            ("rope", True),
            ("attn_type", "multiquery_attention"),
            ("prefix_lm", True),
            ("qk_ln", True),
            ("no_bias", False),
        ),
        unknown=("clip_qkv", "softmax_scale", "logit_scale"),
        aliases=("MPTForCausalLM",),
    ),
    Architecture(
        name="LlamaForCausalLM",
        model_type="llama",
        names=_LLAMA,
        biases=(("attention_bias", _ATTENTION), ("mlp_bias", ("gate", "up", "down"))),
        defaults={"rms_norm_eps": 1e-6},
    ),
    Architecture(
        name="MistralForCausalLM",
        model_type="mistral",
        names=_LLAMA,
        windows="all",
        defaults={"rms_norm_eps": 1e-6, "sliding_window": 4096},
    ),
    Architecture(
        name="Qwen2ForCausalLM",
        model_type="qwen2",
        names=_LLAMA,
        windows="upper",
        biases=((None, ("q", "k", "v")),),
        defaults={"rms_norm_eps": 1e-6, **_QWEN_WINDOWS},
    ),
    Architecture(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        names=_LLAMA,
        windows="upper",
        biases=_ATTENTION_BIAS,
        qk_norm=True,
        defaults={"head_dim": 128, "rms_norm_eps": 1e-6, **_QWEN_WINDOWS},
    ),
    Architecture(
        name="GemmaForCausalLM",
        model_type="gemma",
        names=_LLAMA,
        norm="rms_plus_one",
        biases=_ATTENTION_BIAS,
        scaled_embedding=True,
        # The first Gemma checkpoints say hidden_act "gelu" and mean the tanh form; only hidden_activation counts.
        keys=_GEMMA_KEYS,
        defaults=_GEMMA_DEFAULTS,
        unsupported=(("use_bidirectional_attention", True),),
    ),
    Architecture(
        name="Gemma2ForCausalLM",
        model_type="gemma2",
        names=_GEMMA2,
        norm="rms_plus_one",
        windows="alternate",
        biases=_ATTENTION_BIAS,
        scaled_embedding=True,
        keys=_GEMMA_KEYS,
        defaults={
            **_GEMMA_DEFAULTS,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        unsupported=(("use_bidirectional_attention", True),),
    ),
    _GEMMA3,
    # Only what reads and writes text; images are not served.
    replace(
        _GEMMA3,
        name="Gemma3ForConditionalGeneration",
        model_type="gemma3",
        names=_GEMMA3_MULTIMODAL,
        nested="text_config",
    ),
    Architecture(
        name="Phi3ForCausalLM",
        model_type="phi3",
        names=_LLAMA,
        qkv="stacked",
        mlp="gated_fused",
        windows="all",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    Architecture(
        name="MixtralForCausalLM",
        model_type="mixtral",
        names=_MIXTRAL,
        windows="all",
        experts=True,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "norm_topk_prob": True},
    ),
    Architecture(
        name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        names=_LLAMA,
        windows="all",
        biases=_ATTENTION_BIAS,
        qk_norm=True,
        experts=True,
        defaults={"rms_norm_eps": 1e-6, **_QWEN_WINDOWS},
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.name: row for row in ROWS})
MODEL_TYPES: Mapping[str, Architecture] = MappingProxyType({row.model_type: row for row in ROWS})
