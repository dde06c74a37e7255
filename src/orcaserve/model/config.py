"""`ModelConfig`: what config.json and generation_config.json say about a checkpoint, in one vocabulary. No torch.

All names that differ from family to family end here; the decoder sees only these fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from orcaserve.core.config import ModelError
from orcaserve.model.alibi import alibi_slopes
from orcaserve.model.architectures import ARCHITECTURES, COMMON_KEYS, MODEL_TYPES, ROWS, Architecture, Block
from orcaserve.model.rope import Rope, rope
from orcaserve.model.tied import has_own_head

_LIMIT = 1 << 31  # no size in a config.json is beyond it; what is, is not a model


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint's own wishes for sampling; None where it has none. eos_token_ids: tokens that end a response.

    vocab_size: of the logits; None if config.json does not say.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    vocab_size: int | None = None


class LayerConfig(msgspec.Struct, frozen=True):
    """One layer. window: positions that attention sees, itself included; None: all before. rope: None without.

    sparse: the MLP is a mixture of experts.
    """

    window: int | None = None
    rope: Rope | None = None
    sparse: bool = False


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A model's numbers. Sizes in values, tokens or rows.

    row: the architecture's row of the table. block: the row's, unless config.json switches it.
    dtype: of the checkpoint. embedding_size: width of embeddings and output matrix (hidden_size but for OPT-350m).
    max_positions: longest sequence that the positions allow.
    biases: roles that have a bias. tied: the output matrix is the embedding. alibi: slope of each head; None without.
    attention_scale: factor to q·k. softcaps: None without. expert_*: 0 without experts.
    """

    row: Architecture
    block: Block
    dtype: Literal["float32", "bfloat16", "float16"]
    vocab_size: int
    hidden_size: int
    embedding_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str
    biases: frozenset[str]
    tied: bool
    alibi: tuple[float, ...] | None
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    num_experts: int
    experts_per_token: int
    expert_size: int
    normalise_experts: bool
    layers: tuple[LayerConfig, ...]
    generation: Generation

    @property
    def architecture(self) -> str:
        return self.row.name

    @property
    def num_layers(self) -> int:
        return len(self.layers)


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the folder of a Hugging Face checkpoint. Raises ModelError, in one line, if it is not ours to serve."""
    folder = Path(folder)
    config = make_config(read_raw_config(folder), folder.name, read_generation(folder))
    names = config.row.names
    if config.tied and "head" in names and has_own_head(folder, f"{names['embed']}.weight", f"{names['head']}.weight"):
        return msgspec.structs.replace(config, tied=False)
    return config


def make_config(raw: Mapping[str, Any], name: str, generation: Generation) -> ModelConfig:
    """From what a config.json holds. name: of the model, for messages. Raises ModelError as `read_config` does."""
    row = find_row(raw)
    if row is None:
        raise ModelError(
            f"{name}: {_name(raw)} is not among the architectures of OrcaServe ({', '.join(ARCHITECTURES)}); "
            "with the extra 'transformers' (pip install 'orcaserve[transformers]') it serves other decoders too"
        )
    try:
        return _model_config(_flat(raw, row), row, generation)
    except KeyError as error:
        raise ModelError(f"{name}/config.json lacks {error.args[0]}") from error
    except (AttributeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ModelError(f"{name}/config.json: {error}") from error


def read_raw_config(folder: Path) -> dict[str, Any]:
    """config.json of a model that could be served by some backend: a decoder whose weights are not quantised.

    Raises ModelError otherwise.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no model folder {folder}")
    raw = _read_json(folder / "config.json")
    if raw is None:
        raise ModelError(f"{folder} holds no config.json: it is not a Hugging Face checkpoint")
    quantised = _quantisation(raw) or _quantisation(_read_json(folder / "hf_quant_config.json") or {})
    if quantised:
        raise ModelError(
            f"{folder.name}: the weights are quantised ({quantised}), which is not supported yet; "
            "serve the checkpoint with plain weights"
        )
    if raw.get("is_encoder_decoder"):
        raise ModelError(f"{folder.name}: {_name(raw)} is an encoder-decoder model; only decoders can be served")
    names = _architectures(raw)
    if names and not any(name.endswith(("ForCausalLM", "LMHeadModel")) or name in ARCHITECTURES for name in names):
        raise ModelError(
            f"{folder.name}: {_name(raw)} is not a language model that generates text; it cannot be served"
        )
    return raw


