"""What is refused before anything is loaded, and before torch is."""

from __future__ import annotations

from pathlib import Path

from orcaserve.core.config import EngineOptions, ModelError
from orcaserve.core.order import OrderError
from orcaserve.core.policy import Policy, parse_policy
from orcaserve.model.config import read_raw_config
from orcaserve.model.files import weight_files

_LEAST_BITS = {"none": 12, "int8": 8, "int4": 4}  # of a weight that is not kept in float32


def policy_of(options: EngineOptions) -> Policy:
    """Raises ModelError for a policy that there is not."""
    try:
        return parse_policy(options.policy)
    except OrderError as error:
        raise ModelError(str(error)) from None


def check_files(options: EngineOptions, available: int) -> None:
    """Refuses weights that cannot fit, however short they are kept, before the machine starts to swap over them."""
    folder = Path(options.model)
    raw = read_raw_config(folder)
    is_wide = str(raw.get("dtype") or raw.get("torch_dtype")).removeprefix("torch.") == "float32"
    stays_wide = options.dtype == "float32" or (options.dtype == "auto" and is_wide)
    kept_bits = _LEAST_BITS[options.quantization] if options.quantization != "none" or not stays_wide else 32
    size = sum((folder / name).stat().st_size for name in weight_files(folder)) * kept_bits // (32 if is_wide else 16)
    if size > available:
        raise ModelError(
            f"not enough memory: the weights of {folder.name} take {size / 2**30:.2f} GiB at least, "
            f"but {available / 2**30:.2f} GiB are free"
        )
