"""The memory budget: how many KV blocks fit beside the weights, and the start-up table of it. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from orcaserve.core.config import BudgetLine, ModelError

_HEAD_ROOM = 256 << 20
_SHARE = 0.5  # of what is free, where nobody said how much the KV cache may take


@dataclass(frozen=True, slots=True)
class Budget:
    """num_blocks of KV; max_model_len: the longest prompt + output that a request may reach, in tokens.

    num_slots: KV blocks that the swap space holds.
    """

    num_blocks: int
    num_slots: int
    max_model_len: int
    lines: tuple[BudgetLine, ...]


def activation_bytes(num_tokens: int, hidden_size: int, intermediate_size: int, attention_size: int, vocab: int) -> int:
    """An upper estimate for iterations of num_tokens: float32 temporaries of the widest layer, and 32 rows of logits.

    attention_size: query heads * head_dim.
    """
    per_token = 4 * (6 * hidden_size + 4 * intermediate_size + 8 * attention_size)
    return num_tokens * per_token + 32 * vocab * 4 * 4


def make_budget(
    *,
    available: int,
    weights: int,
    activations: int,
    bytes_per_token: int,
    block_size: int,
    max_batch_size: int,
    model_len: int,
    wished_len: int | None = None,
    kv_memory: int | None = None,
    swap_space: int = 0,
    swap_dir: str | None = None,
    share: float | None = None,
) -> Budget:
    """The KV pool for a machine with `available` bytes before the weights were loaded. All sizes in bytes or tokens.

    model_len: the longest context of the model; wished_len: the operator's limit, which must then fit.
    kv_memory: the operator's size of the pool; None: half of what is free, but no more than max_batch_size requests of
    the longest context could ever use. swap_space: bytes for KV outside of the pool, of memory unless there is a
    swap_dir. share: of what is free that the pool takes where nobody said how much, on a device that is ours alone;
    None: half, as above. Raises ModelError where it cannot be.
    """
    if wished_len is not None and wished_len > model_len:
        raise ModelError(f"a context of {wished_len} tokens is asked for, but the model's longest is {model_len}")
    longest = wished_len or model_len
    block_bytes = bytes_per_token * block_size
    num_slots = swap_space // block_bytes
    if swap_space and not num_slots:
        raise ModelError(f"a swap space of {_size(swap_space)} holds no block: one takes {_size(block_bytes)}")
    swap_memory = num_slots * block_bytes if swap_dir is None else 0
    free = available - weights - activations - _HEAD_ROOM - swap_memory
    if kv_memory is None:
        useful = max_batch_size * (-(-longest // block_size) + 1) * block_bytes
        pool = min(int(free * (_SHARE if share is None else share)), useful)
        needed = (-(-(wished_len or 1) // block_size)) * block_bytes
        if pool < needed:
            raise ModelError(
                f"not enough memory: {_size(available)} are free, but the model needs {_size(weights)} for weights, "
                f"{_size(activations)} for activations, {_size(_HEAD_ROOM)} to spare and twice {_size(needed)} for KV"
                + (f", beside {_size(swap_memory)} of swap space" if swap_memory else "")
            )
    else:
        pool = kv_memory
        if pool > free:
            raise ModelError(
                f"not enough memory: a KV cache of {_size(pool)} is asked for, but of {_size(available)} "
                f"{_size(max(0, free))} remain beside weights ({_size(weights)}), activations"
                + (f", head-room and swap space ({_size(swap_memory)})" if swap_memory else " and head-room")
            )
    num_blocks = pool // block_bytes
    if num_blocks == 0:
        raise ModelError(f"a KV cache of {_size(pool)} holds no block: one takes {_size(block_bytes)}")
    slots = num_blocks * block_size
    if wished_len is not None and wished_len > slots:
        raise ModelError(f"a context of {wished_len} tokens is asked for, but {_size(pool)} of KV hold {slots}")
    max_model_len = min(longest, slots)
    swap = (
        BudgetLine("swap space", num_slots * block_bytes, f"{num_slots} blocks{f' in {swap_dir}' if swap_dir else ''}"),
    )
    return Budget(
        num_blocks,
        num_slots,
        max_model_len,
        (
            BudgetLine("weights", weights),
            BudgetLine("KV cache", num_blocks * block_bytes, f"{num_blocks} blocks of {block_size} tokens"),
            *(swap if num_slots else ()),
            BudgetLine("activations", activations, "at most, in one iteration"),
            BudgetLine("head-room", _HEAD_ROOM),
            BudgetLine("longest context", max_model_len * bytes_per_token, f"{max_model_len} tokens"),
        ),
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB" if num_bytes >= 1 << 29 else f"{num_bytes / (1 << 20):.1f} MiB"
