"""Which tensors a rank needs, of which shapes and under which names: a function of the config. No torch.

So that a checkpoint is checked whole, and its memory known, before a byte of it is loaded; and that a rank reads no
more of it than its own layers, and of these its own part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from orcaserve.core.config import ModelError
from orcaserve.model.config import ModelConfig
from orcaserve.parallel.split import SIZES, Span, Split


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor: its name in the files, its shape there as we use it ([out, in] for a matrix).

    transposed: the file has it as [in, out]. spans: what is taken of it along `axis`, one behind the other; (): all.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool = False
    axis: int = 0
    spans: tuple[Span, ...] = ()

    @property
    def num_values(self) -> int:
        """That are taken."""
        whole = math.prod(self.shape)
        taken = sum(last - first for first, last in self.spans) if self.spans else self.shape[self.axis]
        return whole // self.shape[self.axis] * taken


ALONE = Split()


def shared(config: ModelConfig, split: Split) -> ModelConfig:
    """The config of what one rank of a tensor-parallel group computes of each layer: its heads and its inner values.

    Raises ModelError if the layers cannot be cut so.
    """
    if split.size == 1:
        return config
    if split.size not in SIZES:
        raise ModelError(f"layers are shared by {', '.join(map(str, SIZES))} ranks, not by {split.size}")
    heads, kv_heads = config.num_heads, config.num_kv_heads
    for what, n in (("heads", heads), ("inner values of the MLP", config.intermediate_size)):
        if n % split.size:
            raise ModelError(
                f"{n} {what} cannot be shared by {split.size} ranks: choose a tensor-parallel size that divides them"
            )
    if kv_heads % split.size and split.size % kv_heads:
        raise ModelError(
            f"{kv_heads} key-value heads cannot be shared by {split.size} ranks: choose a tensor-parallel size that "
            "divides them, or is a multiple of them"
        )
    if config.row.qkv == "per_head" and heads != kv_heads:
        raise ModelError(f"{config.architecture} with grouped heads cannot be shared by ranks")
    if split.width(config.vocab_size) * (split.size - 1) >= config.vocab_size:
        raise ModelError(f"a vocabulary of {config.vocab_size} cannot be shared by {split.size} ranks")
    own = split.of(heads)
    first, last = split.kv_heads(kv_heads)
    return msgspec.structs.replace(
        config,
        num_heads=own[1] - own[0],
        num_kv_heads=last - first,
        intermediate_size=config.intermediate_size // split.size,
        alibi=None if config.alibi is None else config.alibi[slice(*own)],
    )


def plan(config: ModelConfig, first: int, last: int, split: Split = ALONE) -> dict[str, TensorSpec]:
    """The tensors of layers [first, last), with the embedding if first is 0 and the output if last is the last layer.

    Keys are "role.weight", "role.bias", with the layer and the expert as in "3.q.weight" and "3.expert_up.7.weight".
    config: of the whole model. split: whose part of the layers it is.
    """
    whole = dict(_tensors(config, first, last, range(*split.of(config.num_experts))))
    return whole if split.size == 1 else {key: _part(config, split, key, spec) for key, spec in whole.items()}


def _part(config: ModelConfig, split: Split, key: str, spec: TensorSpec) -> TensorSpec:
    """What one rank takes of a tensor: some outputs of a map, some inputs of one that is cut along K, or all."""
    role, kind = key.split(".")[-2:]
    d = config.head_dim
    q = _times(split.of(config.num_heads), d)
    kv = _times(split.kv_heads(config.num_kv_heads), d)
    inner = split.of(config.intermediate_size)
    axis, spans = 0, tuple[Span, ...]()
    match role:
        case "embed" | "head":
            spans = (split.padded(config.vocab_size),)
        case "q":
            spans = (q,)
        case "k" | "v":
            spans = (kv,)
        case "qkv" if config.row.qkv == "stacked":
            behind = config.num_heads * d
            spans = (q, _moved(kv, behind), _moved(kv, behind + config.num_kv_heads * d))
        case "qkv":  # q, k and v side by side for every head
            spans = (_times(q, 3),)
        case "gate" | "up":
            spans = (inner,)
        case "gate_up":
            spans = (inner, _moved(inner, config.intermediate_size))
        case "o" if kind == "weight":
            axis, spans = 1, (q,)
        case "down" if kind == "weight":
            axis, spans = 1, (inner,)
    return msgspec.structs.replace(spec, axis=axis, spans=spans)


def _times(span: Span, n: int) -> Span:
    return span[0] * n, span[1] * n


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _tensors(config: ModelConfig, first: int, last: int, experts: range) -> Iterator[tuple[str, TensorSpec]]:
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
        yield from _layer(config, i, experts)
    if ends:
        if config.block != "post":
            yield from _norm(config, "final_norm", hidden)
        if width != hidden:
            yield "project_out.weight", TensorSpec(names["project_out"] + ".weight", (width, hidden))
        if not config.tied:
            yield "head.weight", TensorSpec(names["head"] + ".weight", (config.vocab_size, width))


def _layer(config: ModelConfig, i: int, experts: range) -> Iterator[tuple[str, TensorSpec]]:
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
        for e in experts:
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
