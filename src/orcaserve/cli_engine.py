"""`engine_options`: the options that decide how a model runs, and the engine that they make."""

from __future__ import annotations

from typing import Any

import click

from orcaserve.cli_itl import max_itl_option
from orcaserve.cli_policy import POLICY_HELP, PolicyName
from orcaserve.cli_size import Size
from orcaserve.core.config import EngineOptions, ModelError


def engine_options(command: Any) -> Any:
    """Gives them to a command: they are the same for every one that runs a model."""
    options = [
        click.option(
            "--dtype",
            type=click.Choice(["auto", "bfloat16", "float32"]),
            default="auto",
            show_default=True,
            help="Of weights and activations; auto keeps float32, and makes bfloat16 of the 16-bit ones.",
        ),
        click.option(
            "--kv-memory", type=Size(), default="auto", show_default=True, help="KV cache: 24MiB, 4GiB, auto."
        ),
        click.option(
            "--swap-space",
            type=Size(),
            default="0",
            show_default=True,
            help="Room for KV of preempted requests, which is else computed again: 4GiB.",
        ),
        click.option(
            "--swap-dir",
            type=click.Path(exists=True, file_okay=False),
            help="Have it in a file of this folder, not in memory.",
        ),
        click.option("--max-model-len", type=click.IntRange(1), help="Longest prompt and output together, in tokens."),
        click.option(
            "--max-batch-size", type=click.IntRange(1), default=64, show_default=True, help="Requests of an iteration."
        ),
        click.option(
            "--max-batch-tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens of an iteration."
        ),
        max_itl_option("Default on a CPU: 250, or four times what decodes take alone, if that is longer. 0: no limit."),
        click.option("--policy", type=PolicyName(), default="default", show_default=True, help=POLICY_HELP),
        click.option("--threads", type=click.IntRange(1), help="Compute threads; default: all the process may use."),
        click.option(
            "--quantization",
            type=click.Choice(["none", "int8", "int4"]),
            default="none",
            show_default=True,
            help="Keep weights in 8 or 4 bits: a half or a third of the memory traffic.",
        ),
        click.option(
            "--kv-cache-dtype",
            "kv_dtype",
            type=click.Choice(["auto", "int8"]),
            default="auto",
            show_default=True,
            help="int8 keeps keys and values in 8 bits: half the memory of bfloat16.",
        ),
        click.option(
            "--tensor-parallel-size",
            "tensor_parallel",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Processes that share every layer: 1, 2, 4 or 8.",
        ),
        click.option(
            "--pipeline-parallel-size",
            "pipeline_parallel",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Stages that share out the layers, each with a batch of its own.",
        ),
        click.option(
            "--stage-split",
            type=click.Choice(["balanced", "equal"]),
            default="balanced",
            show_default=True,
            help="Stages that take equally long, or have equally many layers.",
        ),
        click.option(
            "--control-plane",
            type=click.Choice(["separate", "mixed"]),
            default="separate",
            show_default=True,
            help="mixed sends batches along with the activations, to see what that costs.",
        ),
        click.option("--kernels", default="auto", show_default=True, help="Of the CPU: auto, torch, avx2, portable, …"),
        click.option(
            "--backend",
            type=click.Choice(["auto", "native", "transformers"]),
            default="auto",
            show_default=True,
            help="auto is our own decoder where it knows the architecture, else transformers' (an extra).",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="auto is the GPU, if there is one and nothing else asked for needs the CPU.",
        ),
        click.option(
            "--numerics",
            type=click.Choice(["invariant", "fast"]),
            default="invariant",
            show_default=True,
            help="On a GPU: fast takes the vendor's matrix products, whose bits depend on the load.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def engine_of(model: str, options: dict[str, Any]) -> tuple[str, EngineOptions]:
    """The model's public name and the engine's options. Ends the program with one line if there is no such model."""
    from orcaserve.serve.console import Console
    from orcaserve.serve.find_model import find_model

    console = Console()
    try:
        name, folder = find_model(model, lambda done, total: console.on_progress(f"download {model}", done, total))
    except ModelError as error:
        raise click.ClickException(str(error)) from None
    finally:
        console.close()
    if options["swap_space"] is None or (options["swap_dir"] is not None and not options["swap_space"]):
        raise click.ClickException("--swap-space needs a size, for example 4GiB")
    # An iteration always has room for one token of every request.
    options["max_batch_tokens"] = max(options["max_batch_tokens"], options["max_batch_size"])
    return name, EngineOptions(model=str(folder), **options)
