"""One server process for the tests that only talk to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_world import TOOLS_TEMPLATE, Server, make_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[Server]:
    with Server(model_dir) as server:
        yield server.ready()


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of random weights in float32, whose chat template knows tools."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = make_model(tmp_path_factory.mktemp("models") / "random")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def real_server(checkpoint_dir: Path) -> Iterator[Server]:
    """The real engine over it, for the tests that only talk to it."""
    with Server(checkpoint_dir, command=[sys.executable, "-m", "orcaserve.serve.engine_process"]) as server:
        yield server.ready()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client
