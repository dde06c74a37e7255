"""Decoders that the table lacks run through transformers' own module, over our attention, or are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CASES, VOCAB, Bench, expected_logits, expected_tokens, make_model

from orcaserve.core.config import ModelError
from orcaserve.model.decoder import Decoder
from orcaserve.model.load import load_model
from orcaserve.model.transformers_backend import TransformersDecoder

_SIZES = {key: value for key, value in CASES["llama-2"][1].items() if key != "max_position_embeddings"}
_SIZES["max_position_embeddings"] = 256
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm": ("StableLmConfig", {**_SIZES, "use_qkv_bias": True}),
    "olmo2": ("Olmo2Config", _SIZES),
    "granite": ("GraniteConfig", {**_SIZES, "logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "cohere2": (
        "Cohere2Config",
        {**_SIZES, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "starcoder2": ("Starcoder2Config", {**_SIZES, "sliding_window": 11}),
}


@pytest.mark.parametrize("name", sorted(FOREIGN))
def test_greedy_output_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    """Three requests that join one after the other, prompts in chunks, 64 tokens each."""
    seed = random.randrange(1 << 30)
    print(f"{name}: seed {seed}")
    rng = random.Random(seed)
    model = make_model(*FOREIGN[name], seed)
    model.save_pretrained(tmp_path)
    prompts = [[rng.randrange(VOCAB) for _ in range(n)] for n in (21, 5, 40)]
    decoder = load_model(tmp_path)
    assert isinstance(decoder, TransformersDecoder) and not decoder.deterministic
    bench = Bench([decoder], num_blocks=128, seed=seed)
    tokens = {i: list(prompt) for i, prompt in enumerate(prompts)}
    logits: dict[int, list[torch.Tensor]] = {i: [] for i in tokens}
    for step in range(200):
        rows = []
        for i, known in tokens.items():
            waiting = known[bench.computed.get(i, 0) :]
            if step >= 7 * i and waiting and len(known) < len(prompts[i]) + 64:
                rows.append((i, waiting[: rng.choice([1, 3, 16])]))
        if not rows:
            break
        for (i, _), part in zip(rows, bench.step(rows), strict=True):
            logits[i].append(part)
            if bench.computed[i] == len(tokens[i]):
                tokens[i].append(int(part[-1].argmax()))
    for i, prompt in enumerate(prompts):
        assert len(tokens[i]) == len(prompt) + 64
        assert (torch.cat(logits[i]) - expected_logits(model, tokens[i][:-1])).abs().max() < 1e-4
        assert tokens[i][len(prompt) :] == expected_tokens(model, prompt, 64)


def test_backends(tmp_path: Path) -> None:
    """The table comes first; both backends agree on what both can serve."""
    make_model(*CASES["llama-2"], 1).save_pretrained(tmp_path)
    native, foreign = load_model(tmp_path), load_model(tmp_path, backend="transformers")
    assert isinstance(native, Decoder) and isinstance(foreign, TransformersDecoder)
    tokens = random.Random(1).choices(range(VOCAB), k=30)
    (ours,), (theirs,) = (Bench([decoder]).step([(0, tokens)]) for decoder in (native, foreign))
    assert (ours - theirs).abs().max() < 1e-4
    assert (native.weight_bytes, native.num_layers) == (foreign.weight_bytes, foreign.num_layers)
    for field in ("architecture", "vocab_size", "head_dim", "num_kv_heads", "max_positions", "generation"):
        assert getattr(native.config, field) == getattr(foreign.config, field)


def test_the_context_ends_where_a_module_would_change_its_mind(tmp_path: Path) -> None:
    """longrope has other factors beyond the original context, and would take them for all requests of an iteration."""
    half = CASES["llama-2"][1]["hidden_size"] // CASES["llama-2"][1]["num_attention_heads"] // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 64,
    }
    for config_class in ("Phi3Config", "LlamaConfig"):
        arguments = {**_SIZES, "rope_parameters": rope, "original_max_position_embeddings": 64, "pad_token_id": 0}
        make_model(config_class, arguments, 6).save_pretrained(tmp_path)
        assert load_model(tmp_path, backend="transformers").config.max_positions == 64


def test_bfloat16(tmp_path: Path) -> None:
    make_model(*FOREIGN["olmo2"], 2).to(torch.bfloat16).save_pretrained(tmp_path)
    decoder = load_model(tmp_path)
    assert decoder.dtype == torch.bfloat16
    (logits,) = Bench([decoder]).step([(0, [1, 2, 3])])
    assert logits.dtype == torch.float32 and logits.shape == (3, VOCAB)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(folder, backend="transformers")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("config_class", "arguments"),
    [
        ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 4}),  # recurrent
        ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}),  # ALiBi
        ("FalconConfig", {**_SIZES, "alibi": True}),
        ("Llama4TextConfig", {**_SIZES, "num_local_experts": 2, "intermediate_size_mlp": 32}),  # in chunks
        ("GptOssConfig", {**_SIZES, "num_local_experts": 4, "head_dim": 8}),  # attention sinks
    ],
)
def test_other_kinds_of_attention(tmp_path: Path, config_class: str, arguments: dict[str, Any]) -> None:
    make_model(config_class, arguments, 3).save_pretrained(tmp_path)
    assert "cannot be served" in refusal(tmp_path)


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    make_model(*FOREIGN["olmo2"], 4).save_pretrained(tmp_path, max_shard_size="20KB")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 4}))
    assert "is missing" in refusal(tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    assert "the shard" in refusal(tmp_path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    make_model(*FOREIGN["olmo2"], 5).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = {**json.loads(path.read_text()), "architectures": ["OwnForCausalLM"], "model_type": "own"}
    path.write_text(json.dumps({**raw, "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}))
    (tmp_path / "own.py").write_text("raise SystemExit('this must not run')")
    assert "OwnForCausalLM is not a model that transformers" in refusal(tmp_path)
