"""The built-in model's folder is complete and small, its tokenizer is lossless, and its answers are readable and end.

The story prompts were kept out of the training text: they combine nouns that the generator holds out. transformers
computes here, in float32, so that this says what the model is, not how well it is served.
"""

import json
import random
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import kernel_sets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from orcaserve.builtin import MODEL_DIR, NAME
from orcaserve.core.config import Quantization
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder
from orcaserve.ops.kernels import Kernels
from orcaserve.ops.layout import Layout
from orcaserve.ops.native_kernels import NativeKernels

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "builtin"))

from tinyworld.dialogue import documents, vocabulary
from tinyworld.stories import KINDS, THING_NAMES, Wish, held_out, shuffle_wish, tell
from tinyworld.words import BOYS, GIRLS, PLACES

LIMIT = 200
STORY_FORMS = (
    "Tell me a story about {} and {}.",
    "write a story about {} and {}",
    "Could you please tell me a short story with {} and {}?",
    "I would like to hear a tale about {} and {}.",
)
QUESTIONS = (
    "Hello!",
    "hi, who are you?",
    "What is a whale?",
    "what does a squirrel eat",
    "Which is bigger, a mouse or an elephant?",
    "What is the opposite of hot?",
    "Count to twelve.",
    "What is 3 + 4?",
    "Name four colors.",
    "What day comes after Friday?",
    "Why is the sky blue?",
    "Tell me a joke",
    "How do I make tea?",
    "Write a poem about an otter.",
    "Can you explain monetary policy to me?",
    "Write a Java class that sorts a list of customers.",
    "Good night!",
    "Tell me a bedtime story.",
    "I am bored.",
    "What sound does a cow make?",
)


def held_out_prompts(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Story requests whose two nouns never stood in one request of the training text, with the nouns."""
    rng = random.Random(seed)
    others = [place.name for place in PLACES] + THING_NAMES
    found: list[tuple[str, str, str]] = []
    while len(found) < count:
        kind, other = rng.choice(KINDS), rng.choice(others)
        if held_out(kind, other):
            a, b = (("an " if noun[0] in "aeiou" and noun != "unicorn" else "a ") + noun for noun in (kind, other))
            found.append((rng.choice(STORY_FORMS).format(a, b), kind, other))
    return found


STORIES = held_out_prompts(20, seed=5)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR, pad_token="<|end|>")  # noqa: S106 (no password)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **options: object
) -> list[list[int]]:
    """The token ids of the answers, each up to and with its end token, at most LIMIT of them."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    batch = tokenizer(
        texts,
        add_special_tokens=False,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=LIMIT, pad_token_id=tokenizer.eos_token_id, **options)
    answers = []
    for row in out[:, batch["input_ids"].shape[1] :].tolist():
        length = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        answers.append(row[:length])
    return answers


@pytest.fixture(scope="module")
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[list[int]]]:
    """The answers to the held-out stories and to the questions, greedy and sampled from a fixed seed."""
    prompts = [prompt for prompt, _, _ in STORIES] + list(QUESTIONS)
    greedy = ask(model, tokenizer, prompts, do_sample=False, temperature=None)
    torch.manual_seed(11)
    sampled = ask(model, tokenizer, prompts, do_sample=True, temperature=0.6, top_k=0)
    return {"greedy": greedy, "sampled": sampled}


def test_the_folder_is_complete_and_small() -> None:
    names = {path.name for path in MODEL_DIR.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in MODEL_DIR.iterdir()) <= 12_000_000
    assert NAME == "orcaserve-tiny"


