"""GPU kernels are tested on the GPU that is there, else under Triton's interpreter (see the conftest above)."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
