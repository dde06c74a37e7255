"""What this process may use of its machine: memory and processors, with the limits of its control groups."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_NO_LIMIT = 1 << 60  # version 1 writes "no limit" as a huge number


def available_memory(root: Path = _ROOT, most: int | None = None) -> int:
    """Bytes that can be taken without swapping: what the kernel says, or what is left under the tightest limit.

    most: no more than this.
    """
    found = [_free(root), *(max(0, limit - used) for limit, used in _memory_limits(root))]
    return min(found if most is None else [*found, most])


def usable_cpus(root: Path = _ROOT) -> int:
    """Processors that this process may keep busy: its affinity, or its control group's share if that is less."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(share) for share in _cpu_shares(root))]))


def cpu_name(root: Path = _ROOT) -> str:
    """Vendor, family and model of the processor: libraries choose their inner loops by it."""
    wanted = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    found = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in wanted:
            found.setdefault(key.strip(), value.strip())
    return "/".join(found[key] for key in wanted if key in found)


def _free(root: Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # no such file: not Linux
    except (ValueError, OSError):
        return 2 << 30


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every control group above this process that has a limit. Page cache counts as free."""
    for folder in _groups(root, "memory"):
        for limit_name, used_name, cache_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is None or used is None or limit >= _NO_LIMIT:
                continue
            for line in _read(folder / "memory.stat").splitlines():
                key, _, value = line.partition(" ")
                if key == cache_name and value.isdigit():
                    used -= int(value)
            yield limit, max(0, used)


def _cpu_shares(root: Path) -> Iterator[float]:
    for folder in _groups(root, "cpu"):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            yield int(quota) / int(period)
        quota_v1, period_v1 = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota_v1 and period_v1 and quota_v1 > 0:
            yield quota_v1 / period_v1


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, its own and all above, in both versions of the interface."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        top = root / "sys/fs/cgroup"
        for mount in (top / controller,) if names else (top, top / "unified"):
            inner = mount / path.strip("/")
            # inside a container the path may be the host's; then the mount itself is what counts
            yield from (folder for folder in (inner, *inner.parents) if folder == mount or mount in folder.parents)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