def test_the_folder_says_what_it_is() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    generation = json.loads((MODEL_DIR / "generation_config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["eos_token_id"] == generation["eos_token_id"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_prompts_begin_with_the_beginning_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.encode("Once upon a time")[0] == tokenizer.bos_token_id
    assert tokenizer.encode("") == [tokenizer.bos_token_id]


def test_the_chat_template_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hello! "},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Who are you?"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|begin|><|system|>Be kind.<|end|><|user|>Hello!<|end|><|assistant|>Hi!<|end|>"
        "<|user|>Who are you?<|end|><|assistant|>"
    )


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_answers_end_by_themselves(how: str, answers: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    ended = [ids[-1] == tokenizer.eos_token_id for ids in answers[how]]
    assert sum(ended) >= 0.9 * len(ended), f"{sum(ended)} of {len(ended)} ended within {LIMIT} tokens"
    lengths = sorted(len(ids) for ids in answers[how])
    assert lengths[len(lengths) // 4] < 60 < lengths[-1], f"the lengths hardly vary: {lengths}"


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_answers_are_readable_english(how: str, answers: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    known = vocabulary(3000)
    readable = 0
    complaints = []
    for ids in answers[how]:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        unknown = [word for word in re.findall(r"[A-Za-z]+", text) if word.lower() not in known]
        cut = ids[-1] != tokenizer.eos_token_id
        sentences = re.split(r'(?<=[.!?]) |(?<=[.!?]") |\n', text)
        verse = "\n" in text
        odd = [s for s in sentences if not re.match(r'^"?[A-Z0-9]', s) and not verse and not s.split()[0].isdigit()]
        odd = [s for s in odd if not re.match(r"(said|asked|cried|called|shouted|whispered|thought|he|she|the)\b", s)]
        closed = cut or verse or bool(re.search(r'[.!?]"?$', text))
        if unknown or odd or not closed:
            complaints.append((unknown, odd, text[-60:]))
        else:
            readable += 1
    assert readable >= 0.95 * len(answers[how]), complaints


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_stories_keep_to_topics_they_were_not_trained_on(
    how: str, answers: dict, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers[how][: len(STORIES)]]
    kept = [kind in text and other in text for text, (_, kind, other) in zip(texts, STORIES, strict=True)]
    assert sum(kept) >= 0.8 * len(kept), [story for story, ok in zip(STORIES, kept, strict=True) if not ok]


@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_names_stay_with_their_bearers(how: str, answers: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """A story has a hero and a friend: who is named first is named again, and nobody but one other is ever named."""
    names = set(GIRLS + BOYS)
    steady = 0
    for ids, _ in zip(answers[how], STORIES, strict=False):
        named = [word for word in re.findall(r"[A-Z][a-z]+", tokenizer.decode(ids)) if word in names]
        steady += len(set(named)) <= 2 and named.count(named[0]) > 1 if named else False
    assert steady >= 0.9 * len(STORIES), f"{steady} of {len(STORIES)} stories keep their names"


def test_the_generator_is_a_function_of_its_seed() -> None:
    """The same seed gives the same wish and story, and no wish of the training text is held out."""
    for seed in range(50):
        stories = []
        for _ in range(2):
            rng = random.Random(seed)
            wish = shuffle_wish(rng)
            stories.append(tell(rng, wish).text)
            assert not held_out(*wish.kinds, wish.place, wish.thing)
        assert stories[0] == stories[1]


def test_a_story_keeps_to_its_wish() -> None:
    rng = random.Random(3)
    for _ in range(300):
        wish = shuffle_wish(rng)
        story = tell(rng, wish)
        for noun in (*wish.kinds, wish.place, wish.thing, wish.name, wish.trait):
            assert noun is None or noun in story.text, (noun, story.text)
        assert "{" not in story.text and "[" not in story.text and "  " not in story.text
    assert tell(random.Random(1), Wish(kinds=("fox", "owl"))).hero.kind == "fox"


@pytest.fixture(scope="module")
def held_out_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Texts from another seed than the training's."""
    return [tokenizer.encode(text, add_special_tokens=False)[:500] for text in islice(documents(31), 20)]


def logits_of(kernels: Kernels, dtype: torch.dtype, texts: list[list[int]]) -> torch.Tensor:
    decoder = Decoder.load(read_config(MODEL_DIR), MODEL_DIR, dtype, kernels=kernels)
    return torch.cat([score(decoder, ids) for ids in texts])


@kernel_sets.NEEDS_NATIVE
@pytest.mark.parametrize(
    ("quantization", "most_divergence", "least_agreement"), [("int8", 0.005, 0.97), ("int4", 0.05, 0.93)]
)
def test_quantised_weights_say_almost_the_same(
    held_out_ids: list[list[int]], quantization: Quantization, most_divergence: float, least_agreement: float
) -> None:
    """Against the same decoder in bfloat16."""
    full, few = (
        logits_of(NativeKernels(1, quantization=kind), torch.bfloat16, held_out_ids).log_softmax(-1)
        for kind in ("none", quantization)
    )
    divergence = (full.exp() * (full - few)).sum(-1).mean()
    agreed = (full.argmax(-1) == few.argmax(-1)).float().mean()
    print(f"KL divergence {divergence:.5f} nats, top-1 agreement {agreed:.4f} on {full.shape[0]} tokens")
    assert divergence < most_divergence and agreed > least_agreement


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", kernel_sets.TWIN_AND_BEST)
def test_keys_and_values_in_bytes_say_almost_the_same(
    held_out_ids: list[list[int]], name: str, dtype: torch.dtype
) -> None:
    """Against the same decoder whose keys and values have its dtype."""
    texts = held_out_ids if name != "torch" else held_out_ids[:6]
    full, few = (logits_of(kernel_sets.make(kind), dtype, texts).log_softmax(-1) for kind in (name, f"{name} kv-int8"))
    divergence = (full.exp() * (full - few)).sum(-1).mean()
    agreed = (full.argmax(-1) == few.argmax(-1)).float().mean()
    print(f"KL divergence {divergence:.6f} nats, top-1 agreement {agreed:.4f} on {full.shape[0]} tokens")
    assert divergence < 0.001 and agreed > 0.98


@pytest.mark.parametrize("name", kernel_sets.TWIN_AND_BEST)
def test_bfloat16_is_as_near_to_float32_as_its_rounding(
    model: PreTrainedModel, held_out_ids: list[list[int]], name: str
) -> None:
    """transformers in float32 is what we compare with.

    The weights are bfloat16, so that all that differs is the rounding of activations, by up to 2**-9 of a value: in a
    layer at most eight of them follow each other (two norms, the QKV product, the heads, the shares, their mixture, the
    inner product, and the residual twice, of which the shares are averaged away), and one before the output matrix.
    Independent errors add up as their squares do: of all logits together, the error is at most
    2**-9 * sqrt(8 * layers + 1) of what they vary by.
    """
    texts = held_out_ids[:6]
    found = logits_of(kernel_sets.make(name), torch.bfloat16, texts)
    with torch.inference_mode():
        wanted = torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in texts])
    varying = wanted - wanted.mean(-1, keepdim=True)
    error = float((found - wanted).norm() / varying.norm())
    bound = 2**-9 * (8 * model.config.num_hidden_layers + 1) ** 0.5
    print(f"{error:.5f} of the logits' variation, bound {bound:.5f}")
    assert error <= bound


def score(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    """float32 logits [n, V] behind each of the tokens."""
    blocks = -(-len(ids) // 16)
    cache = [
        decoder.kernels.kv_cache(blocks, 16, decoder.num_kv_heads, decoder.head_dim, decoder.dtype)
        for _ in range(decoder.num_layers)
    ]
    layout = Layout.build([(0, len(ids), list(range(blocks)))], 16)
    return decoder.logits(decoder.forward(torch.tensor(ids), layout, cache))
