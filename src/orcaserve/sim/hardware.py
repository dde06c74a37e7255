"""`derive`: a cost model and a KV cache from data sheets: a device, a model's shape, and how many devices share it."""

from __future__ import annotations

import msgspec

from orcaserve.sim.cost import CostModel, StageCost
from orcaserve.sim.shape import ModelShape

MEMORY_SHARE = 0.9  # of a device, for weights and KV; the rest is for activations and the runtime


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of device, by its data sheet, and which shares of that are reached.

    flops: dense products a second by bits of a value (a multiply-add is two). bandwidth, memory: bytes a second, bytes.
    link: bytes a second that one device sends inside a tensor-parallel group; hop: seconds of one all-reduce's latency.
    stage_link, stage_hop: the same between pipeline stages.
    compute_share, bandwidth_share: what large products and streams reach. kernel: seconds of one layer's launches.
    """

    name: str
    flops: dict[int, float]
    bandwidth: float
    memory: float
    link: float
    hop: float
    stage_link: float
    stage_hop: float
    compute_share: float
    bandwidth_share: float
    kernel: float
    turn: float
    source: str


_GPU_SHARES = {"compute_share": 0.55, "bandwidth_share": 0.8, "kernel": 30e-6, "turn": 1e-3}
_SHARES = (
    "55 % of peak in large products (Narayanan et al., SC '21, report 52 % of it for whole models on A100), 80 % of "
    "the bandwidth; 30 µs of launches a layer, 1 ms of host a turn: assumptions"
)
HARDWARE = {
    one.name: one
    for one in (
        Hardware(
            name="A100-40GB",
            flops={16: 312e12, 8: 624e12},
            bandwidth=1.555e12,
            memory=40e9,
            link=300e9,
            hop=20e-6,
            stage_link=25e9,
            stage_hop=30e-6,
            source=f"NVIDIA A100 data sheet (SXM4 40GB; NVLink 3), HDR InfiniBand 200 Gbit/s; {_SHARES}",
            **_GPU_SHARES,
        ),
        Hardware(
            name="H100",
            flops={16: 989e12, 8: 1979e12},
            bandwidth=3.35e12,
            memory=80e9,
            link=450e9,
            hop=15e-6,
            stage_link=50e9,
            stage_hop=25e-6,
            source=f"NVIDIA H100 data sheet (SXM5 80GB; NVLink 4), NDR InfiniBand 400 Gbit/s; {_SHARES}",
            **_GPU_SHARES,
        ),
        Hardware(
            name="H200",
            flops={16: 989e12, 8: 1979e12},
            bandwidth=4.8e12,
            memory=141e9,
            link=450e9,
            hop=15e-6,
            stage_link=50e9,
            stage_hop=25e-6,
            source=f"NVIDIA H200 data sheet (SXM5 141GB; NVLink 4), NDR InfiniBand 400 Gbit/s; {_SHARES}",
            **_GPU_SHARES,
        ),
        Hardware(
            name="zen4-core",
            flops={16: 330e9, 8: 660e9, 32: 165e9},
            bandwidth=20e9,
            memory=8e9,
            link=1e9,
            hop=0.6e-3,
            stage_link=10e9,
            stage_hop=20e-6,
            compute_share=0.6,
            bandwidth_share=0.8,
            kernel=20e-6,
            turn=0.3e-3,
            source="one core of a Zen 4 server at 2.6 GHz: 128 bf16 operations a cycle; a core's share of the memory: "
            "assumptions, to be replaced by a fit. An exchange over loopback: 0.6 ms, as `bench parallel` measures",
        ),
    )
}


class Parallel(msgspec.Struct, frozen=True):
    """How many devices share a model: `tensor` of them every layer, `pipeline` groups of those the layers."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def devices(self) -> int:
        return self.tensor * self.pipeline

    def __str__(self) -> str:
        return f"TP {self.tensor} x PP {self.pipeline}"


def hardware(name: str) -> Hardware:
    """ValueError says which there are."""
    if name not in HARDWARE:
        raise ValueError(f"no hardware is called {name!r}; there are {', '.join(HARDWARE)}")
    return HARDWARE[name]


def derive(on: Hardware, shape: ModelShape, parallel: Parallel) -> CostModel:
    """The roofline of every stage. ValueError if the model cannot be cut so."""
    _check(shape, parallel)
    tensor = parallel.tensor
    flops = on.flops.get(8 * shape.value_bytes, on.flops[16]) * on.compute_share
    bandwidth = on.bandwidth * on.bandwidth_share
    kv_heads = max(1.0, shape.kv_heads / tensor)
    hidden_bytes = shape.hidden * shape.value_bytes
    stages = []
    for number, layers in enumerate(equal_layers(shape.layers, parallel.pipeline)):
        # A ring all-reduce sends 2 (n-1)/n of its bytes; Megatron's layers need two.
        sent = 2 * layers * 2 * (tensor - 1) / tensor * hidden_bytes / on.link
        fixed = layers * (on.kernel + (2 * on.hop if tensor > 1 else 0.0))
        if number:
            sent += hidden_bytes / on.stage_link
            fixed += on.stage_hop
        is_last = number == parallel.pipeline - 1
        stages.append(
            StageCost(
                fixed=fixed,
                weights=layers * shape.layer_weights * shape.weight_bits / 8 / tensor / bandwidth,
                per_token=2 * layers * shape.active_layer_weights / tensor / flops,
                per_token_sent=sent,
                per_context=2 * layers * kv_heads * shape.head_dim * shape.value_bytes / bandwidth,
                per_attended=4 * layers * shape.heads / tensor * shape.head_dim / flops,
                head=shape.head_weights * shape.value_bytes / tensor / bandwidth if is_last else 0.0,
                per_sample=2 * shape.head_weights / tensor / flops if is_last else 0.0,
            )
        )
    return CostModel(stages=tuple(stages), turn=on.turn, made_from=f"{shape.name} on {on.name}, {parallel}")


def equal_layers(layers: int, stages: int) -> list[int]:
    """Layers of each stage, as equal as can be; the first stages get what is left over. ValueError if one got none."""
    if stages > layers:
        raise ValueError(f"{layers} layers make no {stages} stages")
    each, over = divmod(layers, stages)
    return [each + (number < over) for number in range(stages)]


def kv_tokens(on: Hardware, shape: ModelShape, parallel: Parallel) -> int:
    """Tokens whose K and V fit beside the weights, in the stage that holds the fewest. ValueError if none do."""
    _check(shape, parallel)
    least = None
    for number, layers in enumerate(equal_layers(shape.layers, parallel.pipeline)):
        weights = layers * shape.layer_weights * shape.weight_bits / 8
        if number in (0, parallel.pipeline - 1):  # embeddings, and the output matrix
            weights += shape.head_weights * shape.value_bytes
        left = on.memory * MEMORY_SHARE - weights / parallel.tensor
        kv_heads = max(1.0, shape.kv_heads / parallel.tensor)
        tokens = int(left / (2 * layers * kv_heads * shape.head_dim * shape.value_bytes))
        least = tokens if least is None else min(least, tokens)
    if least is None or least < 1:
        raise ValueError(
            f"{shape.name} does not fit {parallel.devices} x {on.name} ({parallel}): it needs more devices"
        )
    return least


def _check(shape: ModelShape, parallel: Parallel) -> None:
    if parallel.tensor < 1 or parallel.pipeline < 1:
        raise ValueError("tensor and pipeline parallelism are whole numbers from 1")
    if shape.heads % parallel.tensor:
        raise ValueError(f"{shape.heads} attention heads cannot be shared by {parallel.tensor} devices evenly")
