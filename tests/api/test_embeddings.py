"""/v1/embeddings through the openai SDK: transformers' values, and the same bits whatever the load."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from api_world import Server

from orcaserve.serve.served_model import ServedModel

TEXTS = ["The quick brown fox", "Grüße, 世界! " * 20, "dog"]


@pytest.fixture(scope="module")
def sdk(real_server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def hidden(checkpoint_dir: Path) -> dict[str, np.ndarray]:
    """transformers' last hidden states [L, H] of each text, in float32."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    model = AutoModel.from_pretrained(checkpoint_dir, dtype=torch.float32)
    with torch.inference_mode():
        return {
            text: model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
            .last_hidden_state[0].double().numpy()
            for text in TEXTS
        }  # fmt: skip


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_values_are_those_of_transformers(sdk: openai.OpenAI, hidden: dict[str, np.ndarray], pooling: str) -> None:
    given = sdk.embeddings.create(model="random", input=TEXTS, extra_body={"pooling": pooling, "normalize": False})
    units = sdk.embeddings.create(model="random", input=TEXTS, extra_body={"pooling": pooling})
    for text, bare, unit in zip(TEXTS, given.data, units.data, strict=True):
        expected = hidden[text].mean(0) if pooling == "mean" else hidden[text][-1]
        assert np.abs(np.array(bare.embedding) - expected).max() < 1e-3 * np.abs(expected).max()
        assert np.linalg.norm(unit.embedding) == pytest.approx(1, abs=1e-6)
        assert np.array(unit.embedding) @ expected == pytest.approx(np.linalg.norm(expected), rel=1e-5)


def test_the_sdk_finds_everything_where_it_looks(sdk: openai.OpenAI) -> None:
    packed = sdk.embeddings.create(model="random", input=TEXTS)  # base64, which the SDK unpacks
    plain = sdk.embeddings.create(model="random", input=TEXTS, encoding_format="float")
    assert [one.index for one in packed.data] == [0, 1, 2]
    assert [one.embedding for one in packed.data] == [one.embedding for one in plain.data]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 10
    short = sdk.embeddings.create(model="random", input=TEXTS, dimensions=8)
    for whole, cut in zip(packed.data, short.data, strict=True):
        first = np.array(whole.embedding[:8])
        assert len(cut.embedding) == 8
        assert cut.embedding == pytest.approx(first / np.linalg.norm(first), abs=1e-6)


def test_inputs_of_every_kind(real_server: Server) -> None:
    with real_server.client() as client:

        def ask(**body: object) -> list:
            response = client.post("/v1/embeddings", json=body)
            assert response.status_code == 200, response.text
            return [one["embedding"] for one in response.json()["data"]]

        ids = client.post("/tokenize", json={"prompt": "The fox"}).json()["tokens"]
        [text] = ask(input="The fox")
        assert ask(input=ids) == ask(input=["The fox"]) == ask(input=[ids]) == [text]
        assert ask(input=["The fox", "dog", "The fox"])[::2] == [text, text]
        [packed] = ask(input="The fox", encoding_format="base64")
        assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == text
        long = [5, 6] * 2000
        assert ask(input=long, truncate_prompt_tokens=10) == ask(input=long[-10:])
        assert ask(input=long, truncate_prompt_tokens=-1) == ask(input=long[-2048:])
        assert ask(input="The fox", pooling="mean") != [text]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": 7}, "input"),
        ({}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 65}, "dimensions"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": [5] * 2049}, "input"),
        ({"input": [[5], [400]]}, "input[1]"),
        ({"input": ["x", 5]}, "input"),
        ({"input": [["x"]]}, "input[0][0]"),
        ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said_of_its_field(real_server: Server, body: dict, param: str) -> None:
    with real_server.client() as client:
        response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "'prompt" not in error["message"], "the field has another name here"


def test_alone_or_in_the_crowd(real_server: Server) -> None:
    """Bit for bit, among streams, with prompts that are read in chunks; beginnings are shared."""
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    stem = [rng.randrange(5, 400) for _ in range(700)]
    asked = [
        {
            "input": [stem[: rng.randint(1, 700)] + [rng.randrange(5, 400) for _ in range(rng.randint(0, 100))]],
            "pooling": rng.choice(["mean", "last"]),
        }
        for _ in range(16)
    ]
    others = [{"prompt": stem[: 20 * i + 1], "max_tokens": 60, "ignore_eos": True, "seed": i} for i in range(12)]

    async def ask(client: httpx.AsyncClient, path: str, body: dict) -> list:
        response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json().get("data", [])

    async def run() -> tuple[list, list]:
        async with httpx.AsyncClient(base_url=real_server.url, timeout=60) as client:
            crowd = [ask(client, "/v1/embeddings", body) for body in asked]
            load = [ask(client, "/v1/completions", body) for body in others]
            together = (await asyncio.gather(*crowd, *load))[: len(asked)]
            return [await ask(client, "/v1/embeddings", body) for body in asked], together

    alone, together = asyncio.run(run())
    assert together == alone


def test_how_to_pool_may_stand_in_the_checkpoint(checkpoint_dir: Path, tmp_path: Path) -> None:
    assert ServedModel("it", checkpoint_dir).pooling == "last"
    folder = tmp_path / "it"
    shutil.copytree(checkpoint_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "1_Pooling").mkdir()
    for given, found in (
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 64}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
    ):
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(given))
        assert ServedModel("it", folder).pooling == found
