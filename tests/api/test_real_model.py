"""The whole server over a checkpoint that transformers has made: the same tokens as transformers, whatever the load."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
from api_world import Server

MESSAGES = [{"role": "user", "content": "The quick brown fox"}]


def test_greedy_as_transformers(real_server: Server, checkpoint_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir)
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32)
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    theirs = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none") as client:
        ours = client.chat.completions.create(
            model="random",
            messages=MESSAGES,
            max_tokens=40,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
    assert ours.choices[0].model_dump()["token_ids"] == theirs
    assert ours.model_dump()["prompt_token_ids"] == ids[0].tolist()


def test_scores_as_transformers(real_server: Server, checkpoint_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = [0, 263, 5, 99, 301, 77, 12, 40]
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32)
    theirs = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    with real_server.client() as client:
        body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
        logprobs = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    for at in range(1, len(ids)):
        assert abs(logprobs["token_logprobs"][at] - float(theirs[at - 1, ids[at]])) < 1e-3
        assert abs(max(logprobs["top_logprobs"][at].values()) - float(theirs[at - 1].max())) < 1e-3


def test_alone_or_in_the_crowd(real_server: Server) -> None:
    """Bit for bit: token ids and log-probabilities of seeded and greedy requests, in streams and whole."""
    bodies = [
        {
            "model": "random",
            "prompt": [0, *range(20 + index, 20 + index * 3)],
            "max_tokens": 4 + index,
            "temperature": 0 if index % 3 == 0 else 1.1,
            "top_p": 0.9,
            "seed": index,
            "logprobs": 2,
            "n": 1 + index % 2,
            "extra_body": {"return_token_ids": True},
        }
        for index in range(10)
    ]

    async def ask(client: openai.AsyncOpenAI, body: dict[str, object]) -> list[object]:
        whole = await client.completions.create(**body)
        return [choice.model_dump() for choice in whole.choices]

    async def run() -> tuple[list[object], list[object]]:
        async with openai.AsyncOpenAI(base_url=f"{real_server.url}/v1", api_key="none") as client:
            crowd = await asyncio.gather(*(ask(client, body) for body in bodies))
            return [await ask(client, body) for body in bodies], list(crowd)

    alone, crowd = asyncio.run(run())
    assert alone == crowd
