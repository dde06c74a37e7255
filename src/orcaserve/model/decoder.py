"""`Decoder`: the one decoder of all architectures in the table, built as a stage of layers [first, last)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orcaserve.core.config import Dtype, ModelError
from orcaserve.model.config import ModelConfig
from orcaserve.model.layers import (
    Attention,
    Experts,
    FusedGatedMLP,
    GatedMLP,
    Layer,
    LayerNorm,
    Part,
    PerHead,
    PlainMLP,
    RMSNorm,
    Separate,
    Stacked,
)
from orcaserve.model.plan import TensorSpec, plan
from orcaserve.model.rope import Rope
from orcaserve.model.weights import Progress, Weights
from orcaserve.ops.activation import ACTIVATIONS
from orcaserve.ops.layout import Layout
from orcaserve.ops.linear import Linear, embedding
from orcaserve.ops.rotary import Rotary

Tensor = torch.Tensor
KV = tuple[Tensor, Tensor]


def compute_dtype(config: ModelConfig, wish: Dtype) -> torch.dtype:
    """The dtype that weights, activations and KV cache have. "auto": float32 stays, the 16-bit ones are bfloat16."""
    if wish == "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wish]


@dataclass(frozen=True)
class Embedding:
    """int64 token ids and positions [M] -> [M, H]. rows_before: rows of the table of positions before position 0."""

    tokens: Tensor
    positions: Tensor | None
    rows_before: int
    project: Linear | None
    scale: float | None

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x = embedding(token_ids, self.tokens)
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype)  # rounded as the model was trained
        if self.project is not None:
            x = self.project(x)
        if self.positions is not None:
            x = x + embedding(positions + self.rows_before, self.positions)
        return x


@dataclass(frozen=True)
class Head:
    """[R, H] -> float32 logits [R, V]."""

    norm: Part | None
    project: Linear | None
    matrix: Linear
    softcap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project is not None:
            hidden = self.project(hidden)
        logits = self.matrix(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Decoder:
    """Layers [first, last) of one model, with the embedding in the first stage and the output matrix in the last.

    Immutable once loaded; the caches it writes to belong to the worker.

    config: of the whole model. dtype: of weights, activations and caches. num_layers: of this stage.
    num_kv_heads, head_dim: of a cache [num_blocks, block_size, num_kv_heads, head_dim].
    weight_bytes: memory that this stage's weights take. deterministic: a row's bits depend on its request alone.
    """

    deterministic = True

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        embed: Embedding | None,
        layers: Sequence[Layer],
        head: Head | None,
        weight_bytes: int,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.num_layers = len(layers)
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.weight_bytes = weight_bytes
        self._embed = embed
        self._layers = tuple(layers)
        self._head = head

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        folder: str | Path,
        dtype: torch.dtype,
        first: int = 0,
        last: int | None = None,
        progress: Progress | None = None,
    ) -> Decoder:
        """The stage of layers [first, last) with the weights of a checkpoint's folder.

        progress: called with (bytes loaded, bytes in all). Raises ModelError if the files do not hold this model.
        """
        last = config.num_layers if last is None else last
        if config.activation not in ACTIVATIONS:
            raise ModelError(f"{Path(folder).name}: the activation {config.activation} is not supported")
        needed = plan(config, first, last)
        with torch.inference_mode(), Weights(folder, needed, dtype, progress) as weights:
            tokens = weights.take_optional("embed.weight")
            embed = _embed(config, weights, tokens) if first == 0 and tokens is not None else None
            ropes: dict[Rope, Rotary] = {}
            layers = [_layer(config, i, weights, ropes) for i in range(first, last)]
            head = _head(config, weights, tokens) if last == config.num_layers else None
        return cls(config, dtype, embed, layers, head, stage_bytes(needed, dtype))

    @torch.inference_mode()
    def forward(self, x: Tensor, layout: Layout, kv: Sequence[KV]) -> Tensor:
        """Runs one iteration of ΣL tokens and gives their hidden values [ΣL, H] behind the stage's last layer.

        x: int64 token ids [ΣL] in the first stage, else the hidden values [ΣL, H] of the stage before.
        kv: the pair of caches of each layer of the stage.
        """
        if self._embed is not None:
            x = self._embed(x, layout.positions)
        for layer, (k_cache, v_cache) in zip(self._layers, kv, strict=True):
            x = layer(x, layout, k_cache, v_cache)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [R, V] of the hidden values [R, H] of chosen rows. Last stage only."""
        if self._head is None:
            raise ValueError("only the last stage has the output matrix")
        return self._head(hidden)


