"""While a process first imports a module no garbage is looked for, and in what it leaves none ever after."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys

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


@pytest.mark.parametrize("has_driver", [True, False])
def test_torch_is_imported_so_by_who_has_to_ask_it_for_a_gpu(has_driver: bool) -> None:
    """And by nobody where the system has no driver for one."""
    code = f"""
import gc, sys, types
from orcaserve.executors import placement
def load(name):
    if not {has_driver}:
        raise OSError(name)
placement.ctypes = types.SimpleNamespace(CDLL=load)
count = placement.count_gpus()
sys.exit(("torch" in sys.modules, gc.get_freeze_count() > 100_000) != ({has_driver}, {has_driver}) or
         not {has_driver} and count != 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
