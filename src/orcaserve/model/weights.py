"""`Weights`: the tensors of a plan out of a folder's safetensors files, mapped, one at a time, checked beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from orcaserve.core.config import ModelError
from orcaserve.model.files import INDEX, SINGLE
from orcaserve.model.plan import TensorSpec

_PLAIN = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_PAGE = 4096
_CPU = torch.device("cpu")

Progress = Callable[[int, int], None]


class Weights:
    """Hands out each tensor of a plan once, or what the plan takes of it. Owns the open files; a context manager.

    Opening finds whatever is wrong with the files: ModelError for a missing or torn shard, a missing tensor, a shape
    or a dtype that does not fit. A tensor that has the wanted dtype in the file stays a mapping of the file (its pages
    are the kernel's cache, shared by all processes and no second copy); any other is converted as it is taken.

    folder: of the checkpoint. plan: key -> tensor. dtype, device: of all tensors given.
    progress: called with (bytes taken, bytes in all), as the files count them, after each tensor.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Mapping[str, TensorSpec],
        dtype: torch.dtype,
        progress: Progress | None = None,
        device: torch.device = _CPU,
    ) -> None:
        self._folder = Path(folder)
        self._plan = plan
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._files: dict[str, Any] = {}
        self._found: dict[str, tuple[Any, str]] = {}
        self._done = 0
        self._total = 0
        tensors = self._open()
        for key, spec in plan.items():
            self._found[key] = self._check(spec, tensors)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.clear()
        self._found.clear()

    def __contains__(self, key: str) -> bool:
        return key in self._plan

    def take(self, key: str) -> torch.Tensor:
        """The tensor of a key of the plan, in the plan's shape, or the spans of it that the plan takes."""
        spec = self._plan[key]
        file, name = self._found[key]
        stored = _read(file, name, spec)
        size = stored.numel() * stored.element_size()
        if self._device.type != "cpu":
            stored = stored.to(self._device).to(self._dtype)
        elif stored.dtype == self._dtype:
            # One read per page brings the file in now, while a progress bar is looking, not under the first request.
            stored.view(-1).view(torch.uint8)[::_PAGE].sum()
        else:
            stored = stored.to(self._dtype)
        self._done += size
        if self._progress is not None:
            self._progress(self._done, self._total)
        return stored.t() if spec.transposed else stored

    def take_optional(self, key: str) -> torch.Tensor | None:
        """The same, or None if the plan has no such key."""
        return self.take(key) if key in self._plan else None

    def _open(self) -> dict[str, str]:
        """Opens all files; gives name of tensor -> name of file."""
        index = self._folder / INDEX
        if index.exists():
            listed = self._read_index(index)
        elif (self._folder / SINGLE).exists():
            listed = None
        else:
            raise ModelError(self._no_files())
        for file in sorted(set(listed.values())) if listed is not None else [SINGLE]:
            path = self._folder / file
            if not path.is_file():
                raise ModelError(f"{self._folder.name}: the shard {file} is missing")
            try:
                path.open("rb").close()  # what the library says of a file that may not be read is that there is none
            except OSError as error:
                raise ModelError(f"{self._folder.name}: {file} cannot be read: {error.strerror}") from error
            try:
                self._files[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{self._folder.name}: {file} is damaged or incomplete ({_line(error)}); fetch it again"
                ) from error
        if listed is not None:
            return listed
        return dict.fromkeys(self._files[SINGLE].keys(), SINGLE)

    def _read_index(self, path: Path) -> dict[str, str]:
        try:
            listed = json.loads(path.read_bytes())["weight_map"]
            names = {str(tensor): str(file) for tensor, file in listed.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{self._folder.name}/{path.name} cannot be read: {_line(error)}") from error
        for file in names.values():
            if Path(file).name != file:  # a checkpoint names its neighbours, nothing elsewhere
                raise ModelError(f"{self._folder.name}/{path.name} names a file outside of the folder: {file}")
        return names

    def _no_files(self) -> str:
        others = sorted(
            p.name for p in self._folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".msgpack", ".h5")
        )
        shards = sorted(p.name for p in self._folder.glob("*.safetensors"))
        if shards:
            return f"{self._folder.name}: {INDEX} is missing, without which {shards[0]} cannot be placed"
        if others:
            return (
                f"{self._folder.name} holds its weights only as {others[0]}, a format that can run code when opened; "
                "convert the checkpoint to safetensors"
            )
        return f"{self._folder.name} holds no weights ({SINGLE} or {INDEX})"

    def _check(self, spec: TensorSpec, tensors: Mapping[str, str]) -> tuple[Any, str]:
        """The file and the name there of one tensor, after a look at its header."""
        # Checkpoints saved from the bare body of the model lack the first part of every name.
        names = [name for name in (spec.name, spec.name.partition(".")[2]) if name in tensors]
        if not names:
            raise ModelError(f"{self._folder.name}: the tensor {spec.name} is missing")
        name = names[0]
        file = self._files[tensors[name]]
        try:
            header = file.get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self._folder.name}: {tensors[name]} lacks the tensor {name}") from error
        dtype, shape = str(header.get_dtype()), tuple(header.get_shape())
        if dtype not in _PLAIN:
            raise ModelError(
                f"{self._folder.name}: {name} is stored as {dtype}; quantised weights are not supported yet"
            )
        if shape != (spec.shape[::-1] if spec.transposed else spec.shape):
            raise ModelError(
                f"{self._folder.name}: {name} has the shape {list(shape)}, but config.json makes it {list(spec.shape)}"
            )
        self._total += spec.num_values * _PLAIN[dtype].itemsize
        return file, name


def _read(file: Any, name: str, spec: TensorSpec) -> torch.Tensor:
    """As the file has it: a mapping, or a copy where the spans do not lie in one piece."""
    if not spec.spans:
        return file.get_tensor(name)
    stored = file.get_slice(name)
    axis = spec.axis if not spec.transposed else len(spec.shape) - 1 - spec.axis
    parts = [stored[(slice(None),) * axis + (slice(first, last),)] for first, last in spec.spans]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=axis)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
