"""Makes OrcaServe's built-in model from nothing: generates its text, trains its tokenizer and its weights, saves both.

    python tools/builtin/train.py --out src/orcaserve/builtin/model

Everything is decided by the seeds and numbers below, so the same machine and torch version give the same files.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tinyworld.dialogue import ASSISTANT, BEGIN, END, SPECIAL_TOKENS, SYSTEM, USER, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

TOKENIZER_SEED, VALID_SEED = 21, 22
IGNORED = -100
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'system' if message['role'] == 'developer' else message['role'] %}"
    "{{ '<|' + role + '|>' + message['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The sizes of the model."""

    vocab: int = 3072
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 640
    context: int = 1024
    rope_theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Plan:
    """The course of the training: full rate after the warm-up, then down to nothing over the last steps."""

    steps: int = 3300
    decay: int = 2000
    warmup: int = 50
    # (step from which it holds, tokens in a row, tokens in a step): quick short rows first, at last the whole context
    stages: tuple[tuple[int, int, int], ...] = ((0, 256, 2048), (300, 512, 2048), (900, 512, 4096), (3000, 1024, 4096))
    primer: int = 3500  # documents at the beginning that are mostly echoes
    matrix_rate: float = 0.01
    embedding_rate: float = 0.01
    other_rate: float = 0.003
    seed: int = 7
    text_seed: int = 20

    def rate(self, step: int) -> float:
        """The share of the full rate at a step."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / self.decay)

    def size(self, step: int) -> tuple[int, int]:
        """Tokens in a row and tokens in a step."""
        return next((row, step_size) for start, row, step_size in reversed(self.stages) if step >= start)


# --- tokenizer ---


def train_tokenizer(vocab: int, texts: Iterator[str]) -> Tokenizer:
    """A byte-level BPE tokenizer: any text survives a round trip, and each digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


# --- data ---


def rows(
    tokenizer: Tokenizer, texts: Iterator[str], sizes: Iterable[tuple[int, int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (inputs, targets) for each (length, size): int64 [size / length, length], documents packed end to end.

    What a user or a system message says is context only: its targets are ignored.
    """
    user, system, end = (tokenizer.token_to_id(token) for token in (USER, SYSTEM, END))
    ids: list[int] = []
    targets: list[int] = []
    for length, size in sizes:
        while len(ids) <= size:
            for encoded in tokenizer.encode_batch(list(islice(texts, 64)), add_special_tokens=False):
                spoken_to = False
                for token in encoded.ids:
                    ids.append(token)
                    targets.append(IGNORED if spoken_to else token)
                    spoken_to = token in (user, system) or (spoken_to and token != end)
        yield (
            torch.tensor(ids[:size]).view(-1, length),
            torch.tensor(targets[1 : size + 1]).view(-1, length),
        )
        del ids[:size], targets[:size]


# --- model: the Llama architecture, as the checkpoint's readers compute it ---


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves rotated against each other; x is [rows, heads, length, head dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [rows, heads, length, head dim]; written out, the way back takes half the time."""
    length = q.shape[2]
    later = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)) + later
    return torch.matmul(scores.softmax(-1, dtype=q.dtype), v)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head_dim
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(shape.hidden, shape.hidden, bias=False),
                "k_proj": nn.Linear(shape.hidden, kv, bias=False),
                "v_proj": nn.Linear(shape.hidden, kv, bias=False),
                "o_proj": nn.Linear(shape.hidden, shape.hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(shape.hidden, shape.mlp, bias=False),
                "up_proj": nn.Linear(shape.hidden, shape.mlp, bias=False),
                "down_proj": nn.Linear(shape.mlp, shape.hidden, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        dim = self.shape.head_dim
        normed = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[name](normed).view(batch, length, -1, dim).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = attend(q, k, v)
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).reshape(batch, length, -1))
        normed = self.post_attention_layernorm(x)
        gated = F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed)
        return x + self.mlp["down_proj"](gated)


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)
        self.turn = nn.Parameter(torch.empty(shape.hidden, shape.hidden))
        inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.context), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
        # As large as what the layers will add to it: the model copies names out of its context, and a small embedding
        # would be drowned.
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        nn.init.orthogonal_(self.turn)

    def output_matrix(self) -> Tensor:
        """[vocab, hidden]: the embeddings, all turned alike.

        So what a layer learns about copying one word holds for every word, and yet no word predicts itself, as it would
        if embedding and output matrix were the same.
        """
        return self.embed_tokens.weight @ self.turn * self.turn.shape[0] ** -0.5

    def forward(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """Logits [n, vocab] at the n wanted places (a mask) of token ids [rows, length]."""
        length = ids.shape[1]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return F.linear(self.norm(x[wanted]), self.output_matrix())


def loss_of(model: Model, ids: Tensor, targets: Tensor) -> Tensor:
    wanted = targets != IGNORED
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, wanted)
    return F.cross_entropy(logits.float(), targets[wanted])


