"""How checkpoints are read: mapped, tensor by tensor, in the dtype asked for, in every dialect of config.json."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import kernel_sets
import pytest
import torch
import transformers
from checkpoints import CASES, VOCAB, Bench, expected_logits, load, make_model
from safetensors.torch import load_file, save_file

from orcaserve.model.config import read_config, read_generation
from orcaserve.model.decoder import Decoder, compute_dtype

TOKENS = random.Random(1).choices(range(VOCAB), k=40)


def rewrite(folder: Path, drop: tuple[str, ...] = (), **values: Any) -> None:
    path = folder / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps({**raw, **values}))


@pytest.mark.parametrize(
    ("case", "drop", "values"),
    [
        ("llama-2", ("rope_parameters", "head_dim"), {"rope_theta": 500.0}),
        ("llama-2", ("rope_parameters",), {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        (
            "llama-2",
            ("rope_parameters",),
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        (
            "qwen2",
            ("rope_parameters", "layer_types"),
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        ),
        ("qwen2-window", ("layer_types",), {}),
        ("gpt-neox", ("rope_parameters",), {"rotary_pct": 0.5, "rotary_emb_base": 200}),
        ("gpt-neox", ("rope_parameters", "attention_bias"), {}),
        ("gemma", ("hidden_activation",), {"hidden_act": "gelu"}),
        ("gemma-2", ("layer_types", "rope_parameters", "tie_word_embeddings"), {"rope_theta": 700.0}),
        (
            "gemma-3",
            ("layer_types", "rope_parameters", "_sliding_window_pattern"),
            {"sliding_window_pattern": 2, "rope_theta": 9000.0, "rope_local_base_freq": 50.0},
        ),
        (
            "gemma-3",
            ("layer_types", "rope_parameters", "_sliding_window_pattern"),
            {"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
        ("phi-3", ("rope_parameters",), {"rope_theta": 100.0}),
        (
            "phi-3-long",
            ("rope_parameters",),
            {
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
            },
        ),
        (
            "phi-3-long",
            ("rope_parameters",),
            {
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "yarn", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
            },
        ),
        (
            "phi-3-long",
            ("rope_parameters", "original_max_position_embeddings"),
            {
                "max_position_embeddings": 8192,
                "partial_rotary_factor": 0.5,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
            },
        ),
        (
            "gemma-3",
            (),
            {
                "rope_local_base_freq": 70.0,
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default"},
                    "full_attention": {"rope_type": "default", "rope_theta": 900.0},
                },
            },
        ),
        ("qwen3-moe", ("num_local_experts",), {"num_experts": 6}),
    ],
)
def test_older_dialects_of_config(tmp_path: Path, case: str, drop: tuple[str, ...], values: dict[str, Any]) -> None:
    make_model(*CASES[case], 3).save_pretrained(tmp_path)
    rewrite(tmp_path, drop, **values)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    (found,) = Bench(load(tmp_path)).step([(0, TOKENS)])
    assert (found - expected_logits(model, TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["gpt2", "llama-tied-biased", "opt"])
def test_names_without_the_body_prefix(tmp_path: Path, case: str) -> None:
    """As in the first GPT-2 checkpoints."""
    model = make_model(*CASES[case], 4)
    model.base_model.save_pretrained(tmp_path)
    rewrite(tmp_path, architectures=[type(model).__name__])
    (found,) = Bench(load(tmp_path)).step([(0, TOKENS)])
    assert (found - expected_logits(model, TOKENS)).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["llama-2", "gpt2", "mixtral"])
def test_shards_are_one_model(tmp_path: Path, case: str) -> None:
    model = make_model(*CASES[case], 5)
    model.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    (found,) = Bench(load(tmp_path)).step([(0, TOKENS)])
    assert (found - expected_logits(model, TOKENS)).abs().max() < 1e-4


def test_dtypes(tmp_path: Path) -> None:
    """16-bit checkpoints compute in bfloat16 unless told otherwise, and conversion is torch's own rounding."""
    model = make_model(*CASES["llama-2"], 6)
    for stored, auto in [("float32", "float32"), ("float16", "bfloat16"), ("bfloat16", "bfloat16")]:
        folder = tmp_path / stored
        model.to(getattr(torch, stored)).save_pretrained(folder)
        config = read_config(folder)
        assert config.dtype == stored
        assert compute_dtype(config, "auto") == getattr(torch, auto)
        for wish in ("float32", "bfloat16"):
            wanted = getattr(torch, wish)
            expected = make_model(*CASES["llama-2"], 0)
            expected.load_state_dict({k: v.to(wanted) for k, v in load_file(folder / "model.safetensors").items()})
            (found,) = Bench(load(folder, wish)).step([(0, TOKENS)])
            tolerance = 1e-4 if wish == "float32" else 0.15
            assert (found - expected_logits(expected, TOKENS)).abs().max() < tolerance


