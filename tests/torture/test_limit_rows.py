"""R6, R10, R12 and R14 at their short scale: what they find right and wrong, not how quick it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import orcaserve.core
from torture import mutants, r06_overload, r10_slow_readers, r12_worlds, r14_memory
from torture.rows import Setup


@pytest.mark.parametrize(
    "row", [r06_overload, r10_slow_readers, r12_worlds, r14_memory], ids=lambda row: row.ROWS[0].name
)
def test_row(row, tmp_path: Path) -> None:
    setup = Setup("short", seed=20, folder=tmp_path)
    for outcome in row.torture(setup):
        print(outcome.line(), *outcome.trace, sep="\n")
        assert outcome.is_met, outcome.line()


def test_mutants_differ_from_their_source_and_are_noticed() -> None:
    files = mutants.sources(orcaserve.core, r12_worlds.UNMUTATED)
    path = files["orcaserve.core.token_bucket"]
    source = path.read_text()
    found = {ast.unparse(mutants.mutate(source, index)) for index in range(mutants.count(path))}
    assert len(found) == mutants.count(path) and ast.unparse(ast.parse(source)) not in found
    assert sum(map(mutants.count, files.values())) > 500
    words = [mutants.words(path, index) for index in range(mutants.count(path))]
    index = next(index for index, said in enumerate(words) if "return None" in said)
    mutant = ("orcaserve.core.token_bucket", index)
    assert (
        r12_worlds.run_tests(mutant, ["--noconftest", str(r12_worlds.TESTS / "test_token_bucket.py")], None) == "killed"
    )
    assert r12_worlds.run_tests(mutant, ["--noconftest", str(r12_worlds.TESTS / "test_lengths.py")], None) == "survives"