def find_row(raw: Mapping[str, Any]) -> Architecture | None:
    """The row of the table for a config.json, None if there is none."""
    names = _architectures(raw)
    if names:
        return next((row for name in names for row in ROWS if name in (row.name, *row.aliases)), None)
    return MODEL_TYPES.get(str(raw.get("model_type")))


def read_generation(folder: str | Path) -> Generation:
    """Sampling wishes and special tokens of a checkpoint, from generation_config.json before config.json."""
    folder = Path(folder)
    outer = raw = _read_json(folder / "config.json") or {}
    row = find_row(raw)
    if row is not None:
        raw = _flat(raw, row)
    wishes = _read_json(folder / "generation_config.json") or {}
    vocab_size = size if type(size := raw.get("vocab_size")) is int else None
    limit = _LIMIT if vocab_size is None else vocab_size

    def token_ids(key: str) -> tuple[int, ...]:
        value = next((found for one in (wishes, outer, raw) if (found := one.get(key)) is not None), None)
        # Checkpoints name end tokens beyond their own vocabulary (a resized one); such tokens can never be drawn.
        values = value if isinstance(value, list) else [value]
        return tuple(dict.fromkeys(t for t in values if type(t) is int and 0 <= t < limit))

    def number(key: str) -> float | None:
        value = wishes.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    top_k = number("top_k")
    return Generation(
        bos_token_id=next(iter(token_ids("bos_token_id")), None),
        eos_token_ids=token_ids("eos_token_id"),
        pad_token_id=next(iter(token_ids("pad_token_id")), None),
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
        vocab_size=vocab_size,
    )


def _flat(raw: Mapping[str, Any], row: Architecture) -> dict[str, Any]:
    """config.json with the numbers of its nested object on top, but for nulls that would hide one."""
    nested = raw.get(row.nested) if row.nested is not None else None
    if not isinstance(nested, dict):
        return dict(raw)
    return {**raw, **{key: value for key, value in nested.items() if value is not None or key not in raw}}


