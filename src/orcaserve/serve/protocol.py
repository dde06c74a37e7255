"""The shapes of OpenAI's API as types: what requests may hold, field by field and with ranges, and what responses hold.

The ranges stand here and nowhere else; the OpenAPI description is made from these types. Every optional field of a
request may also be null, which means: not given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from orcaserve.core.request import Pooling

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_BIASES = 1024
_INT32 = 2**31 - 1

Count = Annotated[int, Meta(ge=0, le=_INT32)]
TokenId = Annotated[int, Meta(ge=0, le=_INT32)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
NumLogprobs = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Kept = Annotated[int, Meta(ge=-1, le=_INT32)]
Priority = Annotated[int, Meta(ge=-_INT32, le=_INT32)]
Seconds = Annotated[float, Meta(gt=0, le=_INT32)]
Salt = Annotated[str, Meta(max_length=256)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]


class StreamOptions(msgspec.Struct, frozen=True):
    """include_usage: one more chunk at the end, with empty `choices` and the whole request's `usage`."""

    include_usage: bool | None = None


class JsonSchema(msgspec.Struct, kw_only=True, rename={"json_schema": "schema"}):
    """name, description, strict: accepted; every schema is followed strictly."""

    json_schema: dict[str, Any] | bool
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """The response is free text, some JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """What the response follows; one of these. json: a schema, or its text. grammar: in Lark's notation."""

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What completions and chat have in common.

    temperature: 0 is greedy. top_k: 0 or -1 is off. seed: with a seed, the same request gives the same response.
    n: choices per prompt. logit_bias: token id → addend. ignore_eos: go on after the model's end token.
    prompt_logprobs: log-probabilities of the prompt's tokens, with so many alternatives.
    truncate_prompt_tokens: keep only the last so many tokens of the prompt; -1: as many as fit.
    priority: the lower, the earlier.
    user: the tenant, where there are no API keys. timeout: seconds after which the response is of no use any more.
    cache_salt: prefixes are shared only among requests of the same salt.
    return_token_ids: give `token_ids` with each choice, and `prompt_token_ids`.
    include_timing: give `timing`, where each choice's time went; a stream has it in one more chunk, with the usage.
    response_format, structured_outputs, guided_…: what the response follows; one of them.
    """

    model: str | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    min_p: Share | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=1e-3, le=10)] | None = None  # scores are divided by it
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=MAX_BIASES)] | None = None
    prompt_logprobs: NumLogprobs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    include_timing: bool | None = None
    truncate_prompt_tokens: Kept | None = None
    user: str | None = None
    priority: Priority | None = None
    timeout: Seconds | None = None
    cache_salt: Salt | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    guided_grammar: str | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions.

    prompt: a string, a list of token ids, or a list of either. logprobs: so many alternatives to each token.
    echo: the text begins with the prompt; with max_tokens 0 and logprobs that scores the prompt.
    """

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class ContentPart(msgspec.Struct, gc=False):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None


class Message(msgspec.Struct, omit_defaults=True, gc=False):
    """One message of a conversation, as the model's chat template sees it."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class Function(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A function that the model may call. parameters: a JSON schema of its arguments."""

    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    type: Literal["function"] = "function"  # first, as models have seen it in training: templates write tools as JSON
    function: Function


class FunctionName(msgspec.Struct):
    name: str


class ToolChoice(msgspec.Struct, kw_only=True):
    """This one is to be called."""

    function: FunctionName
    type: Literal["function"] = "function"


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions.

    max_completion_tokens: the newer name of max_tokens. logprobs: whether, top_logprobs: with so many alternatives.
    chat_template_kwargs: variables for the model's chat template.
    tools: what the model may call; tool_choice: whether it may, must, or must not, or which one it must.
    """

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """POST /v1/embeddings: each input as one vector, of the model's final hidden values.

    input: a string, a list of token ids, or a list of either. pooling: the last token's values, or the mean of all;
    where nothing is said, what the checkpoint's 1_Pooling/config.json says, else the last token's.
    dimensions: only the first so many values. normalize: false leaves the vector's length; else it is 1.
    """

    input: str | list[str | TokenId | list[TokenId]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=_INT32)] | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Kept | None = None
    user: str | None = None
    priority: Priority | None = None
    timeout: Seconds | None = None
    cache_salt: Salt | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: a text, or a conversation as chat would see it."""

    prompt: str | None = None
    messages: list[Message] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    tokens: list[TokenId]
    model: str | None = None


class PromptTokensDetails(msgspec.Struct):
    """cached_tokens: prompt tokens whose keys and values were still there from an earlier request."""

    cached_tokens: int = 0


class Usage(msgspec.Struct):
    """In tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChoiceTiming(msgspec.Struct):
    """Where a choice's time went.

    engine_ids: its numbers in step logs, one for each engine that had it: a crash gives it to the next.
    queue_seconds: before its first iteration. prefill_seconds: from there to its first token. decode_seconds: from
        there to its last. lost_seconds: from a preemption or a crash until as much had been computed again.
    preemptions: how often its KV was taken away. recomputed_tokens: that were computed once more. swapped_tokens: that
        were brought back from the swap space instead.
    cached_tokens: of its prompt, that the prefix cache spared. iterations: that it took part in; others took part in
        them, too: mean_batch_mates, max_batch_mates.
    """

    index: int
    engine_ids: list[int]
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    lost_seconds: float
    preemptions: int
    recomputed_tokens: int
    swapped_tokens: int
    cached_tokens: int
    iterations: int
    mean_batch_mates: float
    max_batch_mates: int


class CompletionLogprobs(msgspec.Struct):
    """One entry per token. text_offset: where the token begins in the choice's text, in characters.

    The first token of a prompt has no log-probability: null.
    """

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(msgspec.Struct):
    """rank: 1 for the likeliest token."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """A response, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    timing: list[ChoiceTiming] | UnsetType = UNSET


class TopLogprob(msgspec.Struct):
    """bytes: of the token, as numbers; a character may be spread over several tokens."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct):
    """arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """index: of the call in its message, in streams."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | UnsetType = UNSET


class AssistantMessage(msgspec.Struct):
    """content: null where there are only calls. reasoning_content: what stood in a reasoning block."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    system_fingerprint: str
    usage: Usage
    timing: list[ChoiceTiming] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatDelta(msgspec.Struct):
    """What a chunk adds to the message. role: in a choice's first chunk."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
    timing: list[ChoiceTiming] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Embedding(msgspec.Struct, kw_only=True):
    """embedding: numbers, or base64 of float32, little-endian."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    """In tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(msgspec.Struct, kw_only=True):
    """max_model_len: longest prompt and output together, in tokens; null while the model is being loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["orcaserve"] = "orcaserve"
    root: str
    max_model_len: int | None = None


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(msgspec.Struct):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeResponse(msgspec.Struct):
    prompt: str


class TokenizerInfo(msgspec.Struct):
    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


class Health(msgspec.Struct):
    """step_age: seconds since an iteration ended, while there is work; else 0. With replicas: the best one's.

    replicas_not_ready: those that get no requests now, by number; absent while all do.
    """

    status: Literal["ok"] = "ok"
    step_age: float = 0.0
    replicas_not_ready: tuple[int, ...] | msgspec.UnsetType = msgspec.UNSET


class Version(msgspec.Struct):
    """profile: hash of everything that decides the bits of a response; null while the model is being loaded."""

    version: str
    profile: str | None = None
    deterministic: bool | None = None
