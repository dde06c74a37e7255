"""Weights in 8 and 4 bits: what they stand for, products of them, the promise, and a model that is served with them."""

from __future__ import annotations

import json
import weakref
from functools import partial

import pytest
import torch
from test_device_worker import LONGEST, SHAPE, VOCAB, serve
from transformers import AutoModelForCausalLM, Qwen3Config

from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.core.request import NewRequest, SamplingParams
from orcaserve.executors import placement
from orcaserve.executors.device import start_device
from orcaserve.executors.local import LocalExecutor
from orcaserve.model.config import read_config
from orcaserve.model.decoder import Decoder
from orcaserve.ops.gpu.kernels import TritonKernels
from orcaserve.ops.gpu.matmul import MatmulScratch, gated, matmul
from orcaserve.ops.gpu.quantised import GROUP, UNIT, Coded, coded
from orcaserve.ops.gpu.tiles import Tile, coded_tiles
from orcaserve.ops.torch_kernels import TorchKernels, TorchLinear
from orcaserve.worker.worker import Worker

HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CODES = ["int8", "int4"]
# outputs, inputs: segments, and edges in every direction with rows that a descriptor can describe, and cannot
SHAPES = [(130, 1024), (96, 208), (50, 84)]


@pytest.fixture(scope="module")
def scratch(device):
    made = MatmulScratch(device)
    made.partials.fill_(torch.nan)
    return made


