"""What a running server of any make calls its model, and which of the requests' fields it takes."""

from __future__ import annotations

import httpx

from torture.asking import ask, faults, new_client
from torture.rows import Setup
from torture.shapes import COMMON, draw


def model_of(setup: Setup, url: str) -> str:
    """The name that was given, or the first one that the server lists."""
    return setup.model or str(httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"])


async def known_features(setup: Setup, url: str, model: str) -> set[str]:
    """Those of COMMON that it takes: a request that asks for it gets a right answer. A plain request it has to take."""
    known: set[str] = set()
    async with new_client(url, 1) as client:
        plain = await ask(client, draw(setup, "probe", 0, (), model).alone(stream=False))
        if not plain.is_whole:
            raise RuntimeError(
                f"{url} refuses a plain completion: {plain.broken or plain.error}; is its --model right?"
            )
        for feature in COMMON:
            # The first of some requests that has the feature.
            for number in range(0, 200, 5):
                one = draw(setup, "probe", number, {*known, feature}, model)
                if one.body.keys() != draw(setup, "probe", number, known, model).body.keys():
                    if not faults(one.alone(stream=False), await ask(client, one.alone(stream=False))):
                        known.add(feature)
                    break
    return known
