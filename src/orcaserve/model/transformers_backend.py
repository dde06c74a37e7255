"""`TransformersDecoder`: any other decoder that transformers has, over our paged attention. An optional extra.

The module is transformers' own; the iteration's tokens go through it as one flattened sequence [1, ΣL], and every
attention layer calls us back with its queries, keys and values. Outside the promise: transformers' linear maps do not
give a row the same bits in every batch. What the module computes with our attention is compared with what it computes
with its own before anything is served, so that a model with another kind of attention is refused instead of garbled.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from orcaserve.core.config import ModelError
from orcaserve.model.config import Generation, read_generation, read_raw_config
from orcaserve.model.weights import Progress, Weights
from orcaserve.ops.attention import attention, store_kv
from orcaserve.ops.layout import Layout
from orcaserve.ops.torch_kernels import TorchCache, TorchKernels

Tensor = torch.Tensor

_NAME = "orcaserve"  # ours, among transformers' attention implementations
_TRIAL = (13, 9)  # tokens of the two requests of the trial


class TransformersConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker asks of a model's config; the fields mean what they mean in `ModelConfig`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    generation: Generation


@dataclass(frozen=True)
class _Iteration:
    """What an attention layer needs to know of the iteration."""

    layout: Layout
    kv: Sequence[TorchCache]
    windows: Sequence[int | None]

    def attend(
        self, i: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        cache = self.kv[i]
        store_kv(k, v, cache.k, cache.v, self.layout.slots)
        seen = self.windows[i] if window is None else window
        return attention(q, cache.k, cache.v, self.layout, scale=scale, window=seen, softcap=cap)


@dataclass(frozen=True)
class _Survey:
    """Stands in for an iteration once, to learn which layers attend, and over keys and values of which shapes.

    windows: which of them name one themselves.
    """

    layers: list[tuple[int, int, int, int]] = field(default_factory=list)
    windows: set[int] = field(default_factory=set)

    def attend(
        self, i: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        self.layers.append((i, k.shape[1], k.shape[2], v.shape[2]))
        if window is not None:
            self.windows.add(i)
        return torch.zeros((*q.shape[:2], v.shape[2]), dtype=q.dtype)


@dataclass
class _Seat:
    """Where the attention layers of one model find the iteration under way; `TransformersDecoder` alone sets it.

    (transformers would pass keywords down to the attention function, but not all of its modules do.)
    """

    iteration: _Iteration | _Survey | None = None


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query, key, value [1, heads, ΣL, d] -> [1, ΣL, heads, d]."""
    iteration = module.orcaserve_seat.iteration
    if iteration is None:
        raise ModelError("its attention was called outside of an iteration")
    if not getattr(module, "is_causal", True):
        raise ModelError("its attention looks ahead: it is not a decoder")
    if others.get("s_aux") is not None:
        raise ModelError("its attention has sinks, which are not supported")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    mixed = iteration.attend(int(module.layer_idx), q, k, v, scale, sliding_window, softcap)
    return mixed[None], None


class _Given(torch.nn.Module):
    """In the place of a model's body: gives back the hidden values that it is given."""

    def forward(self, *ignored: Any, inputs_embeds: Tensor, **others: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)


