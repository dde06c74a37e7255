"""Triton's interpreter as our kernels need it, in this process or in one that a test starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest


@contextmanager
def quick() -> Iterator[None]:
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


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Lets the interpreter do what kernels rest on and a GPU does: see the four patches."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    language = pytest.importorskip("triton.language")
    patch, cast = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.cast_impl

    def values(handle: object) -> np.ndarray:
        """bfloat16 is held as whole numbers, which would be multiplied as such."""
        if handle.dtype.scalar == language.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        return handle.data.astype(np.float32)

    def dot(self: object, a: object, b: object, c: object, *precision: object) -> object:
        """In steps of 16, as matrix instructions sum; not as BLAS, whose order hangs on a row's place."""
        left, right, total = values(a), values(b), c.data
        for first in range(0, left.shape[1], 16):
            some = slice(first, first + 16)
            total = total + np.einsum("ik,kj->ij", left[:, some], right[some])
        return interpreter.TensorHandle(total, c.dtype.scalar)

    def from_integer(self: object, source: object, kind: object) -> object:
        """The value, not the bit pattern: bfloat16 is made of a float32."""
        if kind.scalar == language.bfloat16:
            source = cast(self, source, language.float32)
        return cast(self, source, kind)

    def patch_with_index(tensor: type, scope: object) -> None:
        """Its scalars are arrays of one element, which bound no loop since NumPy 2.4."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as context:
        context.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
        context.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        context.setattr(interpreter.InterpreterBuilder, "create_si_to_fp", from_integer)
        yield
