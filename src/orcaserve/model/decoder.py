"""`Decoder`: the one decoder of all architectures in the table, built as a stage of layers [first, last)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from orcaserve.core.config import Dtype, ModelError
from orcaserve.model.config import ModelConfig
from orcaserve.model.layers import Experts, Layer, Part
from orcaserve.model.plan import TensorSpec, plan, shared
from orcaserve.model.random_weights import RandomWeights
from orcaserve.model.rope import Rope
from orcaserve.model.weights import Progress, Weights
from orcaserve.ops.activation import ACTIVATIONS
from orcaserve.ops.kernels import AttentionHalf, Kernels, KVCache, Linear, MLPHalf, Norm
from orcaserve.ops.layout import Layout
from orcaserve.ops.linear import embedding
from orcaserve.ops.rotary import Rotary
from orcaserve.ops.torch_kernels import TorchKernels
from orcaserve.parallel.group import Alone, Group
from orcaserve.parallel.parts import Join, SharedAttention, SharedEmbedding, SharedHead, SharedMLP

Tensor = torch.Tensor


class UnknownActivation(ModelError):
    """A model computes something that we do not."""


class Source(Protocol):
    """Where weights come from, by the keys of a plan."""

    def __contains__(self, key: str) -> bool: ...

    def take(self, key: str) -> Tensor:
        """The tensor of a key, on the device of the kernels that it is for; called once for each."""
        ...

    def take_optional(self, key: str) -> Tensor | None:
        """The same, or None if the plan has no such key."""
        ...


def compute_dtype(config: ModelConfig, wish: Dtype) -> torch.dtype:
    """The dtype that weights, activations and KV cache have. "auto": float32 stays, the 16-bit ones are bfloat16."""
    if wish == "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wish]


@dataclass(frozen=True)
class Embedding:
    """int64 token ids and positions [M] -> [M, H]. rows_before: rows of the table of positions before position 0."""

    tokens: Callable[[Tensor], Tensor]
    norm: Part | None
    positions: Tensor | None
    rows_before: int
    project: Linear | None
    scale: float | None

    def __call__(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        x = self.tokens(token_ids)
        if self.norm is not None:
            x = self.norm(x)
        if self.scale is not None:
            x = x * torch.tensor(self.scale, dtype=x.dtype)  # rounded as the model was trained
        if self.project is not None:
            x = self.project(x)
        if self.positions is not None:
            x = x + embedding(positions + self.rows_before, self.positions)
        return x


@dataclass(frozen=True)
class Head:
    """[R, H] -> float32 logits [R, V]; None on a rank that is not the first of its group."""

    norm: Part | None
    project: Linear | None
    matrix: Callable[[Tensor], Tensor | None]
    softcap: float | None

    def final(self, hidden: Tensor) -> Tensor:
        """[R, H] -> [R, E]: what the output matrix reads."""
        if self.norm is not None:
            hidden = self.norm(hidden)
        return hidden if self.project is None else self.project(hidden)

    def __call__(self, hidden: Tensor) -> Tensor | None:
        logits = self.matrix(self.final(hidden))
        return logits if self.softcap is None or logits is None else self.softcap * torch.tanh(logits / self.softcap)


class Decoder:
    """Layers [first, last) of one model, with the embedding in the first stage and the output matrix in the last.

    Of a stage that several ranks share it is one rank's part. Immutable once loaded; the caches it writes to belong to
    the worker.

    config: of the whole model. dtype: of weights, activations and caches. num_layers: of this stage.
    num_kv_heads, head_dim: of this rank's caches. kernels: what it computes with.
    weight_bytes: memory that this rank's weights take. deterministic: a row's bits depend on its request alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        kernels: Kernels,
        embed: Embedding | None,
        layers: Sequence[Layer],
        head: Head | None,
        weight_bytes: int,
        num_kv_heads: int,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.num_layers = len(layers)
        self.vocab_size = config.vocab_size
        self.num_kv_heads = num_kv_heads
        self.head_dim = config.head_dim
        self.weight_bytes = weight_bytes
        self.kernels = kernels
        self.deterministic = kernels.deterministic
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
        kernels: Kernels | None = None,
        group: Group | None = None,
    ) -> Decoder:
        """The stage of layers [first, last) with the weights of a checkpoint's folder.

        kernels: what it is computed with; None: torch's operators. group: the ranks that share it; None: it is alone.
        progress: called with (bytes loaded, bytes in all). Raises ModelError if the files do not hold this model, or
        the group cannot share it.
        """
        last = config.num_layers if last is None else last
        kernels = TorchKernels() if kernels is None else kernels
        group = Alone() if group is None else group
        needed = plan(config, first, last, group.split)
        with Weights(folder, needed, dtype, progress, kernels.device) as weights:
            try:
                return cls.build(config, weights, needed, dtype, first, last, kernels, group)
            except UnknownActivation as error:
                raise ModelError(f"{Path(folder).name}: {error}") from None

    @classmethod
    def random(cls, config: ModelConfig, dtype: torch.dtype, kernels: Kernels, seed: int = 0) -> Decoder:
        """A whole model with random weights made on the kernels' device: something to measure without any file."""
        needed = plan(config, 0, config.num_layers)
        weights = RandomWeights(needed, dtype, kernels.device, seed)
        return cls.build(config, weights, needed, dtype, 0, config.num_layers, kernels, Alone())

    @classmethod
    @torch.inference_mode()
    def build(
        cls,
        config: ModelConfig,
        weights: Source,
        needed: Mapping[str, TensorSpec],
        dtype: torch.dtype,
        first: int,
        last: int,
        kernels: Kernels,
        group: Group,
    ) -> Decoder:
        """The stage of layers [first, last) from weights that it takes one by one.

        needed: the plan that they follow. Raises ModelError if the group cannot share it.
        """
        if config.activation not in ACTIVATIONS:
            raise UnknownActivation(f"the activation {config.activation} is not supported")
        own = shared(config, group.split)
        matrix_bytes = kernels.matrix_bytes
        parts = _Parts(own, dtype, kernels, weights, group)
        tokens = weights.take_optional("embed.weight")
        is_last = last == config.num_layers
        # A tied embedding has the values of the output matrix, even where that is quantised in another stage.
        matrix = parts.matrix(tokens) if is_last or (config.tied and kernels.is_quantised and first == 0) else None
        head = parts.head(matrix) if is_last and matrix is not None else None
        embed = parts.embed(tokens, matrix) if first == 0 and tokens is not None else None
        del tokens
        layers = [parts.layer(i) for i in range(first, last)]
        looked_up = ("positions.weight", *(() if config.tied and matrix is not None else ("embed.weight",)))
        others = sum(spec.num_values for key, spec in needed.items() if len(spec.shape) != 2 or key in looked_up)
        weight_bytes = kernels.matrix_bytes - matrix_bytes + others * dtype.itemsize
        return cls(config, dtype, kernels, embed, layers, head, weight_bytes, own.num_kv_heads)

    @torch.inference_mode()
    def forward(self, x: Tensor, layout: Layout, kv: Sequence[KVCache]) -> Tensor:
        """Runs one iteration of ΣL tokens and gives their hidden values [ΣL, H] behind the stage's last layer.

        x: int64 token ids [ΣL] in the first stage, else the hidden values [ΣL, H] of the stage before.
        kv: the cache of each layer of the stage.
        """
        if self._embed is not None:
            x = self._embed(x, layout.positions)
        for layer, cache in zip(self._layers, kv, strict=True):
            x = layer(x, layout, cache)
        return x

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor | None:
        """float32 logits [R, V] of the hidden values [R, H] of chosen rows. Last stage only.

        None on a rank that is not the first of its group; all of them have to ask.
        """
        if self._head is None:
            raise ValueError("only the last stage has the output matrix")
        return self._head(hidden)

    @torch.inference_mode()
    def final(self, hidden: Tensor) -> Tensor:
        """The values [R, E] that logits are made of: normed, as other libraries give a model's last hidden state.

        hidden: [R, H] of chosen rows. Last stage only.
        """
        if self._head is None:
            raise ValueError("only the last stage has the norm behind the layers")
        return self._head.final(hidden)


