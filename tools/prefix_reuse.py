"""What the prefix cache spares on a real server: one workload as it is, and with prompts that have nothing in common.

    python tools/random_checkpoint.py medium DIR
    python tools/prefix_reuse.py DIR --workload mooncake:path=FILE,n=100,speed=0.15,lengths=0.0625,max-in=1000

Prints the share of prompt tokens that the cache spared beside the one that a cache without bounds could have, and TTFT.
Arrivals and lengths of the two runs are the same. Servers that are named by --beside get them, too; what they knew is
what they say (vLLM with --enable-prompt-tokens-details). Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from serving import Serving

from orcaserve.bench import client, measures
from orcaserve.bench.client import Server, servers_from
from orcaserve.bench.workloads import LOWEST_ID, Item, Work, spec

BLOCK = 16


def reachable(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens in full blocks that an earlier prompt begins with, too; of each prompt a token is left to compute."""
    known: set[tuple[int, ...]] = set()
    found = 0
    for ids in prompts:
        ends = range(BLOCK, len(ids) + 1, BLOCK)
        found += max((end for end in ends if end < len(ids) and ids[:end] in known), default=0)
        known.update(ids[:end] for end in ends)
    return found


def apart(work: Work, vocab: int) -> Work:
    """Every prompt with a first token of its own: no block of it is another's, too."""
    items = (
        msgspec.structs.replace(item, prompt_ids=(LOWEST_ID + number % (vocab - LOWEST_ID), *item.prompt_ids[1:]))
        for number, item in enumerate(work.items)
    )
    return msgspec.structs.replace(work, items=tuple(items))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--workload", required=True, help="as of orcaserve bench serve")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=URL", help="a server that is running")
    parser.add_argument("--vocab", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--threads", "1", "--kv-memory", "4GiB"])
    arguments = parser.parse_args()
    work = spec.make(arguments.workload, vocab=arguments.vocab, seed=arguments.seed)
    total = sum(len(item.prompt_ids) for item in work.items)
    best = reachable([item.prompt_ids for item in work.items])
    print(f"{len(work.items)} requests, {total} prompt tokens; a cache without bounds spares {best / total:.1%}\n")
    print("| server | prompts | spared | of what could be | TTFT p50, s | p90 | p99 |\n|---|---|---|---|---|---|---|")
    others = servers_from(arguments.beside)
    for name, one in (("as they are", work), ("with nothing in common", apart(work, arguments.vocab))):
        with serving(arguments) as ours:
            measure(ours, name, one, arguments.vocab, best)
        for other in others:
            measure(other, name, one, arguments.vocab, best)


@contextmanager
def serving(arguments: argparse.Namespace) -> Iterator[Server]:
    """A server of ours, which knows nothing yet."""
    with tempfile.TemporaryDirectory() as folder:
        running = Serving([arguments.checkpoint, *arguments.serve], Path(folder) / "steps.jsonl")
        try:
            yield Server("ours", running.url)
        finally:
            running.close()


def measure(server: Server, name: str, work: Work, vocab: int, best: int) -> None:
    """Prints a row. best: tokens that a cache without bounds could spare."""
    records = client.in_loop(client.run(client.in_loop(client.usable(server, warm_up(vocab))), work))
    for record in records:
        if record.error:
            raise SystemExit(f"{server.name}: {record.error}")
    total, spared = (sum(tokens) for tokens in zip(*((r.prompt_tokens, r.cached_tokens) for r in records), strict=True))
    times = " | ".join(f"{measures.ttft(records, share) or 0:.3f}" for share in (0.5, 0.9, 0.99))
    print(
        f"| {server.name} | {name} | {spared / total:.1%} | {spared / best if best else 0:.1%} | {times} |", flush=True
    )


def warm_up(vocab: int) -> Work:
    ids = tuple(reversed(range(vocab - 200, vocab)))
    return Work("warm-up", "load", tuple(Item(0.0, ids[number:], 20) for number in range(4)))


if __name__ == "__main__":
    main()
