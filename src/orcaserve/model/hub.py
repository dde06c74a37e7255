"""`resolve`: the folder of a model that is named by its folder or as on the Hugging Face hub. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orcaserve.core.config import ModelError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What serving needs, and no more: repositories often hold the same weights a second time in other formats.
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "1_Pooling/config.json",
)


def resolve(name_or_path: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """The folder of a checkpoint. Raises ModelError, in one line, where there is none.

    name_or_path: a folder, or "organisation/name" as on the Hugging Face hub: taken from the local cache (where
    HF_HOME or HF_HUB_CACHE put it) without asking the network, or else downloaded into it.
    progress: called with (bytes downloaded, bytes in all so far known).
    """
    folder = Path(name_or_path).expanduser()
    if name_or_path and folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(name_or_path) or folder.exists():
        raise ModelError(
            f"{name_or_path} is neither a model folder nor a name on the Hugging Face hub (as in Qwen/Qwen3-0.6B)"
        )
    return _cached(name_or_path) or _download(name_or_path, progress)


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # a quarter of a second that a folder's user need not wait

    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """Whether a download got to its end: all weights that the folder speaks of are there."""
    if (folder / "model.safetensors").exists():
        return True
    try:
        shards = set(json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all((folder / str(shard)).exists() for shard in shards)


def _download(name: str, progress: Callable[[int, int], None] | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_FILES), tqdm_class=_reporter(progress)))
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is open on the Hugging Face hub only to those who accepted its terms; "
            "do so on its page and log in with 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{name} is not on the Hugging Face hub, or is private (then log in: 'hf auth login')"
        ) from error
    except Exception as error:  # whatever the network and its client can come up with
        raise ModelError(
            f"{name} is not in the local Hugging Face cache, and the hub cannot be reached "
            f"({type(error).__name__}); download it where there is a network, or give a folder"
        ) from error
    if not _is_whole(folder):  # without a network, the client gives what an interrupted download left
        raise ModelError(
            f"the local Hugging Face cache does not hold all weights of {name} in safetensors format, "
            "and the hub did not give the rest"
        )
    return folder


def _reporter(progress: Callable[[int, int], None] | None) -> type[Any]:
    """A progress bar class that draws nothing and tells `progress` of the bytes."""
    from tqdm.auto import tqdm

    class Reporter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            updated = super().update(n)
            if progress is not None and self.unit == "B" and self.total:
                progress(int(self.n), int(self.total))
            return updated

        def display(self, *args: Any, **kwargs: Any) -> None:
            pass

    return Reporter
