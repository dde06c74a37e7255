"""POST /v1/embeddings: a completion of no tokens, of whose prompt the engine gives one vector."""

from __future__ import annotations

import base64
import math

import msgspec
import numpy as np

from orcaserve.core.config import EngineInfo
from orcaserve.serve import errors
from orcaserve.serve.generate import Generation
from orcaserve.serve.job import Job, completion_job
from orcaserve.serve.protocol import CompletionRequest, Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage
from orcaserve.serve.served_model import ServedModel

NAMES = {"prompt": "input"}  # what the completion's fields are called here


def as_completion(request: EmbeddingRequest) -> CompletionRequest:
    """The same prompts, of which nothing is generated."""
    return CompletionRequest(
        prompt=request.input,
        model=request.model,
        max_tokens=0,
        add_special_tokens=request.add_special_tokens,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
        user=request.user,
        priority=request.priority,
        timeout=request.timeout,
        cache_salt=request.cache_salt,
    )


async def embedding_job(
    request: EmbeddingRequest, completion: CompletionRequest, model: ServedModel, info: EngineInfo
) -> Job:
    """completion: what `as_completion` makes of it. Raises ApiError, which names the completion's fields."""
    job = await completion_job(completion, model, info)
    pooling = request.pooling or model.pooling
    prompts = tuple(
        msgspec.structs.replace(prompt, params=msgspec.structs.replace(prompt.params, pooling=pooling))
        for prompt in job.prompts
    )
    return msgspec.structs.replace(job, prompts=prompts, packs_vectors=request.encoding_format == "base64")


class EmbeddingWriter:
    """Turns the vectors of one job into a response."""

    def __init__(self, request: EmbeddingRequest, model: str) -> None:
        self._request = request
        self._model = model

    async def whole(self, generation: Generation) -> bytes:
        """The response's JSON. Raises ApiError if there are fewer dimensions than are asked for."""
        vectors: dict[int, bytes] = {}
        async for index, piece in generation:
            if piece.pooled:
                vectors[index] = piece.pooled
        usage = generation.usage
        return msgspec.json.encode(
            EmbeddingList(
                data=[Embedding(index=index, embedding=self._embedding(vectors[index])) for index in sorted(vectors)],
                model=self._model,
                usage=EmbeddingUsage(usage.prompt_tokens, usage.prompt_tokens),
            )
        )

    def _embedding(self, pooled: bytes) -> list[float] | str:
        values = np.frombuffer(pooled, dtype="<f4")
        wanted = self._request.dimensions
        if wanted is not None and wanted > len(values):
            raise errors.invalid(
                f"'dimensions' is {wanted}, but this model's vectors have {len(values)} values.", "dimensions"
            )
        values = values[:wanted]
        if self._request.normalize is not False:
            wide = values.astype(np.float64)
            length = math.sqrt(math.fsum((wide * wide).tolist()))  # rounded once, in whatever order
            values = (wide / length if length > 0 else wide).astype("<f4")
        if self._request.encoding_format == "base64":
            return base64.b64encode(values.tobytes()).decode()
        found: list[float] = values.tolist()
        return found
