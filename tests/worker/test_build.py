"""From options to an executor that runs, through the real loader and a checkpoint that transformers saved."""

import json
import shutil

import kernel_sets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orcaserve.core.batch import Batch, ScheduledRequest
from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.executors import placement
from orcaserve.executors.build import build
from orcaserve.executors.checks import check_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def one_thread_afterwards():
    yield
    torch.set_num_threads(1)


def test_the_model_runs_and_says_what_it_is(folder):
    told = []
    options = EngineOptions(model=str(folder), threads=1, max_batch_size=3)
    executor, info = build(options, lambda *what: told.append(what))
    assert info.architecture == "LlamaForCausalLM"
    assert (info.vocab_size, info.max_model_len, info.dtype, info.threads) == (100, 128, "float32", 1)
    assert info.num_blocks == 3 * (128 // 16 + 1), "no more than the batch can use"
    assert info.deterministic
    assert {what for what, _, _ in told} == {"weights"} and told[-1][1] == told[-1][2] > 0
    assert {line.name for line in info.budget} >= {"weights", "KV cache", "activations", "head-room"}
    new = NewRequest(id=1, token_ids=(1, 5, 9), num_prompt=3, max_tokens=1, params=SamplingParams(temperature=0.0))
    batch = Batch(1, (ScheduledRequest(1, 0, 3, (0,), (), True),), (new,))
    [got] = executor.submit(batch).result().rows
    with torch.inference_mode():
        wanted = LlamaForCausalLM.from_pretrained(folder)(torch.tensor([[1, 5, 9]])).logits[0, -1].argmax()
    assert got.token_id == int(wanted)


def test_a_module_of_transformers_computes_on_all_threads(folder):
    build(EngineOptions(model=str(folder), threads=2, backend="transformers"))
    assert torch.get_num_threads() == 2


def test_weights_that_are_kept_shorter_need_less_room(folder, tmp_path):
    """And files that hold no weights of the checkpoint none."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    size = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(9 * size))
    for options, share in [({}, 1), ({"dtype": "bfloat16"}, 12 / 32), ({"quantization": "int8"}, 8 / 32)]:
        wish = EngineOptions(model=str(tmp_path), **options)
        check_files(wish, int(share * size) + 1)
        with pytest.raises(ModelError, match="not enough memory"):
            check_files(wish, int(share * size) - 1)


def test_where_there_is_a_gpu_a_model_that_it_cannot_compute_runs_on_the_cpu(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Olmo2ForCausalLM"]}))
    monkeypatch.setattr(placement, "count_gpus", lambda: 1)
    monkeypatch.setattr(placement, "find_spec", lambda name: name)
    assert placement.find_device(EngineOptions(model=str(tmp_path))) == "cpu"
    with pytest.raises(ModelError, match="by our own decoder"):
        placement.find_device(EngineOptions(model=str(tmp_path), device="cuda"))


def test_a_gpu_takes_keys_and_values_in_bytes(folder, monkeypatch):
    monkeypatch.setattr(placement, "count_gpus", lambda: 1)
    monkeypatch.setattr(placement, "find_spec", lambda name: name)
    for wish in ("auto", "cuda"):
        assert placement.find_device(EngineOptions(model=str(folder), device=wish, kv_dtype="int8")) == "cuda"


def test_the_profile_tells_dtypes_apart(folder):
    profiles = [build(EngineOptions(model=str(folder), dtype=dtype, threads=1))[1].profile
                for dtype in ("float32", "float32", "bfloat16")]  # fmt: skip
    assert profiles[0] == profiles[1] != profiles[2]


@pytest.mark.parametrize("kernels", ["torch", pytest.param("auto", marks=kernel_sets.NEEDS_NATIVE)])
def test_torchs_threads_are_part_of_the_profile_and_ours_are_not(folder, kernels):
    """Torch divides the sums of some shapes over them: seven rows in float32 have other bits with two threads."""
    options = [EngineOptions(model=str(folder), kernels=kernels, threads=threads) for threads in (1, 2, 1)]
    one, two, again = (build(each)[1].profile for each in options)
    assert one == again
    assert (one != two) == (kernels == "torch")


def test_keys_and_values_in_bytes_hold_more_and_have_a_profile_of_their_own(folder):
    plain, few = (
        build(EngineOptions(model=str(folder), threads=1, kv_memory=1 << 20, dtype="bfloat16", kv_dtype=kv_dtype))[1]
        for kv_dtype in ("auto", "int8")
    )
    # heads of 8 dimensions take 12 bytes with their scale, not 16; native values are padded to 16 dimensions
    assert few.num_blocks >= 1.3 * plain.num_blocks
    assert few.profile != plain.profile and few.deterministic
    assert next(line for line in few.budget if line.name == "KV cache").num_bytes <= 1 << 20


def test_a_swap_space_is_measured_and_told(folder, tmp_path):
    assert build(EngineOptions(model=str(folder), threads=1))[1].swap is None
    for where in (None, str(tmp_path)):
        options = EngineOptions(model=str(folder), threads=1, swap_space=1 << 20, swap_dir=where)
        executor, info = build(options)
        assert info.swap.copy_seconds > 0 and info.swap.token_seconds > 0
        line = next(line for line in info.budget if line.name == "swap space")
        assert 0.9 * (1 << 20) < line.num_bytes <= 1 << 20 and str(info.swap.num_slots) in line.note
        assert (where is not None) == (str(where) in line.note)
        row = ScheduledRequest(0, 0, 1, (0,))
        assert executor.submit(Batch(1, (row,))).result().rows[0].error, "what was measured is forgotten"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_memory": 1 << 60}, "not enough memory"),
        ({"kv_memory": 10}, "holds no block"),
        ({"swap_space": 10}, "swap space of 0.0 MiB holds no block"),
        ({"swap_space": 1 << 20, "swap_dir": "/nowhere"}, "cannot be made in /nowhere: No such file"),
        ({"max_model_len": 4096}, "128"),
        ({"policy": "none"}, "no policy 'none'"),
        ({"kernels": "torch", "quantization": "int8"}, "need the native kernels"),
        ({"backend": "transformers", "kv_dtype": "int8"}, "not in int8; leave out --kv-cache-dtype"),
        ({"backend": "transformers", "quantization": "int8"}, "weights as they are; leave out --quantization"),
        ({"kernels": "sse9"}, "no kernels for sse9; there are .*torch"),
    ],
)
def test_what_cannot_be_served_ends_in_one_line(folder, options, words):
    with pytest.raises(ModelError, match=words) as refusal:
        build(EngineOptions(model=str(folder), threads=1, **options))
    assert "\n" not in str(refusal.value)
