"""What cannot be served ends in one clear line, found before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CASES, load, make_model
from safetensors.torch import load_file, save_file

from orcaserve.core.config import ModelError
from orcaserve.model.config import read_config


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    make_model(*CASES["llama-2"], 0).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "model"))


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not among the architectures"),
        ({"architectures": ["BertForMaskedLM"]}, "not a language model that generates text"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a language model that generates text"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": None, "model_type": "nonsense"}, "'nonsense' is not among"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 10**40}, "num_attention_heads is 1"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"hidden_size": 64}, "has the shape"),
        ({"hidden_act": "xielu"}, "activation xielu"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"rope_parameters": {"rope_type": "mrope", "rope_theta": 1e4}}, '"mrope" are not supported'),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "lacks factor"),
        ({"rope_parameters": "linear"}, "config.json: "),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"layer_types": ["full_attention"]}, "lists 1 of 3 layers"),
        ({"layer_types": ["sliding_attention"] * 3}, "lacks sliding_window"),
    ],
)
def test_config(folder: Path, values: dict[str, Any], says: str) -> None:
    change(folder, **values)
    assert says in refusal(folder)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"clip_qkv": 6}, "clip_qkv = 6 is not supported"),
        ({"softmax_scale": 0.1}, "softmax_scale = 0.1 is not supported"),
        ({"alibi": False}, "alibi = false is not supported"),
        ({"attn_type": "multiquery_attention"}, 'attn_type = "multiquery_attention" is not supported'),
    ],
)
def test_other_attention_of_mpt(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    """Under the name that the checkpoints of its makers give it."""
    make_model(*CASES["mpt"], 0).save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())["attn_config"]
    change(tmp_path, architectures=["MPTForCausalLM"])
    assert read_config(tmp_path).architecture == "MptForCausalLM"
    change(tmp_path, attn_config={**own, **values})
    assert says in refusal(tmp_path)


def test_unknown_architecture_names_what_would_help(folder: Path) -> None:
    change(folder, architectures=["MambaForCausalLM"])
    message = refusal(folder)
    assert "LlamaForCausalLM" in message and "orcaserve[transformers]" in message


def test_model_type_stands_in_for_missing_architectures(folder: Path) -> None:
    change(folder, architectures=...)
    assert read_config(folder).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_broken_json(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert "config.json" in refusal(folder)


def test_missing_config_and_folder(folder: Path) -> None:
    assert "no model folder" in refusal(folder / "elsewhere")
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


def test_missing_shard(folder: Path) -> None:
    victim = sorted(folder.glob("*.safetensors"))[2]
    victim.unlink()
    assert f"the shard {victim.name} is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_torn_shard(folder: Path, keep: int) -> None:
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    message = refusal(folder)
    assert victim.name in message and "damaged or incomplete" in message


def test_missing_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert "index.json is missing" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_broken_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    assert "index.json" in refusal(folder)


def test_index_that_names_the_wrong_shard(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(f for f in files if f != index["weight_map"]["model.norm.weight"])
    path.write_text(json.dumps(index))
    assert "lacks the tensor model.norm.weight" in refusal(folder)


def test_only_pickled_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    assert "holds no weights" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    message = refusal(folder)
    assert "pytorch_model.bin" in message and "convert the checkpoint to safetensors" in message


def test_missing_tensor_and_quantised_tensor(tmp_path: Path) -> None:
    make_model(*CASES["llama-2"], 0).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, path)
    assert f"the tensor {name} is missing" in refusal(tmp_path)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path)
    assert "F8_E4M3" in refusal(tmp_path)


def test_variants_that_compute_something_else(tmp_path: Path) -> None:
    make_model(*CASES["gpt2"], 0).save_pretrained(tmp_path)
    change(tmp_path, scale_attn_by_inverse_layer_idx=True)
    assert "scale_attn_by_inverse_layer_idx = true is not supported" in refusal(tmp_path)


def test_nesting_without_end(folder: Path) -> None:
    for name in ("model.safetensors.index.json", "config.json"):
        (folder / name).write_text('{"a":' * 100_000)
        assert f"{name} cannot be read" in refusal(folder)