def stage_bytes(needed: dict[str, TensorSpec], dtype: torch.dtype) -> int:
    """Memory of the weights of a plan in a dtype, in bytes."""
    return sum(spec.num_values for spec in needed.values()) * dtype.itemsize


def _embed(config: ModelConfig, weights: Weights, tokens: Tensor) -> Embedding:
    return Embedding(
        tokens=tokens,
        positions=weights.take_optional("positions.weight"),
        rows_before=config.row.learned_positions or 0,
        project=_linear("project_in", weights) if "project_in.weight" in weights else None,
        scale=config.hidden_size**0.5 if config.row.scaled_embedding else None,
    )


def _head(config: ModelConfig, weights: Weights, tokens: Tensor | None) -> Head:
    matrix = tokens if config.tied and tokens is not None else weights.take("head.weight")
    return Head(
        norm=_norm(config, "final_norm", weights),
        project=_linear("project_out", weights) if "project_out.weight" in weights else None,
        matrix=Linear(matrix, None),
        softcap=config.final_softcap,
    )


def _layer(config: ModelConfig, i: int, weights: Weights, ropes: dict[Rope, Rotary]) -> Layer:
    act = ACTIVATIONS[config.activation]
    attention_norm, mlp_norm = _norm(config, f"{i}.attention_norm", weights), _norm(config, f"{i}.mlp_norm", weights)
    if attention_norm is None or mlp_norm is None:
        raise ValueError(f"the row of {config.architecture} lacks a norm")
    return Layer(
        block=config.block,
        attention=_attention(config, i, weights, ropes),
        mlp=_experts(config, i, weights, act) if config.layers[i].sparse else _mlp(config, i, weights, act),
        attention_norm=attention_norm,
        mlp_norm=mlp_norm,
        attention_out_norm=_norm(config, f"{i}.attention_out_norm", weights),
        mlp_out_norm=_norm(config, f"{i}.mlp_out_norm", weights),
    )


def _attention(config: ModelConfig, i: int, weights: Weights, ropes: dict[Rope, Rotary]) -> Attention:
    project: Separate | Stacked | PerHead
    if config.row.qkv == "separate":
        q, k, v = (_linear(f"{i}.{role}", weights) for role in "qkv")
        project = Separate(q, k, v, config.head_dim)
    elif config.row.qkv == "stacked":
        project = Stacked(_linear(f"{i}.qkv", weights), config.num_heads, config.num_kv_heads, config.head_dim)
    else:
        project = PerHead(_linear(f"{i}.qkv", weights), config.head_dim)
    rope = config.layers[i].rope
    if rope is not None and rope not in ropes:  # one table of sines for all layers that rotate alike
        ropes[rope] = Rotary(torch.tensor(rope.inv_freq, dtype=torch.float32), rope.scaling, rope.dim)
    return Attention(
        project=project,
        q_norm=_norm(config, f"{i}.q_norm", weights),
        k_norm=_norm(config, f"{i}.k_norm", weights),
        rotary=None if rope is None else ropes[rope],
        out=_linear(f"{i}.o", weights),
        scale=config.attention_scale,
        window=config.layers[i].window,
        softcap=config.attention_softcap,
    )


def _mlp(config: ModelConfig, i: int, weights: Weights, act: Part) -> Part:
    if config.row.mlp == "gated_fused":
        return FusedGatedMLP(_linear(f"{i}.gate_up", weights), _linear(f"{i}.down", weights), act)
    if config.row.mlp == "gated":
        return GatedMLP(_linear(f"{i}.gate", weights), _linear(f"{i}.up", weights), _linear(f"{i}.down", weights), act)
    return PlainMLP(_linear(f"{i}.up", weights), _linear(f"{i}.down", weights), act)


def _experts(config: ModelConfig, i: int, weights: Weights, act: Part) -> Experts:
    experts = []
    for e in range(config.num_experts):
        gate, up, down = (_linear(f"{i}.expert_{part}.{e}", weights) for part in ("gate", "up", "down"))
        experts.append(GatedMLP(gate, up, down, act))
    return Experts(_linear(f"{i}.router", weights), tuple(experts), config.experts_per_token, config.normalise_experts)


def _norm(config: ModelConfig, key: str, weights: Weights) -> RMSNorm | LayerNorm | None:
    """The norm of a key, None if the plan has none."""
    weight = weights.take_optional(f"{key}.weight")
    if weight is None:
        return None
    if config.row.norm == "layer":
        return LayerNorm(weight, weights.take(f"{key}.bias"), config.norm_eps)
    return RMSNorm(weight, config.norm_eps, plus_one=config.row.norm == "rms_plus_one")


def _linear(key: str, weights: Weights) -> Linear:
    return Linear(weights.take(f"{key}.weight"), weights.take_optional(f"{key}.bias"))
