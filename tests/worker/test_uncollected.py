"""While a process first imports a module no garbage is looked for, and in what it leaves none ever after."""

from __future__ import annotations

import contextlib
import gc

import pytest

from orcaserve.worker.process import uncollected


@pytest.mark.parametrize("error", [None, ImportError()], ids=repr)
def test_what_is_made_meanwhile_is_not_looked_at(error: Exception | None) -> None:
    before = gc.get_freeze_count()
    try:
        with contextlib.suppress(ImportError), uncollected("a_module_that_is_new"):
            assert not gc.isenabled()
            made = [[] for _ in range(1000)]
            if error is not None:
                raise error
        assert gc.isenabled()
        assert gc.get_freeze_count() - before >= len(made)
    finally:
        gc.unfreeze()


def test_once_it_is_there_nothing_is_kept() -> None:
    """Or each engine of a long process would keep what was garbage at its start."""
    before = gc.get_freeze_count()
    with uncollected("gc"):
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