def _model_config(raw: Mapping[str, Any], row: Architecture, generation: Generation) -> ModelConfig:
    def value(key: str, default: Any = None) -> Any:
        """config.json's value (its null is a value: "without"), else the row's default, else `default`."""
        return raw[key] if key in raw else row.defaults.get(key, default)

    def number(name: str, default: int | None = None) -> int:
        keys = row.keys.get(name, COMMON_KEYS[name])
        found = next((found for key in keys if (found := value(key)) is not None), default)
        if found is None:
            raise KeyError(keys[0])
        if type(found) is not int or not 0 < found < _LIMIT:
            raise ValueError(f"{keys[0]} is {found!r}")
        return found

    def text(name: str, default: str) -> str:
        key = row.keys.get(name, COMMON_KEYS[name])[0]
        return str(value(key) or row.defaults.get(key, default))

    for key, meaning in row.unsupported:
        if raw.get(key, not meaning) == meaning:
            raise ValueError(f"{key} = {json.dumps(meaning)} is not supported")
    for key in row.unknown:
        if raw.get(key) is not None:
            raise ValueError(f"{key} = {json.dumps(raw[key])} is not supported")

    hidden_size, num_heads = number("hidden_size"), number("num_heads")
    head_dim = number("head_dim", hidden_size // num_heads)
    num_layers, max_positions = number("num_layers"), number("max_positions")
    num_kv_heads = number("num_kv_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly")
    intermediate_size = number("intermediate_size", 4 * hidden_size)

    windows = _windows(row, value, num_layers)
    ropes = {False: None, True: None}
    rotates = row.learned_positions is None and not row.alibi
    if rotates:
        ropes = {local: _rope(raw, value, local, head_dim, max_positions) for local in (False, True)}
    layers = tuple(
        LayerConfig(window, ropes[window is not None], row.experts and _is_sparse(value, i))
        for i, window in enumerate(windows)
    )
    limits = [] if rotates else [max_positions]
    limits += [layer.rope.max_positions or max_positions for layer in layers if layer.rope]
    sparse = any(layer.sparse for layer in layers)
    num_experts = number("num_experts") if sparse else 0
    experts_per_token = number("experts_per_token") if sparse else 0
    if experts_per_token > num_experts:
        raise ValueError(f"{experts_per_token} experts per token of {num_experts}")

    block = row.block
    if row.block_switch is not None and value(row.block_switch[0], True) is False:
        block = row.block_switch[1]
    eps = value(row.keys.get("norm_eps", COMMON_KEYS["norm_eps"])[0])
    return ModelConfig(
        row=row,
        block=block,
        dtype=_dtype(raw),
        vocab_size=number("vocab_size"),
        hidden_size=hidden_size,
        embedding_size=int(value("word_embed_proj_dim", hidden_size)),
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=min(limits),
        norm_eps=float(eps),
        activation=text("activation", "silu"),
        biases=frozenset(role for switch, roles in row.biases if switch is None or value(switch) for role in roles),
        tied=bool(value("tie_word_embeddings", False)),
        alibi=alibi_slopes(num_heads, float(value("alibi_bias_max", 8))) if row.alibi else None,
        attention_scale=float(value("query_pre_attn_scalar", head_dim)) ** -0.5,
        attention_softcap=_positive(value("attn_logit_softcapping")),
        final_softcap=_positive(value("final_logit_softcapping")),
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        expert_size=number("expert_size") if sparse else 0,
        normalise_experts=bool(value("norm_topk_prob", False)),
        layers=layers,
        generation=generation,
    )


def _windows(row: Architecture, value: Any, num_layers: int) -> list[int | None]:
    """The attention window of every layer: config.json's own list of layer types, or else the row's rule."""
    window = value("sliding_window")
    if window is not None and (type(window) is not int or window <= 0):
        raise ValueError(f"sliding_window is {window!r}")
    if value("use_sliding_window", True) is False:
        window = None
    kinds = value("layer_types")
    if kinds is None:
        pattern, upper = value("sliding_window_pattern", 0), value("max_window_layers", 0)
        local = {
            "none": lambda i: False,
            "all": lambda i: True,
            "alternate": lambda i: i % 2 == 0,
            "pattern": lambda i: (i + 1) % pattern != 0,
            "upper": lambda i: i >= upper,
        }[row.windows]
        return [window if local(i) else None for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise ValueError(f"layer_types lists {len(kinds)} of {num_layers} layers")
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"layers of type {unknown[0]} are not supported")
    if window is None and "sliding_attention" in kinds:
        raise KeyError("sliding_window")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _rope(raw: Mapping[str, Any], value: Any, local: bool, head_dim: int, max_positions: int) -> Rope:
    """The rotation of a layer with a window (`local`) or without: the two differ in Gemma 3 alone.

    Since transformers 5, config.json keeps all of it in rope_parameters, before that in several places.
    """
    parameters = raw.get("rope_parameters") or {}
    by_kind = parameters.get("sliding_attention" if local else "full_attention")
    local_theta = value("rope_local_base_freq")
    if by_kind is not None:
        parameters = by_kind
    elif local and local_theta is not None:
        parameters = {"rope_theta": local_theta}
    elif not parameters:
        parameters = raw.get("rope_scaling") or {}
    own_theta = local_theta if local else None
    theta = parameters.get("rope_theta") or own_theta or value("rope_theta") or value("rotary_emb_base") or 10000.0
    share = parameters.get("partial_rotary_factor") or value("partial_rotary_factor") or value("rotary_pct") or 1.0
    key = "original_max_position_embeddings"
    original = raw.get(key) or parameters.get(key) or value(key)
    return rope(
        parameters,
        theta=float(theta),
        dim=int(head_dim * float(share)),
        max_positions=max_positions,
        original=original,
    )


def _is_sparse(value: Any, i: int) -> bool:
    return i not in (value("mlp_only_layers") or ()) and (i + 1) % value("decoder_sparse_step", 1) == 0


def _positive(number: float | None) -> float | None:
    return float(number) if number else None


def _dtype(raw: Mapping[str, Any]) -> Literal["float32", "bfloat16", "float16"]:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"weights of dtype {name} are not supported")
    return name


def _architectures(raw: Mapping[str, Any]) -> list[str]:
    names = raw.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


def _name(raw: Mapping[str, Any]) -> str:
    return ", ".join(_architectures(raw)) or f"model type {raw.get('model_type')!r}"


def _quantisation(raw: Mapping[str, Any]) -> str | None:
    """The name of the method by which weights are quantised, None if they are not."""
    found = raw.get("quantization_config") or raw.get("compression_config") or raw.get("quantization")
    if not found:
        return None
    if not isinstance(found, dict):
        return str(found)
    method = found.get("quant_method") or found.get("quant_algo") or found.get("quant_type")
    if method is None:
        method = "bitsandbytes" if found.get("load_in_8bit") or found.get("load_in_4bit") else "unknown method"
    return str(method)


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, None if there is no such file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path.parent.name}/{path.name} is not a JSON object")
    return found
