"""`shape_of`: a checkpoint's sizes as the cost model wants them. `read_shape` finds them by a name."""

from __future__ import annotations

from pathlib import Path

from orcaserve.core.config import ModelError
from orcaserve.model.config import ModelConfig, read_config
from orcaserve.sim.shape import SHAPES, ModelShape

_BITS = {"none": 16, "int8": 8, "int4": 4}


def shape_of(config: ModelConfig, name: str, dtype: str = "bfloat16", quantization: str = "none") -> ModelShape:
    """Sizes of a checkpoint that is served in this dtype, its weights quantised or not."""
    wide = dtype == "float32"
    return ModelShape(
        name=name,
        layers=config.num_layers,
        hidden=config.hidden_size,
        intermediate=config.expert_size or config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        matrices=2 if config.row.mlp == "plain" else 3,
        experts=config.num_experts or 1,
        active_experts=config.experts_per_token or 1,
        weight_bits=32 if wide and quantization == "none" else _BITS[quantization],
        value_bytes=4 if wide else 2,
    )


def read_shape(name: str) -> ModelShape:
    """One of the paper's models by its name, or that of a Hugging Face folder or config.json. ModelError otherwise."""
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name).expanduser()
    folder = path.parent if path.name == "config.json" else path
    if not folder.is_dir():
        raise ModelError(f"no model is called {name!r}: give {', '.join(SHAPES)}, or a folder with a config.json")
    return shape_of(read_config(folder), folder.name)