# --- optimizer ---


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, a, b], a <= b, with their singular values pushed close to one: a quintic Newton-Schulz iteration."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.float()


class MatrixOptimizer:
    """Momentum whose steps are orthogonalised (Muon): for the matrices inside the layers. Owns their momenta.

    Matrices of one shape, lying or standing, are worked on together.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        alike: dict[tuple[int, int], list[Tensor]] = {}
        for weight in weights:
            alike.setdefault((min(weight.shape), max(weight.shape)), []).append(weight)
        self.groups = [(members, torch.zeros(len(members), *shape)) for shape, members in alike.items()]

    @torch.no_grad()
    def step(self, rate: float, momentum: float = 0.95, decay: float = 0.1) -> None:
        for weights, mean in self.groups:
            standing = [weight.shape[0] > weight.shape[1] for weight in weights]
            gradients = torch.stack(
                [weight.grad.T if stands else weight.grad for weight, stands in zip(weights, standing, strict=True)]
            )
            mean.lerp_(gradients, 1 - momentum)
            updates = orthogonal(gradients.lerp_(mean, momentum))
            for weight, stands, update in zip(weights, standing, updates, strict=True):
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - rate * decay).add_(update.T if stands else update, alpha=-rate * scale)
                weight.grad = None


# --- saving ---


def save(folder: Path, model: Model, tokenizer: Tokenizer, shape: Shape) -> None:
    """Writes a folder in Hugging Face's layout, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": weight.detach().bfloat16() for name, weight in model.named_parameters() if name != "turn"
    }
    tensors["lm_head.weight"] = model.output_matrix().detach().bfloat16()
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": begin,
        "eos_token_id": end,
        "torch_dtype": "bfloat16",
    }
    generation = {"bos_token_id": begin, "eos_token_id": end, "do_sample": True, "temperature": 0.6}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": shape.context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, data in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(data, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


# --- training ---


def cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


@torch.no_grad()
def validate(model: Model, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over batches, with the weights as they are saved, in bfloat16."""
    kept = {name: weight.clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())
    mean = sum(loss_of(model, *batch).item() for batch in batches) / len(batches)
    for name, weight in model.named_parameters():
        weight.copy_(kept[name])
    return mean


def train(out: Path, shape: Shape, plan: Plan, save_every: int) -> None:
    tokenizer = train_tokenizer(shape.vocab, islice(documents(TOKENIZER_SEED), 20000))
    if tokenizer.get_vocab_size() != shape.vocab:
        raise SystemExit(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, but the model expects {shape.vocab}")
    random.seed(plan.seed)
    torch.manual_seed(plan.seed)
    model = Model(shape)
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    matrix_optimizer = MatrixOptimizer(matrices)
    rates = [plan.embedding_rate if weight is model.embed_tokens.weight else plan.other_rate for weight in others]
    groups = [{"params": [weight]} for weight in others]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, tokenizer ready after {cpu_seconds():.0f} s of CPU time", flush=True)
    print(json.dumps(asdict(shape) | asdict(plan)), flush=True)

    valid = list(rows(tokenizer, documents(VALID_SEED), [(512, 4096)] * 8))
    sizes = [plan.size(step) for step in range(plan.steps)]
    batches = rows(tokenizer, documents(plan.text_seed, plan.primer), sizes)
    began, smooth, seen, total = time.monotonic(), None, 0, sum(size for _, size in sizes)
    for step, (ids, targets) in enumerate(batches):
        rate = plan.rate(step)
        loss = loss_of(model, ids, targets)
        loss.backward()
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        matrix_optimizer.step(plan.matrix_rate * rate)
        seen += ids.numel()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % 25 == 0:
            left = (time.monotonic() - began) / seen * (total - seen)
            print(
                f"step {step + 1}/{plan.steps}  loss {smooth:.4f}  {seen / 1e6:.2f} M tokens  "
                f"CPU {cpu_seconds():.0f} s  ETA {left / 60:.1f} min",
                flush=True,
            )
        if (step + 1) % save_every == 0 or step + 1 == plan.steps:
            save(out, model, tokenizer, shape)
            print(f"saved after step {step + 1}: validation loss {validate(model, valid):.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.out, Shape(), Plan(), args.save_every)


if __name__ == "__main__":
    main()
