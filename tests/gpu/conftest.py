"""GPU kernels are tested on the GPU that is there, else under Triton's interpreter (see the conftest above)."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """The interpreter puts its own functions into Triton's modules at every call within a kernel: once is enough."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages, patched = [interpreter.tl, interpreter.tl.core], set()

    def patch_once(function):
        seen = {value for value in function.__globals__.values() if inspect.ismodule(value) and value in languages}
        if seen <= patched:
            return SimpleNamespace(restore=lambda: None)
        patched.update(seen)
        return patch(function)

    def launch_anew(*args, **kwargs):
        patched.clear()
        return launch(*args, **kwargs)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang", patch_once)
        context.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


@pytest.fixture(scope="session", autouse=True)
def loops_over_loaded_bounds() -> Iterator[None]:
    """Lets the interpreter's scalars, arrays of one element, bound a loop: from NumPy 2.4 on, int() refuses them."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
        yield
