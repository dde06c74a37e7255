"""The memory budget, and what a process may use of its machine."""

import pytest

from orcaserve.core.config import ModelError
from orcaserve.worker.machine import available_memory, cpu_name, usable_cpus
from orcaserve.worker.memory import activation_bytes, make_budget

MIB, GIB = 1 << 20, 1 << 30


def budget(**options):
    defaults = {
        "available": 8 * GIB,
        "weights": GIB,
        "activations": 100 * MIB,
        "bytes_per_token": 100 << 10,
        "block_size": 16,
        "max_batch_size": 64,
        "model_len": 32768,
    }
    return make_budget(**(defaults | options))


def test_auto_takes_half_of_what_is_free():
    made = budget()
    pool = made.num_blocks * 16 * (100 << 10)
    free = 8 * GIB - GIB - 100 * MIB - 256 * MIB
    assert free // 2 - 16 * (100 << 10) < pool <= free // 2
    assert made.max_model_len == min(32768, made.num_blocks * 16)
    lines = {line.name: line.num_bytes for line in made.lines}
    assert lines["KV cache"] == pool
    assert sum(lines[name] for name in ("weights", "KV cache", "activations", "head-room")) <= 8 * GIB


def test_auto_takes_no_more_than_the_batch_could_use():
    made = budget(bytes_per_token=1024, model_len=512, max_batch_size=4)
    assert made.num_blocks == 4 * (512 // 16 + 1)
    assert made.max_model_len == 512


def test_a_given_size_is_kept():
    made = budget(kv_memory=24 * MIB)
    assert made.num_blocks == 24 * MIB // (16 * (100 << 10))
    assert made.max_model_len == made.num_blocks * 16
    assert budget(kv_memory=GIB, wished_len=1000).max_model_len == 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_memory": 9 * GIB}, ["9.00 GiB", "8.00 GiB"]),
        ({"weights": 9 * GIB}, ["9.00 GiB", "8.00 GiB"]),
        ({"kv_memory": MIB}, ["1.0 MiB", "1.6 MiB"]),
        ({"kv_memory": 24 * MIB, "wished_len": 1000}, ["1000", "240"]),
        ({"wished_len": 40000}, ["40000", "32768"]),
        ({"available": 2 * GIB, "wished_len": 32768}, ["2.00 GiB", "3.12 GiB"]),
    ],
)
def test_what_cannot_be_is_said_with_both_numbers(options, words):
    with pytest.raises(ModelError) as refusal:
        budget(**options)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_swap_space_in_memory_is_taken_from_what_is_free_and_one_in_a_file_is_not():
    block = 16 * (100 << 10)
    plain, memory = budget(kv_memory=GIB), budget(kv_memory=GIB, swap_space=GIB)
    assert plain.num_slots == 0 and memory.num_slots == GIB // block
    assert {line.name: line.num_bytes for line in memory.lines}["swap space"] == memory.num_slots * block
    assert budget(swap_space=GIB).num_blocks < budget().num_blocks == budget(swap_space=GIB, swap_dir="/").num_blocks
    assert budget(swap_space=100 * GIB, swap_dir="/").num_slots == 100 * GIB // block
    with pytest.raises(ModelError, match=r"swap space \(7.00 GiB\)"):
        budget(kv_memory=GIB, swap_space=7 * GIB)
    with pytest.raises(ModelError, match=r"swap space of 1\.0 MiB holds no block: one takes 1\.6 MiB"):
        budget(swap_space=MIB)


def test_sizes():
    assert activation_bytes(512, 1024, 3072, 2048, 151936) < 300 * MIB


MEMINFO = {"proc/meminfo": "MemTotal: 999 kB\nMemAvailable:   4194304 kB\n"}


def machine(tmp_path, files):
    """A root folder that holds what the kernel of such a machine would show."""
    for name, text in (MEMINFO | files).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_without_groups(tmp_path):
    assert available_memory(machine(tmp_path, {})) == 4 * GIB
    assert usable_cpus(tmp_path) >= 1


def test_version_2_counts_cache_as_free_and_the_tightest_group(tmp_path):
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "5\n",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/memory.max": f"{2 * GIB}\n",
        "sys/fs/cgroup/a/memory.current": f"{GIB}\n",
        "sys/fs/cgroup/a/memory.stat": f"anon 7\ninactive_file {GIB // 2}\n",
        "sys/fs/cgroup/a/cpu.max": "50000 100000\n",
    }
    assert available_memory(machine(tmp_path, files)) == 3 * GIB // 2
    assert usable_cpus(tmp_path) == 1


def test_version_1_in_a_container(tmp_path):
    """The path is the host's and is not there; the mount itself has the limit."""
    files = {
        "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB // 4}\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert available_memory(machine(tmp_path, files)) == 3 * GIB // 4
    assert usable_cpus(tmp_path) >= 1


def test_this_machine():
    assert available_memory() > 0
    assert usable_cpus() >= 1
    assert isinstance(cpu_name(), str)
