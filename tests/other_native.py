"""A plugin of pytest: the kernels of the module that ORCA_NATIVE names are tested in place of those installed."""

from __future__ import annotations

import importlib.util
import os
import sys

_NAME = "orcaserve.ops._native"

_spec = importlib.util.spec_from_file_location(_NAME, os.environ["ORCA_NATIVE"])
assert _spec is not None and _spec.loader is not None
sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_NAME])
