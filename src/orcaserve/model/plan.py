"""Which tensors a stage of layers needs, of which shapes and under which names: a function of the config. No torch.

So that a checkpoint is checked whole, and its memory known, before a byte of it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from orcaserve.model.config import ModelConfig


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor: its name in the files, its shape as we use it ([out, in] for a matrix).

    transposed: the file has it as [in, out].
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)


def plan(config: ModelConfig, first: int, last: int) -> dict[str, TensorSpec]:
    """The tensors of layers [first, last), with the embedding if first is 0 and the output if last is the last layer.

    Keys are "role.weight", "role.bias", with the layer and the expert as in "3.q.weight" and "3.expert_up.7.weight".
    """
    return dict(_tensors(config, first, last))


def _tensors(config: ModelConfig, first: int, last: int) -> Iterator[tuple[str, TensorSpec]]:
    begins, ends = first == 0, last == config.num_layers
    width, hidden = config.embedding_size, config.hidden_size
    names = config.row.names
    if begins or (ends and config.tied):
        yield "embed.weight", TensorSpec(names["embed"] + ".weight", (config.vocab_size, width))
    if begins:
        if "embed_norm" in names:
            yield from _norm(config, "embed_norm", width)
        if config.row.learned_positions is not None:
            rows = config.max_positions + config.row.learned_positions
            yield "positions.weight", TensorSpec(names["positions"] + ".weight", (rows, hidden))
        if width != hidden:
            yield "project_in.weight", TensorSpec(names["project_in"] + ".weight", (hidden, width))
    for i in range(first, last):
        yield from _layer(config, i)
    if ends:
        if config.block != "post":
            yield from _norm(config, "final_norm", hidden)
        if width != hidden:
            yield "project_out.weight", TensorSpec(names["project_out"] + ".weight", (width, hidden))
        if not config.tied:
            yield "head.weight", TensorSpec(names["head"] + ".weight", (config.vocab_size, width))


def _layer(config: ModelConfig, i: int) -> Iterator[tuple[str, TensorSpec]]:
    hidden, d = config.hidden_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    for role in ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"):
        if role in config.row.names:
            yield from _norm(config, role, hidden, i)
    if config.row.qkv == "separate":
        yield from _matrix(config, "q", (q, hidden), i)
        yield from _matrix(config, "k", (kv, hidden), i)
        yield from _matrix(config, "v", (kv, hidden), i)
    else:
        yield from _matrix(config, "qkv", (q + 2 * kv, hidden), i)
    if config.row.qk_norm:
        yield from _norm(config, "q_norm", d, i)
        yield from _norm(config, "k_norm", d, i)
    yield from _matrix(config, "o", (hidden, q), i)
    if config.layers[i].sparse:
        yield from _matrix(config, "router", (config.num_experts, hidden), i)
        for e in range(config.num_experts):
            yield from _matrix(config, "expert_gate", (config.expert_size, hidden), i, e)
            yield from _matrix(config, "expert_up", (config.expert_size, hidden), i, e)
            yield from _matrix(config, "expert_down", (hidden, config.expert_size), i, e)
        return
    if config.row.mlp == "gated_fused":
        yield from _matrix(config, "gate_up", (2 * config.intermediate_size, hidden), i)
    if config.row.mlp == "gated":
        yield from _matrix(config, "gate", (config.intermediate_size, hidden), i)
    if config.row.mlp != "gated_fused":
        yield from _matrix(config, "up", (config.intermediate_size, hidden), i)
    yield from _matrix(config, "down", (hidden, config.intermediate_size), i)


def _norm(config: ModelConfig, role: str, size: int, i: int | None = None) -> Iterator[tuple[str, TensorSpec]]:
    name = config.row.names[role].format(i=i)
    key = role if i is None else f"{i}.{role}"
    yield f"{key}.weight", TensorSpec(f"{name}.weight", (size,))
    if config.row.norm == "layer" and config.row.norm_bias:
        yield f"{key}.bias", TensorSpec(f"{name}.bias", (size,))


def _matrix(
    config: ModelConfig, role: str, shape: tuple[int, int], i: int, e: int | None = None
) -> Iterator[tuple[str, TensorSpec]]:
    name = config.row.names[role].format(i=i, e=e)
    key = f"{i}.{role}" if e is None else f"{i}.{role}.{e}"
    yield f"{key}.weight", TensorSpec(f"{name}.weight", shape, config.row.transposed)
    if role in config.biases:
        yield f"{key}.bias", TensorSpec(f"{name}.bias", shape[:1])