def noise(seed, *shape, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def stands_for(weight: Coded) -> torch.Tensor:
    """float64 [n, k], read byte by byte as `Coded` says."""
    values, scales = weight.values.cpu(), weight.scales.cpu().double()
    if not weight.packed:
        return values.double() * scales[:, None]
    out = torch.empty(weight.n, weight.k, dtype=torch.float64)
    for column in range(weight.k):
        unit, place = divmod(column, UNIT)
        byte = values[:, unit * UNIT // 2 + place % (UNIT // 2)].int() & 255
        nibble = byte & 15 if place < UNIT // 2 else byte >> 4
        out[:, column] = torch.where(nibble > 7, nibble - 16, nibble) * scales[:, column // GROUP]
    return out


def close(got, wanted, dtype):
    error = (got.cpu().double() - wanted).norm() / wanted.norm()
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}"


def tiles_of(code: str, dtype: torch.dtype) -> list[Tile]:
    if dtype == torch.float32:
        return [Tile(32, 32, 128, 4, 2), Tile(32, 16, 128, 4, 1, split=True)]
    longer = 128 if code == "int4" else 64
    return [Tile(64, 16, 128, 4, 3, split=True), Tile(64, 64, longer, 4, 3), Tile(128, 128, longer, 8, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [84, 256])
@pytest.mark.parametrize(("code", "most", "group"), [("int8", 127, None), ("int4", 7, GROUP)])
def test_a_weight_is_within_half_a_step_of_what_it_was(device, code, most, group, k, dtype):
    parts = [noise(seed, n, k, dtype=dtype, device=device) for seed, n in ((1, 10), (2, 7))]
    whole = coded(parts, code)
    assert (whole.n, whole.k, whole.dtype) == (17, k, dtype)
    was, now = torch.cat(parts).cpu().double(), stands_for(whole)
    for was_some, now_some in zip(was.split(group or k, 1), now.split(group or k, 1), strict=True):
        step = was_some.abs().amax(1, keepdim=True) / most
        assert ((was_some - now_some).abs() <= 0.5001 * step).all()
        assert ((now_some / step).abs().amax(1) > most - 0.01).all(), "the greatest stands for itself"


@pytest.mark.parametrize("code", CODES)
def test_a_weight_is_made_piece_by_piece_as_at_once(device, code, monkeypatch):
    weight = noise(1, 9, 200, dtype=torch.float32, device=device)
    whole = coded([weight], code)
    monkeypatch.setattr("orcaserve.ops.gpu.quantised._AT_ONCE", 400)
    pieces = coded([weight[:3], weight[3:]], code)
    assert torch.equal(pieces.values, whole.values) and torch.equal(pieces.scales, whole.scales)
    assert whole.nbytes == (9 * (200 + 4) if code == "int8" else 9 * (UNIT + 4 * 2 * UNIT // GROUP))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code", CODES)
def test_rows_are_those_that_it_stands_for(device, code, dtype):
    weight = coded([noise(1, 20, 200, dtype=dtype, device=device)], code)
    ids = torch.tensor([3, 19, 3, 0], device=device)
    rows = weight.rows(ids)
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.cpu(), stands_for(weight)[ids.cpu()].to(dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("code", CODES)
def test_matmul(device, scratch, code, dtype, n, k, m):
    x, weight = noise(1, m, k, dtype=dtype, device=device), noise(2, n, k, dtype=dtype, device=device)
    bias, residual = noise(3, n, dtype=dtype, device=device), noise(4, m, n, dtype=dtype, device=device)
    weight = coded([weight], code)
    # in 4 bits values are rounded to the dtype before they are multiplied
    meant = stands_for(weight) if code == "int8" else stands_for(weight).to(dtype).double()
    plain = x.cpu().double() @ meant.T
    whole = matmul(x, weight, bias, residual, scratch=scratch)
    assert whole.dtype == dtype
    close(whole, plain + bias.cpu().double() + residual.cpu().double(), dtype)
    wide = matmul(x, weight, scratch=scratch, wide=True)
    assert wide.dtype == torch.float32
    close(wide, plain, torch.float32)
    assert not scratch.counters.any()


@pytest.mark.parametrize(("n", "k"), [(130, 1024), (50, 84)])
@pytest.mark.parametrize("code", CODES)
def test_many_rows_have_the_bits_of_few(device, scratch, code, n, k):
    """Their weights are brought to the dtype of activations beforehand."""
    x = noise(1, 257, k, dtype=torch.bfloat16, device=device)
    gate, up = (coded([noise(seed, n, k, dtype=torch.bfloat16, device=device)], code) for seed in (2, 3))
    some = slice(250, 253)
    many, few = (matmul(one, gate, scratch=scratch) for one in (x, x[some].contiguous()))
    assert torch.equal(many[some], few)
    many, few = (gated(one, gate, up, None, None, "silu", scratch=scratch) for one in (x, x[some].contiguous()))
    assert torch.equal(many[some], few)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("code", CODES)
def test_gated(device, scratch, code, dtype, with_biases):
    n, k = 100, 304
    x = noise(1, 19, k, dtype=dtype, device=device)
    gate, up = (coded([noise(seed, n, k, dtype=dtype, device=device) * seed], code) for seed in (2, 3))
    biases = [noise(seed, n, dtype=dtype, device=device) if with_biases else None for seed in (4, 5)]
    got = gated(x, gate, up, *biases, "silu", scratch=scratch)
    left, right = (
        x.cpu().double() @ stands_for(weight).T + (0 if bias is None else bias.cpu().double())
        for weight, bias in zip((gate, up), biases, strict=True)
    )
    close(got, torch.nn.functional.silu(left) * right, dtype)
    assert torch.equal(gated(x[7:8], gate, up, *biases, "silu", scratch=scratch), got[7:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(70, 1024), (96, 208)])
@pytest.mark.parametrize("code", CODES)
def test_a_row_has_the_same_bits_in_every_batch_and_tile(device, scratch, code, dtype, n, k):
    cuts = ((0, 1), (699, 1), (5, 7), (100, 33), (3, 64), (600, 100), (1, 200), (100, 300))
    if device.type == "cpu":
        cuts = ((0, 1), (3, 17))  # what the interpreter does in seconds
    rows_there = max(first + m for first, m in cuts)
    x, residual = (noise(seed, rows_there, size, dtype=dtype, device=device) for seed, size in ((1, k), (4, n)))
    weight, up = (coded([noise(seed, n, k, dtype=dtype, device=device)], code) for seed in (2, 3))
    whole = matmul(x, weight, None, residual, scratch=scratch, activation="gelu_new")
    whole_gated = gated(x, weight, up, None, None, "silu", scratch=scratch)
    for first, m in cuts:
        rows = slice(first, first + m)
        for tile in [None, *(tile for tile in tiles_of(code, dtype) if m <= 256 or not tile.split)]:
            got = matmul(x[rows], weight, None, residual[rows], scratch=scratch, activation="gelu_new", tile=tile)
            assert torch.equal(got, whole[rows]), (first, m, tile)
            if tile is None or not tile.split:
                got = gated(x[rows], weight, up, None, None, "silu", scratch=scratch, tile=tile)
                assert torch.equal(got, whole_gated[rows]), (first, m, tile)


@pytest.mark.parametrize("code", CODES)
def test_rows_of_zeros_give_zeros(device, scratch, code):
    weight = noise(1, 40, 160, dtype=torch.float32, device=device)
    weight[3:30], weight[:, 64:96] = 0, 0
    made = coded([weight], code)
    x = noise(2, 5, 160, dtype=torch.float32, device=device)
    got = matmul(x, made, scratch=scratch)
    assert not got[:, 3:30].any() and got[:, :3].all() and got.isfinite().all()
    assert not made.rows(torch.arange(3, 30, device=device)).any()


def test_values_in_4_bits_are_read_in_whole_units(device, scratch):
    x = noise(1, 2, 64, dtype=HALF, device=device)
    with pytest.raises(ValueError, match="128 at a time"):
        matmul(x, coded([x], "int4"), scratch=scratch, tile=Tile(64, 16, 64, 4, 3))


def test_no_tile_splits_more_rows_than_the_scratch_has_or_uses_other_instructions():
    for packed in (False, True):
        for m in (1, 16, 17, 64, 128, 256, 257, 4096):
            for is_gated in (False, True):
                for n, k in ((1024, 2048), (4096, 4096), (12288, 4096), (151936, 4096)):
                    tile = coded_tiles(m, n, k, gated=is_gated, dtype=torch.bfloat16, packed=packed)
                    assert not tile.split or m <= 256
                    assert tile.block_n >= 64 and (tile.block_k == UNIT or not packed)


class MeantKernels(TorchKernels):
    """torch's operators over what quantised weights stand for."""

    is_quantised = True

    def __init__(self, code: str) -> None:
        super().__init__()
        self.code = code

    def linear(self, weights, biases, *, wide: bool = False, exact: bool = False, **others) -> TorchLinear:
        if not exact:
            weights = [self._meant(weight, "int8" if wide else self.code) for weight in weights]
        return super().linear(weights, biases, wide=wide, exact=exact, **others)

    def gated(self, gate, up, gate_bias, up_bias, activation):
        gate, up = (self._meant(weight, self.code) for weight in (gate, up))
        return TorchKernels().gated(gate, up, gate_bias, up_bias, activation)

    def _meant(self, weight, code):
        return stands_for(coded([weight], code)).to(weight.dtype)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("qwen3")
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE, tie_word_embeddings=request.param))
    for parameter in model.parameters():  # far from uniform, so that a slip changes tokens
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("code", CODES)
def test_a_model_answers_as_one_that_has_the_weights_meant(folder, device, code):
    kernels = TritonKernels(device, quantization=code, max_positions=LONGEST)
    load = partial(Decoder.load, read_config(folder), folder, torch.float32)
    model, plain, meant = load(kernels=kernels), load(), load(kernels=MeantKernels(code))
    assert model.weight_bytes < 0.7 * plain.weight_bytes
    options = EngineOptions(
        model=str(folder), max_batch_size=4, max_batch_tokens=64, kv_memory=1 << 22, max_model_len=LONGEST
    )
    executor, info = start_device(model, kernels, options)
    assert info.deterministic
    generator = torch.Generator().manual_seed(7)
    requests = [
        NewRequest(
            id=id,
            token_ids=tuple(torch.randint(VOCAB, (n,), generator=generator).tolist()),
            num_prompt=n,
            max_tokens=3,
            seed=id,
            choice=0,
            params=SamplingParams(temperature=0, logprobs=1),
        )
        for id, n in enumerate((1, 19))
    ]
    there = serve(executor, requests)
    here = serve(LocalExecutor(Worker(meant, num_blocks=64, block_size=64)), requests, overlap=False)
    assert there.tokens == here.tokens
    for id, answer in there.logprobs.items():
        for (token, got), (wanted_token, wanted) in zip(answer, here.logprobs[id], strict=True):
            assert token == wanted_token and got == pytest.approx(wanted, abs=1e-3)


def test_kernels_say_what_they_keep(device):
    names, weight = set(), noise(1, 64, 128, dtype=torch.float32, device=device)
    bytes_of = {"none": (32768, 32768, 32768), "int8": (8448, 8448, 32768), "int4": (5120, 8448, 32768)}
    for code, wanted in bytes_of.items():
        kernels = TritonKernels(device, quantization=code, max_positions=LONGEST)
        names.add(kernels.name)
        assert kernels.is_quantised == (code != "none")
        for how, added in zip(({}, {"wide": True}, {"exact": True}), wanted, strict=True):
            before = kernels.matrix_bytes
            kernels.linear([weight], [None], **how)
            assert kernels.matrix_bytes - before == added
        before = kernels.matrix_bytes
        kernels.gated(weight, weight, None, None, "silu")
        assert kernels.matrix_bytes - before == 2 * wanted[0]
    assert names == {"triton-1-invariant", "triton-1-invariant-int8", "triton-1-invariant-int4"}
    with pytest.raises(ValueError, match="quantised"):
        TritonKernels(device, "fast", quantization="int8", max_positions=LONGEST)


@pytest.mark.parametrize("code", CODES)
def test_whole_weights_are_let_go(device, code):
    kernels = TritonKernels(device, quantization=code, max_positions=LONGEST)
    weights = [noise(seed, 64, 128, dtype=torch.float32, device=device) for seed in range(4)]
    whole = [weakref.ref(weight) for weight in weights]
    kept = kernels.linear(weights[:2], [None, None]), kernels.gated(*weights[2:], None, None, "silu")
    del weights
    assert all(kept) and not any(one() is not None for one in whole)


def test_a_gpu_is_taken_with_quantised_weights(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}))
    monkeypatch.setattr(placement, "count_gpus", lambda: 1)
    monkeypatch.setattr(placement, "find_spec", lambda name: name)
    options = partial(EngineOptions, model=str(tmp_path))
    for code in CODES:
        for wish in ("auto", "cuda"):
            assert placement.find_device(options(quantization=code, device=wish)) == "cuda"
            with pytest.raises(ModelError, match=f"no {code} weights; leave out --numerics fast"):
                placement.find_device(options(quantization=code, device=wish, numerics="fast"))
        assert placement.find_device(options(quantization=code, device="cpu", numerics="fast")) == "cpu"
        assert placement.find_device(options(quantization=code, kv_dtype="int8")) == "cuda"
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"})
    )
    assert placement.find_device(options()) == "cuda"
    assert placement.find_device(options(quantization="int8")) == "cpu"
    with pytest.raises(ModelError, match="experts keep the model's dtype"):
        placement.find_device(options(quantization="int8", device="cuda"))