class TransformersDecoder:
    """A whole model (there are no stages here) with `Decoder`'s interface and attributes.

    Immutable once loaded. config: `TransformersConfig`.
    """

    deterministic = False
    kernels = TorchKernels()

    def __init__(
        self, model: Any, seat: _Seat, config: TransformersConfig, dtype: torch.dtype, windows: Sequence[int | None]
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.num_layers = config.num_layers
        self.vocab_size = config.vocab_size
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._body = model.base_model
        self._seat = seat
        self._windows = tuple(windows)
        # The same module without its body: whatever the family does between hidden values and logits.
        self._head = copy.copy(model)
        self._head._modules = {**model._modules, model.base_model_prefix: _Given()}

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype | None = None, progress: Progress | None = None
    ) -> TransformersDecoder:
        """Loads a checkpoint's folder; dtype None: the checkpoint's, float16 being served as bfloat16.

        progress: called with (0, bytes) and (bytes, bytes) only. Raises ModelError, in one line, for a model that
        cannot be served.
        """
        folder = Path(folder)
        raw = read_raw_config(folder)
        name = next(iter(raw.get("architectures") or ()), None)
        known = getattr(transformers, str(name), None)
        if not isinstance(known, type) or not issubclass(known, transformers.PreTrainedModel):
            raise ModelError(f"{folder.name}: {name} is not a model that transformers {transformers.__version__} has")
        if dtype is None:
            stored = str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch.")
            dtype = torch.float32 if stored == "float32" else torch.bfloat16
        with Weights(folder, {}, dtype):
            pass  # its lines on missing, torn or foreign files are clearer than what transformers raises
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        if progress is not None:
            progress(0, size)
        try:
            decoder = cls._load(known, folder, dtype)
        except ModelError as error:
            raise ModelError(f"{folder.name}: {name} cannot be served: {error}") from error
        except KeyError as error:
            reason = "its attention cannot be replaced" if error.args == (_NAME,) else f"{error.args[0]} is missing"
            raise ModelError(f"{folder.name}: {name} cannot be served: {reason}") from error
        except Exception as error:  # a foreign module of a foreign library: anything may come
            line = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{folder.name}: {name} cannot be served by transformers: {type(error).__name__}: {line}"
            ) from error
        if progress is not None:
            progress(size, size)
        return decoder

    @classmethod
    def _load(cls, known: type[Any], folder: Path, dtype: torch.dtype) -> TransformersDecoder:
        transformers.AttentionInterface.register(_NAME, _attend)
        transformers.logging.set_verbosity_error()  # of a checkpoint that does not fit we say in a line
        transformers.logging.disable_progress_bar()
        model, report = known.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=_NAME,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise ModelError(f"the tensor {sorted(report['missing_keys'])[0]} is missing")
        model.eval()
        text = model.config.get_text_config()
        num_layers = int(text.num_hidden_layers)
        seat = _Seat()
        for module in model.modules():
            if hasattr(module, "layer_idx"):
                module.orcaserve_seat = seat
        windows = _windows(text, num_layers)
        num_kv_heads, head_dim, has_windows = _survey(model, seat, num_layers)
        config = TransformersConfig(
            architecture=known.__name__,
            vocab_size=int(text.vocab_size),
            hidden_size=int(text.hidden_size),
            intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
            num_layers=num_layers,
            num_heads=int(text.num_attention_heads),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_positions=_max_positions(text, has_windows),
            generation=read_generation(folder),
        )
        decoder = cls(model, seat, config, dtype, windows)
        decoder._try(model)
        return decoder

    @torch.inference_mode()
    def forward(self, x: Tensor, layout: Layout, kv: Sequence[TorchCache]) -> Tensor:
        """int64 token ids [ΣL] -> hidden values [ΣL, H]; kv: the cache of each layer."""
        self._seat.iteration = _Iteration(layout, kv, self._windows)
        try:
            out = self._body(input_ids=x[None], position_ids=layout.positions[None], use_cache=False)
        finally:
            self._seat.iteration = None
        return out.last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [R, V] of the hidden values [R, H] of chosen rows."""
        return self._head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    def final(self, hidden: Tensor) -> Tensor:
        """The values that logits are made of: the module's body has normed them already."""
        return hidden

    @torch.inference_mode()
    def _try(self, model: Any) -> None:
        """Compares two requests, chunked and mixed, with the module's own attention on each of them alone."""
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(self.config.vocab_size, (n,), generator=generator) for n in _TRIAL]
        block_size, blocks = 4, [[6, 1, 7, 3], [0, 5, 2]]
        kv = [
            self.kernels.kv_cache(8, block_size, self.num_kv_heads, self.head_dim, self.dtype)
            for _ in range(self.num_layers)
        ]
        found: list[list[Tensor]] = [[], []]
        for spans in [((0, 6), (0, 2)), ((6, 1), (2, 7)), ((7, 6), (9, 0))]:
            rows = [(r, start, n) for r, (start, n) in enumerate(spans) if n]
            layout = Layout.build([(start, n, blocks[r]) for r, start, n in rows], block_size)
            tokens = torch.cat([prompts[r][start : start + n] for r, start, n in rows])
            parts = self.logits(self.forward(tokens, layout, kv)).split([n for _, _, n in rows])
            for (r, _, _), part in zip(rows, parts, strict=True):
                found[r].append(part)
        model.set_attn_implementation("eager")
        wanted = [model(input_ids=prompt[None], use_cache=False).logits[0].float() for prompt in prompts]
        model.set_attn_implementation(_NAME)
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.05
        for ours, theirs in zip(found, wanted, strict=True):
            difference = (torch.cat(ours) - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
            if not difference < tolerance:
                raise ModelError(
                    f"with OrcaServe's attention its logits come out otherwise (by {float(difference):.2g} of the "
                    "largest); its kind of attention is not supported"
                )


def _survey(model: Any, seat: _Seat, num_layers: int) -> tuple[int, int, bool]:
    """Key-value heads and head size, the same in all layers, and whether some layer names a window.

    ModelError where they differ, or a layer does not attend.
    """
    survey = seat.iteration = _Survey()
    with torch.inference_mode():
        ids = torch.zeros((1, 2), dtype=torch.int64)
        model.base_model(input_ids=ids, position_ids=torch.arange(2)[None], use_cache=False)
    seat.iteration = None
    if sorted(layer[0] for layer in survey.layers) != list(range(num_layers)):
        raise ModelError("not every layer is plain attention that can be replaced")
    shapes = {layer[1:] for layer in survey.layers}
    if len(shapes) != 1:
        raise ModelError("its layers have keys of different shapes")
    ((num_kv_heads, head_dim, value_dim),) = shapes
    if head_dim != value_dim:
        raise ModelError("its keys and values have different sizes")
    return num_kv_heads, head_dim, bool(survey.windows)


def _max_positions(text: Any, has_windows: bool) -> int:
    """The context in which what we do not see of a module makes no difference.

    longrope rotates a whole iteration by other factors as soon as one of its positions is beyond the original context;
    and a window that neither layers nor `layer_types` name is in the mask alone.
    """
    most = int(text.max_position_embeddings)
    ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for rope in [ropes, *(one for one in ropes.values() if isinstance(one, dict))]:
        if (rope.get("rope_type") or rope.get("type")) in ("longrope", "su"):
            original = rope.get("original_max_position_embeddings")
            most = min(most, int(original or getattr(text, "original_max_position_embeddings", None) or most))
    window = getattr(text, "sliding_window", None)
    uses = getattr(text, "use_sliding_window", None) is not False
    if window and uses and not has_windows and not getattr(text, "layer_types", None):
        most = min(most, int(window))
    return most


def _windows(text: Any, num_layers: int) -> list[int | None]:
    """Windows that the config lists by layer: some modules apply them by their mask alone, which we do not see."""
    kinds = getattr(text, "layer_types", None) or [None] * num_layers
    unknown = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention", "None"})
    if unknown:
        raise ModelError(f"layers of type {unknown[0]} are not supported")
    window = getattr(text, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in kinds]
