"""`ModelShape`: the numbers of a decoder that decide what an iteration costs. The paper's four models are a table."""

from __future__ import annotations

import msgspec


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's sizes, in values.

    matrices: of a layer's MLP: 2 (up, down), or 3 with a gate. experts, active_experts: 1 without a mixture; then
        `intermediate` is the size of one expert. weight_bits, value_bytes: a weight; an activation, key or value.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    matrices: int = 2
    experts: int = 1
    active_experts: int = 1
    weight_bits: int = 16
    value_bytes: int = 2

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's QKV and output projections."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def expert_weights(self) -> int:
        """Weights of one layer's MLP, or of one of its experts."""
        return self.matrices * self.hidden * self.intermediate

    @property
    def layer_weights(self) -> int:
        return self.attention_weights + self.experts * self.expert_weights

    @property
    def active_layer_weights(self) -> int:
        """Weights of one layer that one token is multiplied with."""
        return self.attention_weights + self.active_experts * self.expert_weights

    @property
    def head_weights(self) -> int:
        """Weights of the output matrix."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """All weights, the output matrix once."""
        return self.layers * self.layer_weights + self.head_weights

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.value_bytes


def _gpt(name: str, layers: int, hidden: int) -> ModelShape:
    """GPT-3's form: heads of 128, an MLP of 4 x hidden, fp16, GPT-2's vocabulary."""
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=4 * hidden,
        heads=hidden // 128,
        kv_heads=hidden // 128,
        head_dim=128,
        vocab=50257,
    )


# The paper's Table 1.
SHAPES = {
    shape.name: shape
    for shape in (_gpt("13B", 40, 5120), _gpt("101B", 80, 10240), _gpt("175B", 96, 12288), _gpt("341B", 120, 15360))
}
