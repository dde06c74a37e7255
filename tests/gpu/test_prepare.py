"""An iteration's tokens and places on the device against a loop over them in Python."""

import random

import pytest
import torch

from orcaserve.ops.gpu.prepare import Staged, commit, prepare

POISON = -77


def by_hand(ids, seats, starts, updates, last_tokens, tables, block_size):
    """tables: lists, changed in place."""
    for seat, index, block in updates:
        tables[seat][index] = block
    rows = []
    for token, seat, start in zip(ids, seats, starts, strict=True):
        if seat < 0:
            rows.append((0, 0, -1))
        else:
            slot = tables[seat][start // block_size] * block_size + start % block_size
            rows.append((last_tokens[seat] if token < 0 else token, start, slot))
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(
    ("count", "num_updates", "block_size"), [(1, 1, 16), (8, 0, 32), (300, 700, 16), (1024, 5000, 1), (8192, 90, 128)]
)
def test_tokens_find_their_places(count, num_updates, block_size, device):
    rng = random.Random(count)
    num_seats, width = 97, 83
    tables = [[rng.randrange(10_000) for _ in range(width)] for _ in range(num_seats)]
    last_tokens = [rng.randrange(200_000) for _ in range(num_seats)]
    places = rng.sample(range(num_seats * width), num_updates)
    updates = [(place // width, place % width, rng.randrange(10_000)) for place in places]
    seats = [rng.choice([-1, *range(num_seats)]) for _ in range(count)]
    starts = [rng.randrange(width * block_size) for _ in range(count)]
    ids = [rng.choice([-1, rng.randrange(200_000)]) for _ in range(count)]

    # one buffer, as the host stages it, and more room for updates than there are; what is not used may be anything
    flat = [part for update in updates for part in update] + [POISON] * 6
    staged = torch.tensor([num_updates, *ids, *seats, *starts, *flat], dtype=torch.int32, device=device)
    of_tokens = [staged[1 + i * count :][:count] for i in range(3)]
    told = Staged(*of_tokens, updates=staged[1 + 3 * count :].view(-1, 3), num_updates=staged[:1])
    on_device = torch.tensor(tables, dtype=torch.int32, device=device)
    out = [torch.full((count,), POISON, dtype=torch.int32, device=device) for _ in range(3)]
    kept = torch.tensor(last_tokens, dtype=torch.int32, device=device)
    prepare(told, kept, on_device, *out, block_size=block_size)
    wanted = by_hand(ids, seats, starts, updates, last_tokens, tables, block_size)
    assert [column.tolist() for column in out] == wanted
    assert on_device.tolist() == tables


@pytest.mark.parametrize("count", [1, 5, 256, 1000])
def test_drawn_tokens_are_kept_by_seat(count, device):
    rng = random.Random(count)
    seats = rng.sample(range(2000), count)
    tokens = [rng.choice([-1, rng.randrange(200_000)]) for _ in range(count)]
    padded = [rng.choice([-1, seat, seat]) for seat in seats]
    kept = torch.arange(2000, dtype=torch.int32, device=device)
    wanted = kept.tolist()
    for token, seat in zip(tokens, padded, strict=True):
        if seat >= 0:
            wanted[seat] = max(token, 0)
    as_tensor = [torch.tensor(values, dtype=torch.int32, device=device) for values in (tokens, padded)]
    commit(*as_tensor, kept)
    assert kept.tolist() == wanted
