"""Which models there are: the built-in one, folders, and what the local Hugging Face cache holds. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from orcaserve import builtin
from orcaserve.core.config import ModelError
from orcaserve.model.config import read_config
from orcaserve.model.hub import resolve


def find_model(name: str, progress: Callable[[int, int], None] | None = None) -> tuple[str, Path]:
    """The public name and the folder of a model, downloaded first where need be. Raises ModelError, in one line."""
    if name == builtin.NAME and not Path(name).is_dir():
        return name, builtin.MODEL_DIR
    folder = resolve(name, progress)
    return (folder.resolve().name if Path(name).expanduser().is_dir() else name), folder


def local_models() -> Iterator[tuple[str, str]]:
    """Names and one remark each: what can be served without a download."""
    yield builtin.NAME, "built in, to try the server with"
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        if repo.repo_type != "model":
            continue
        for revision in repo.revisions:
            if "main" in revision.refs and (revision.snapshot_path / "config.json").is_file():
                yield repo.repo_id, _remark(revision.snapshot_path, repo.size_on_disk)


def _remark(folder: Path, size: int) -> str:
    try:
        config = read_config(folder)
    except ModelError as error:
        return f"cannot be served: {error}"
    except (OSError, json.JSONDecodeError) as error:
        return f"cannot be read: {error}"
    return f"{config.architecture}, {size / 1e9:.1f} GB"
