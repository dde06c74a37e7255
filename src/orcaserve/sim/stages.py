"""Where a pipeline is cut: into equal shares of layers, as in the paper, or into stages that take equally long."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from orcaserve.sim.cost import Size, StageCost
from orcaserve.sim.hardware import Hardware, Parallel, derive, equal_layers
from orcaserve.sim.shape import ModelShape

# The iteration whose stages are made equally long: sixteen requests, of which one is still reading its prompt.
TYPICAL = Size(tokens=64, rows=16, samples=15, context=16 * 256, attended=64 * 256)

_OF_THE_HEAD = ("head", "per_sample")

Span = tuple[int, int]  # layers [first, last)


def spans(layers: Sequence[int]) -> tuple[Span, ...]:
    """Stages of so many layers, one behind the other."""
    ends = [sum(layers[: i + 1]) for i in range(len(layers))]
    return tuple((end - n, end) for n, end in zip(layers, ends, strict=True))


def equal(layers: int, stages: int) -> tuple[Span, ...]:
    """The paper's: as equal as can be. ValueError if there are more stages than layers."""
    return spans(equal_layers(layers, stages))


def balanced(shape: ModelShape, on: Hardware, stages: int, tensor: int = 1) -> tuple[Span, ...]:
    """Stages whose longest takes as short as can be: the output matrix can weigh as much as many layers.

    Costs are those of a TYPICAL iteration on such devices. ValueError if there are more stages than layers.
    """
    equal_layers(shape.layers, stages)  # refuses
    [whole] = derive(on, shape, Parallel(tensor, 1)).stages
    head = whole.head + whole.per_sample * TYPICAL.samples
    layer = (whole(TYPICAL) - head) / shape.layers
    return spans(shares(shape.layers, head / layer, stages))


def shares(layers: int, behind: float, stages: int) -> list[int]:
    """Layers of each stage, at least one, where the last stage has work of `behind` layers besides.

    The longest stage is as short as can be; among such cuts the last stage takes as many layers as it may.
    """
    if stages == 1:
        return [layers]

    def longest(last: int) -> float:
        return max(last + behind, -(-(layers - last) // (stages - 1)))

    last = min(range(layers - stages + 1, 0, -1), key=longest)
    return [*equal_layers(layers - last, stages - 1), last]


def share_layers(whole: StageCost, layers: int, tensor: int, hop: float, per_row: float) -> StageCost:
    """The cost of one rank of `tensor` that share all layers of a stage, and wait for each other twice a layer.

    hop, per_row: seconds of an exchange, and more for each row of it. What is done for each request stays whole.
    """
    shared = ("weights", "per_token", "per_context", "per_attended", "head", "per_sample")
    return msgspec.structs.replace(
        whole,
        **{name: getattr(whole, name) / tensor for name in shared},
        fixed=whole.fixed + 2 * layers * hop,
        per_token_sent=whole.per_token_sent + 2 * layers * per_row,
    )


def split_layers(whole: StageCost, layers: Sequence[int]) -> tuple[StageCost, ...]:
    """The cost of one stage of all layers, cut into stages of so many; the output matrix belongs to the last."""
    total = sum(layers)
    return tuple(
        msgspec.structs.replace(
            whole,
            **{name: getattr(whole, name) * n / total for name in whole.__struct_fields__ if name not in _OF_THE_HEAD},
            **({} if number == len(layers) - 1 else dict.fromkeys(_OF_THE_HEAD, 0.0)),
        )
        for number, n in enumerate(layers)
    )