class _Parts:
    """Builds the parts of a stage while its weights are open, each from the tensors that it takes.

    config: of what this rank of the group computes, as `shared` gives it.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, kernels: Kernels, weights: Source, group: Group
    ) -> None:
        self._config = config
        self._dtype = dtype
        self._kernels = kernels
        self._weights = weights
        self._group = group
        self._is_shared = group.split.size > 1
        self._slopes = (
            None if config.alibi is None else torch.tensor(config.alibi, dtype=torch.float32, device=kernels.device)
        )
        self._ropes: dict[Rope, Rotary] = {}  # one table of sines for all layers that rotate alike

    def embed(self, tokens: Tensor, matrix: Linear | None) -> Embedding:
        config, weights = self._config, self._weights
        # A tied embedding reads the rows of the output matrix: there is one copy of it, in whatever layout.
        rows = matrix.rows if matrix is not None and config.tied else lambda ids: embedding(ids, tokens)
        return Embedding(
            tokens=SharedEmbedding(rows, config.vocab_size, self._group) if self._is_shared else rows,
            norm=self._norm("embed_norm"),
            positions=weights.take_optional("positions.weight"),
            rows_before=config.row.learned_positions or 0,
            project=self._linear("project_in") if "project_in.weight" in weights else None,
            scale=config.hidden_size**0.5 if config.row.scaled_embedding else None,
        )

    def matrix(self, tokens: Tensor | None) -> Linear:
        """The output matrix; tokens: that of the embedding."""
        matrix = tokens if self._config.tied and tokens is not None else self._weights.take("head.weight")
        return self._kernels.linear([matrix], [None], wide=True)

    def head(self, matrix: Linear) -> Head:
        config = self._config
        return Head(
            norm=self._norm("final_norm"),
            project=self._linear("project_out") if "project_out.weight" in self._weights else None,
            matrix=SharedHead(matrix, config.vocab_size, self._group) if self._is_shared else matrix,
            softcap=config.final_softcap,
        )

    def layer(self, i: int) -> Layer:
        config = self._config
        norm, mlp_norm = self._norm(f"{i}.attention_norm"), self._norm(f"{i}.mlp_norm")
        if norm is None or mlp_norm is None:
            raise ValueError(f"the row of {config.architecture} lacks a norm")
        post = config.block == "post"
        mlp = self._experts if config.layers[i].sparse else self._mlp
        return Layer(
            parallel=config.block == "parallel",
            attention=self._attention(i, None if post else norm),
            mlp=mlp(i, None if post else mlp_norm),
            after_attention=norm if post else None,
            after_mlp=mlp_norm if post else None,
        )

    def _attention(self, i: int, norm: Part | None) -> AttentionHalf:
        config, weights = self._config, self._weights
        rope = config.layers[i].rope
        if rope is not None and rope not in self._ropes:
            self._ropes[rope] = Rotary(torch.tensor(rope.inv_freq, dtype=torch.float32), rope.scaling, rope.dim)
        out, out_norm, join = self._second(f"{i}.o", f"{i}.attention_out_norm")
        half = self._kernels.attention_half(
            norm,
            qkv=self._qkv(i),
            heads=self._kernels.heads(
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                weights.take_optional(f"{i}.q_norm.weight"),
                weights.take_optional(f"{i}.k_norm.weight"),
                config.norm_eps,
                config.row.norm == "rms_plus_one",
                None if rope is None else self._ropes[rope],
            ),
            out=out,
            out_norm=out_norm,
            scale=config.attention_scale,
            window=config.layers[i].window,
            softcap=config.attention_softcap,
            slopes=self._slopes,
        )
        return half if join is None else SharedAttention(half, join)

    def _second(self, key: str, norm_key: str) -> tuple[Linear, Norm | None, Join | None]:
        """A half's second map, cut along K, and the norm behind it; in a group what its ranks do to put it together."""
        norm = self._norm(norm_key)
        if not self._is_shared:
            return self._linear(key, cut=True), norm, None
        weight, bias = self._take(key)
        try:
            part = self._kernels.partial(weight, self._group.split.size)
        except ValueError as error:
            raise ModelError(f"the layers cannot be shared by {self._group.split.size} ranks: {error}") from error
        bias = None if bias is None else bias.float().contiguous()
        return part, None, Join(self._kernels, self._group, self._dtype, bias, norm)

    def _qkv(self, i: int) -> Linear:
        """One map to q, k and v below each other, however the checkpoint keeps them."""
        config = self._config
        if config.row.qkv == "separate":
            both = [self._take(f"{i}.{role}") for role in "qkv"]
            return self._kernels.linear([weight for weight, _ in both], [bias for _, bias in both])
        weight, bias = self._take(f"{i}.qkv")
        if config.row.qkv == "stacked":
            return self._kernels.linear([weight], [bias])
        # q, k and v side by side for every head
        weights = [part.flatten(0, 1) for part in weight.unflatten(0, (-1, 3, config.head_dim)).unbind(1)]
        biases = (
            [None] * 3
            if bias is None
            else [part.flatten() for part in bias.unflatten(0, (-1, 3, config.head_dim)).unbind(1)]
        )
        return self._kernels.linear(weights, biases)

    def _mlp(self, i: int, norm: Part | None) -> MLPHalf:
        config = self._config
        if config.row.mlp == "plain":
            weight, bias = self._take(f"{i}.up")
            inner: Part = self._kernels.linear([weight], [bias], activation=config.activation)
        elif config.row.mlp == "gated_fused":
            weight, bias = self._take(f"{i}.gate_up")
            gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
            inner = self._kernels.gated(*weight.chunk(2), gate_bias, up_bias, config.activation)
        else:
            inner = self._gated(f"{i}.gate", f"{i}.up")
        down, out_norm, join = self._second(f"{i}.down", f"{i}.mlp_out_norm")
        half = self._kernels.mlp_half(norm, inner, down, out_norm)
        return half if join is None else SharedMLP(half, join)

    def _experts(self, i: int, norm: Part | None) -> MLPHalf:
        config = self._config
        if f"{i}.mlp_out_norm.weight" in self._weights:
            raise ValueError(f"the row of {config.architecture} has a norm behind its experts")
        router, split = self._linear(f"{i}.router", exact=True), self._group.split
        if not self._is_shared:
            roles = ("expert_gate", "expert_up", "expert_down")
            whole = self._kernels.experts(
                norm,
                router,
                (tuple(self._unbiased(f"{i}.{role}.{e}") for role in roles) for e in range(config.num_experts)),
                config.activation,
                num_experts=config.num_experts,
                per_token=config.experts_per_token,
                normalise=config.normalise_experts,
            )
            if whole is not None:
                return whole
        experts = {}
        for e in range(*split.of(config.num_experts)):
            inner = self._gated(f"{i}.expert_gate.{e}", f"{i}.expert_up.{e}")
            experts[e] = self._kernels.mlp_half(None, inner, self._linear(f"{i}.expert_down.{e}", cut=True), None)
        return Experts(
            norm=norm,
            router=router,
            experts=experts,
            owner=split.owner(config.num_experts),
            per_token=config.experts_per_token,
            normalise=config.normalise_experts,
            group=self._group,
        )

    def _gated(self, gate_key: str, up_key: str) -> Part:
        (gate, gate_bias), (up, up_bias) = self._take(gate_key), self._take(up_key)
        return self._kernels.gated(gate, up, gate_bias, up_bias, self._config.activation)

    def _norm(self, key: str) -> Norm | None:
        """The norm of a key, None if the plan has none."""
        config, weights = self._config, self._weights
        weight = weights.take_optional(f"{key}.weight")
        if weight is None:
            return None
        if config.row.norm == "layer":
            return self._kernels.layer_norm(weight, weights.take_optional(f"{key}.bias"), config.norm_eps)
        return self._kernels.rms_norm(weight, config.norm_eps, plus_one=config.row.norm == "rms_plus_one")

    def _linear(self, key: str, *, cut: bool = False, exact: bool = False) -> Linear:
        weight, bias = self._take(key)
        return self._kernels.linear([weight], [bias], cut=cut, exact=exact)

    def _unbiased(self, key: str) -> Tensor:
        weight, bias = self._take(key)
        if bias is not None:
            raise ValueError(f"the row of {self._config.architecture} has a bias at {key}")
        return weight

    def _take(self, key: str) -> tuple[Tensor, Tensor | None]:
        return self._weights.take(f"{key}.weight"), self._weights.take_optional(f"{key}.bias")
