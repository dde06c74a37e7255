"""Frequencies of rotary positions from what config.json says about them: numbers in, numbers out. No torch.

Every scheme here gives each position one rotation, for good. Schemes in which a rotation depends on how long the
sequence has grown ("dynamic", "longrope") are served only as far as they do not, so that a response cannot depend on
its chunking: `Rope.max_positions` says how far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec


class Rope(msgspec.Struct, frozen=True):
    """Rotation of the first `dim` of a head's values: by position * inv_freq[j] for the pair (j, j + dim / 2).

    inv_freq: dim / 2 radians per position. scaling: factor to sine and cosine.
    max_positions: positions for which this holds; None: no limit of its own.
    """

    dim: int
    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    max_positions: int | None = None


def rope(parameters: Mapping[str, Any], *, theta: float, dim: int, max_positions: int, original: int | None) -> Rope:
    """The rotation that a checkpoint asks for.

    parameters: config.json's rope_parameters or rope_scaling. theta: base of the wavelengths. dim: values of a head
    that rotate (even). max_positions: max_position_embeddings. original: original_max_position_embeddings, if any.

    Raises KeyError for a parameter that the scheme needs, ValueError for an unknown scheme or a value without sense.
    """
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    scheme = _SCHEMES.get(kind)
    if scheme is None:
        raise ValueError(f'rotary positions of type "{kind}" are not supported')
    if dim <= 0 or dim % 2 or theta <= 0:
        raise ValueError(f"rotary positions over {dim} values with base {theta:g} make no sense")
    plain = [theta ** (-2.0 * j / dim) for j in range(dim // 2)]
    return scheme(parameters, plain, theta, max_positions, original or max_positions)


def _default(parameters: Mapping[str, Any], plain: list[float], theta: float, limit: int, original: int) -> Rope:
    return Rope(2 * len(plain), tuple(plain))


def _linear(parameters: Mapping[str, Any], plain: list[float], theta: float, limit: int, original: int) -> Rope:
    factor = float(parameters["factor"])
    return Rope(2 * len(plain), tuple(f / factor for f in plain), max_positions=int(limit * factor))


def _dynamic(parameters: Mapping[str, Any], plain: list[float], theta: float, limit: int, original: int) -> Rope:
    """Within max_position_embeddings this is the plain rotation; beyond, the past would have to be rotated anew."""
    return Rope(2 * len(plain), tuple(plain), max_positions=limit)


def _llama3(parameters: Mapping[str, Any], plain: list[float], theta: float, limit: int, original: int) -> Rope:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended by turns per old context."""
    factor = float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    scaled = []
    for f in plain:
        turns = original * f / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append(keep * f + (1 - keep) * f / factor)
    return Rope(2 * len(plain), tuple(scaled))


def _yarn(parameters: Mapping[str, Any], plain: list[float], theta: float, limit: int, original: int) -> Rope:
    """Dimensions that turn often within the old context are kept, those that hardly turn are stretched by `factor`."""
    if "short_factor" in parameters:  # so Phi-3 called its own scheme at first
        return _longrope(parameters, plain, theta, limit, original)
    dim = 2 * len(plain)
    factor = float(parameters.get("factor") or limit / original)
    scaling = parameters.get("attention_factor")
    if scaling is None:
        one, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scaling = _magnitude(factor, one) / _magnitude(factor, all_dim) if one and all_dim else _magnitude(factor, 1.0)

    def dimension_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = dimension_of(float(parameters.get("beta_fast") or 32))
    last = dimension_of(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    scaled = []
    for j, f in enumerate(plain):
        stretch = min(max((j - first) / width, 0.0), 1.0)
        scaled.append(stretch * f / factor + (1 - stretch) * f)
    return Rope(dim, tuple(scaled), float(scaling), max(limit, int(original * factor)))


def _magnitude(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(parameters: Mapping[str, Any], plain: list[float], theta: float, limit: int, original: int) -> Rope:
    """The short factors, and so the original context: past it all earlier positions would be rotated anew."""
    short = parameters["short_factor"]
    if len(short) != len(plain):
        raise ValueError(f"short_factor of the rotary positions has {len(short)} values instead of {len(plain)}")
    factor = float(parameters.get("factor") or limit / original)
    scaling = parameters.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Rope(
        2 * len(plain),
        tuple(f / float(s) for f, s in zip(plain, short, strict=True)),
        float(scaling),
        max_positions=min(limit, original),
    )


_SCHEMES: Mapping[str, Callable[[Mapping[str, Any], list[float], float, int, int], Rope]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}