def test_stored_head_beside_tied_embedding_is_not_loaded(tmp_path: Path) -> None:
    model = make_model(*CASES["qwen2"], 7)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embed = tensors["model.embed_tokens.weight"]
    save_file(
        {**tensors, "lm_head.weight": embed.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": embed[0].clone()},
        path,
    )
    (decoder,) = load(tmp_path)
    assert decoder.weight_bytes == sum(t.numel() * 4 for t in tensors.values())


@pytest.mark.parametrize("case", ["llama-tied-biased", "gpt2"])
def test_an_output_matrix_of_its_own_beside_a_tied_embedding_counts(tmp_path: Path, case: str) -> None:
    """A config that is out of date: transformers goes by the file, too."""
    make_model(*CASES[case], 7).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    embed = next(value for name, value in tensors.items() if "embed_tokens" in name or "wte" in name)
    save_file({**tensors, "lm_head.weight": embed.flip(0).contiguous()}, path, metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    (found,) = Bench(load(tmp_path)).step([(0, TOKENS)])
    assert (found - expected_logits(model, TOKENS)).abs().max() < 1e-4


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    make_model(*CASES["mixtral"], 8).save_pretrained(tmp_path, max_shard_size="20KB")
    config = read_config(tmp_path)
    seen: list[tuple[int, int]] = []
    decoder = Decoder.load(config, tmp_path, torch.float32, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and len({total for _, total in seen}) == 1
    assert seen[-1] == (decoder.weight_bytes, decoder.weight_bytes)
    halves = [Decoder.load(config, tmp_path, torch.float32, *layers) for layers in ((0, 1), (1, 3))]
    assert sum(stage.weight_bytes for stage in halves) == decoder.weight_bytes


_MEASURE = """
import sys, torch
from pathlib import Path
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder
from orcaserve.ops.native_kernels import NativeKernels
from orcaserve.ops.torch_kernels import TorchKernels
def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024
torch.set_num_threads(1)
config = read_config(sys.argv[1])
before = anonymous()
kernels = NativeKernels(1) if sys.argv[2] == "native" else TorchKernels()
decoder = Decoder.load(config, sys.argv[1], torch.bfloat16, kernels=kernels)
decoder.logits(torch.ones(1, config.hidden_size, dtype=torch.bfloat16))
mapped = ".safetensors" in Path("/proc/self/maps").read_text()
print(decoder.weight_bytes, anonymous() - before, int(mapped))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("max_shard_size", ["1GB", "9MB"])
@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=kernel_sets.NEEDS_NATIVE)])
def test_weights_are_in_memory_once(tmp_path: Path, max_shard_size: str, kernels: str) -> None:
    """torch's operators read the mapped files; native kernels pack each tensor and let the files go."""
    config_class, arguments = CASES["llama-2"]
    large = {**arguments, "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    large["tie_word_embeddings"] = True
    model = make_model(config_class, large, 9).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path), kernels]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    weight_bytes, grown, mapped = map(int, ran.stdout.split())
    print(f"{weight_bytes} bytes of weights, {grown} of the process' own")
    assert weight_bytes > 15 << 20
    if kernels == "torch":
        assert grown < 8 << 20 and mapped
    else:
        assert weight_bytes <= grown < weight_bytes + (8 << 20) and not mapped


def test_config_needs_no_torch(tmp_path: Path) -> None:
    make_model(*CASES["qwen3"], 0).save_pretrained(tmp_path)
    code = (
        "import sys; from orcaserve.model.config import read_config; read_config(sys.argv[1]); "
        "sys.exit('torch' in sys.modules or 'safetensors' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_generation_wishes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}))
    assert read_generation(tmp_path).eos_token_ids == (2,)
    wishes = {"eos_token_id": [7, 5, 7, 100, 1000], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(wishes))
    found = read_generation(tmp_path)
    assert found.eos_token_ids == (7, 5)  # no token beyond the vocabulary
    assert (found.bos_token_id, found.pad_token_id) == (1, None)
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 20, 0.95)
    assert (found.min_p, found.repetition_penalty) == (None, None)


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        ("gpt2", 128),
        ("opt", 128),
        ("llama-2", 128),
        ("llama-linear", 512),  # stretched by its factor of 4
        ("llama-dynamic", 128),  # beyond, rotations would depend on the length
        ("llama-yarn", 128),
        ("phi-3-long", 128),  # the context of the short factors
    ],
)
def test_longest_context(tmp_path: Path, case: str, limit: int) -> None:
    make_model(*CASES[case], 0).config.save_pretrained(tmp_path)
    assert read_config(tmp_path).max_positions == limit


@pytest.mark.parametrize("case", ["mistral", "qwen2", "qwen3", "qwen3-moe"])
def test_a_window_that_a_config_leaves_out_is_the_familys(tmp_path: Path, case: str) -> None:
    """And null is none."""
    make_model(*CASES[case], 0).config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = {**json.loads(path.read_text()), "use_sliding_window": True, "max_window_layers": 0}
    for key in ("sliding_window", "layer_types"):
        raw.pop(key, None)
    path.write_text(json.dumps(raw))
    assert {layer.window for layer in read_config(tmp_path).layers} == {4096}
    path.write_text(json.dumps({**raw, "sliding_window": None}))
    assert {layer.window for layer in read_config(tmp_path).layers} == {None}


def test_gemma_3_leaves_out_what_its_class_says(tmp_path: Path) -> None:
    """As in the 4B checkpoint, whose config.json does not even count the heads."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    text |= {"eos_token_id": 1}  # the whole model's list goes before it
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "torch_dtype": "bfloat16", "text_config": text}))
    found, wanted = read_config(tmp_path), transformers.Gemma3TextConfig(**text)
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (8, 4, 256)
    assert (found.vocab_size, found.max_positions) == (wanted.vocab_size, wanted.max_position_embeddings)
    windows = [1024 if kind == "sliding_attention" else None for kind in wanted.layer_types]
    assert [layer.window for layer in found.layers] == windows
    assert found.dtype == "bfloat16" and found.generation.eos_token_ids == (1, 106)
