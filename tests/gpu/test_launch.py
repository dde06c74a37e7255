"""A launcher asks Triton once for each key, and then launches what it got, with the same arguments."""

from collections.abc import Callable

import torch

from orcaserve.ops.gpu.launch import Launcher, kinds

OPTIONS = {"num_warps": 4}


class Compiled:
    """What a kernel was compiled to, or the kernel itself: notes how it is launched."""

    def __init__(self, gives: "Compiled | None" = None) -> None:
        self.gives = gives
        self.launches: list[tuple[object, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., "Compiled | None"]:
        def launch(*args: object, **options: object) -> "Compiled | None":
            self.launches.append((grid, args, options))
            return self.gives

        return launch


def test_what_is_compiled_is_launched_again_for_an_equal_key() -> None:
    compiled = Compiled()
    kernel = Compiled(compiled)
    launch = Launcher(kernel)
    launch(("a", 1), (1, 1, 1), ["x", 1], OPTIONS)
    launch(("a", 1), (2, 1, 1), ["y", 1], OPTIONS)
    assert kernel.launches == [((1, 1, 1), ("x", 1), OPTIONS)]
    assert compiled.launches == [((2, 1, 1), ("y", 1), {})]
    launch(("b", 1), (1, 1, 1), ["x", 1], OPTIONS)
    assert len(kernel.launches) == 2


def test_without_a_key_and_under_the_interpreter_nothing_is_kept() -> None:
    for kernel, key in ((Compiled(Compiled()), None), (Compiled(), "key")):
        launch = Launcher(kernel)
        for _ in range(2):
            launch(key, (1, 1, 1), ["x"], OPTIONS)
        assert len(kernel.launches) == 2


def test_kinds_tell_dtypes_and_absence_and_know_nothing_of_what_lies_anywhere() -> None:
    wide, half = torch.empty(16), torch.empty(16, dtype=torch.bfloat16)
    assert kinds(wide, None) == kinds(torch.empty(3), None)
    assert len({kinds(wide, half), kinds(half, wide), kinds(wide, None), kinds(None, wide)}) == 4
    assert kinds(wide, half[1:]) is None
