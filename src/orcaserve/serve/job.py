"""`Job`: a request after every check: prompts as ids, sampling parameters, and how the response is to look.

Here requests meet the model: its vocabulary, its context length, its defaults. What does not fit ends in an ApiError.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from orcaserve.core.config import EngineInfo
from orcaserve.core.request import SamplingParams
from orcaserve.serve import errors
from orcaserve.serve.chat_template import TemplateError
from orcaserve.serve.decode_body import decode_text
from orcaserve.serve.detokenize import StopStrings
from orcaserve.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, Message
from orcaserve.serve.reply import THINK, THOUGHT, Reply, ToolFormat
from orcaserve.serve.served_model import ServedModel
from orcaserve.serve.tally import Tally
from orcaserve.serve.tools import offer_of

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions
MOST_CHOICES = 1024  # of all prompts of one request together
MOST_ENTRIES = 1 << 22  # `Job.prompt_entries` of one request
_INLINE_CHARACTERS = 8192  # shorter texts are tokenised on the spot: sooner done than handed to a thread
_PROBE = 8  # characters per token of context: a longer text is probed by its beginning of that length
_SEAM = 64  # tokens that a text may have less than its beginning, because of where that was cut
_SHRINK = 4  # most bytes of a text that normalisation can make one of


class Prompt(msgspec.Struct, frozen=True):
    """text: as it is echoed. params: the request's, with this prompt's own max_tokens."""

    ids: tuple[int, ...]
    text: str
    params: SamplingParams


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate. Choice c of prompt p has index p * n + c in the response.

    logprobs, prompt_logprobs: alternatives that the client asked for; None: no log-probabilities.
    tools: how calls are written; None: none are offered. tool_names: what may be called. thinks: whether reasoning is
    told apart; is_thinking: whether the prompt has begun it. kept: special tokens that are said, because they are marks
    of these.
    packs_vectors: whether vectors are told in base64.
    """

    prompts: tuple[Prompt, ...]
    n: int
    end_token_ids: tuple[int, ...]
    stops: StopStrings
    min_tokens: int
    cache_salt: str
    skip_special_tokens: bool
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    return_token_ids: bool
    include_usage: bool
    include_timing: bool
    tools: ToolFormat | None = None
    tool_names: frozenset[str] = frozenset()
    thinks: bool = False
    is_thinking: bool = False
    kept: frozenset[int] = frozenset()
    packs_vectors: bool = False

    def reply(self) -> Reply:
        """For the text of one choice: tells apart what it holds."""
        return Reply(self.tools, names=self.tool_names, thinks=self.thinks, is_thinking=self.is_thinking)

    @property
    def prompt_entries(self) -> int:
        """Tokens of the prompts, each once for every choice and once more for every alternative that is asked for.

        Where there are log-probabilities it is the number of them, which come all at once. Of what is generated nothing
        can be said: `max_tokens` is a ceiling, far above most answers.
        """
        return sum(self.n * len(prompt.ids) * (1 + (prompt.params.prompt_logprobs or 0)) for prompt in self.prompts)


def least_sizes(request: GenerationRequest, model: ServedModel) -> list[int]:
    """Tokens that each prompt of a request has at least, whatever is in it: by its characters, or by its ids."""
    per_character = model.tokenizer.longest_token * _SHRINK
    sizes: list[int] = []
    if isinstance(request, ChatRequest):
        texts = (message.content for message in request.messages)
        sizes = [sum(len(text) for text in texts if isinstance(text, str)) // per_character]
    elif isinstance(request, CompletionRequest):
        prompt: str | list[Any] = request.prompt
        prompts = [prompt] if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else prompt
        of_text = [len(one) // per_character for one in prompts if isinstance(one, str)]
        sizes = of_text or [len(one) for one in prompts if isinstance(one, list)]
    most = request.truncate_prompt_tokens
    return sizes if most is None or most < 0 else [min(size, most) for size in sizes]


async def completion_job(
    request: CompletionRequest,
    model: ServedModel,
    info: EngineInfo,
    default_max_tokens: int | None = COMPLETION_MAX_TOKENS,
) -> Job:
    """default_max_tokens: where the request is silent; None: what the context allows. Raises ApiError."""
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise errors.unsupported("best_of", "ask for 'n' choices and choose among them")
    texts = _prompt_list(request, info)
    # Many short texts keep the event loop as busy as one long text.
    inline = sum(len(prompt) for prompt in texts) <= _INLINE_CHARACTERS
    prompts: list[tuple[tuple[int, ...], str]] = []
    for index, prompt in enumerate(texts):
        param = "prompt" if len(texts) == 1 else f"prompt[{index}]"
        if isinstance(prompt, str):
            ids = await encode(
                prompt,
                model,
                info,
                param,
                add_special_tokens=request.add_special_tokens is not False,
                is_truncated=request.truncate_prompt_tokens is not None,
                inline=inline,
            )
        else:
            ids = prompt
            check_ids(ids, info, param)
        if not ids:
            if model.tokenizer.bos_token_id is None:
                raise errors.invalid(f"'{param}' is empty, and this model has no beginning token to start from.", param)
            ids = [model.tokenizer.bos_token_id]
        ids = _truncate(ids, request, info, default_max_tokens if request.max_tokens is None else request.max_tokens)
        if len(ids) > info.max_model_len:
            raise errors.context_length(len(ids), request.max_tokens, info.max_model_len, param)
        if isinstance(prompt, str) and request.truncate_prompt_tokens is None:
            text = prompt
        else:
            text = _text(ids, model, request.skip_special_tokens is not False) if request.echo else ""
        prompts.append((tuple(ids), text))
    grammar = await model.structures.grammar(request)
    return _job(
        request,
        model,
        info,
        prompts,
        max_tokens=request.max_tokens,
        default_max_tokens=default_max_tokens,
        logprobs=request.logprobs,
        echo=bool(request.echo),
        grammar=grammar,
        param="prompt",
    )


async def chat_job(request: ChatRequest, model: ServedModel, info: EngineInfo) -> Job:
    """Raises ApiError."""
    if request.top_logprobs is not None and not request.logprobs:
        raise errors.invalid("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    offer = offer_of(request, model.tokenizer.chat_template, model.tokenizer.special_id)
    ids, text = await chat_prompt(
        request.messages,
        model,
        info,
        request.add_generation_prompt is not False,
        request.chat_template_kwargs or {},
        offer.shown if offer else (),
    )
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    insisted = ("tool_choice", offer.grammar) if offer and offer.grammar else None
    grammar = await model.structures.grammar(request, insisted)
    thinks = grammar is None and THOUGHT in (model.tokenizer.chat_template or "")
    job = _job(
        request,
        model,
        info,
        [(tuple(_truncate(ids, request, info, max_tokens)), "")],
        max_tokens=max_tokens,
        default_max_tokens=None,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        echo=False,
        grammar=grammar,
        param="messages",
    )
    tools = offer.format if offer else None
    marks = [*((tools.begin, tools.end) if tools else ()), *((THINK, THOUGHT) if thinks else ())]
    kept = {id for mark in marks if (id := model.tokenizer.special_id(mark)) is not None}
    return msgspec.structs.replace(
        job,
        tools=tools,
        tool_names=frozenset(tool.function.name for tool in request.tools or ()) if tools else frozenset(),
        thinks=thinks,
        is_thinking=thinks and text.rstrip().endswith(THINK),
        kept=frozenset(kept),
    )


async def chat_prompt(
    messages: Sequence[Message],
    model: ServedModel,
    info: EngineInfo,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[int], str]:
    """The ids of a conversation, and its text. tools: as the template expects them. Raises ApiError."""
    template = model.chat_template
    if template is None:
        raise errors.invalid(
            f"The model '{model.name}' has no chat template; use /v1/completions.", "messages", "no_chat_template"
        )
    # Whatever the template is, a message or a part of one makes a token at least.
    least = sum(1 if isinstance(message.content, str) else 1 + len(message.content or ()) for message in messages)
    if least > info.max_model_len:
        raise errors.context_length(least, None, info.max_model_len, "messages")
    is_short = sum(map(_weight, messages)) <= _INLINE_CHARACTERS
    plain = _plain(messages) if is_short else await asyncio.to_thread(_plain, messages)
    reserved = {"messages", "add_generation_prompt", *model.tokenizer.special_tokens} & set(variables)
    if reserved:
        name = sorted(reserved)[0]
        raise errors.invalid(f"'{name}' cannot be set in 'chat_template_kwargs'.", "chat_template_kwargs")
    if tools:
        variables = {**variables, "tools": list(tools)}
    size = sum(len(message["content"] or "") for message in plain) + len(msgspec.json.encode(tools))
    _check_size(size, model, info, "messages")

    def render() -> str:
        return template.render(plain, add_generation_prompt=add_generation_prompt, **variables)

    try:
        # Variables are the client's own, and a template may do more with them than their size suggests.
        is_quick = is_short and size <= _INLINE_CHARACTERS and not variables
        text = render() if is_quick else await asyncio.to_thread(render)
    except TemplateError as error:
        raise errors.invalid(f"{error}"[:500], "messages", "chat_template_error") from None
    ids = await encode(text, model, info, "messages", add_special_tokens=False)
    if not ids:
        raise errors.invalid("The conversation makes an empty prompt.", "messages")
    return ids, text


async def encode(
    text: str,
    model: ServedModel,
    info: EngineInfo,
    param: str,
    *,
    add_special_tokens: bool,
    is_truncated: bool = False,
    inline: bool = True,
) -> list[int]:
    """Ids of a text. Long texts are tokenised in a thread; far too long ones only in part, and refused (ApiError).

    is_truncated: most of the ids will be thrown away, so that only the text's length is bounded.
    inline: False uses a thread in any case.
    """
    _check_size(len(text), model, info, param)
    if inline and len(text) <= _INLINE_CHARACTERS:
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    beginning = text[: info.max_model_len * _PROBE]
    if not is_truncated and len(beginning) < len(text):
        found = await asyncio.to_thread(model.tokenizer.encode, beginning, add_special_tokens=False)
        if len(found) > info.max_model_len + _SEAM:
            raise errors.prompt_far_too_long(len(text), info.max_model_len, param)
    return await asyncio.to_thread(model.tokenizer.encode, text, add_special_tokens=add_special_tokens)


def _check_size(num_characters: int, model: ServedModel, info: EngineInfo, param: str) -> None:
    if num_characters > info.max_model_len * model.tokenizer.longest_token * _SHRINK:
        raise errors.prompt_far_too_long(num_characters, info.max_model_len, param)


def _prompt_list(request: CompletionRequest, info: EngineInfo) -> list[str | list[int]]:
    """The prompts of one request: a string or a list of ids is one, a list of either is many."""
    prompt: str | list[Any] = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    is_one = not prompt or isinstance(prompt[0], int)
    if is_one and len(prompt) > info.max_model_len and request.truncate_prompt_tokens is None:
        raise errors.context_length(len(prompt), request.max_tokens, info.max_model_len, "prompt")
    if not is_one and len(prompt) > MOST_CHOICES:
        raise errors.invalid(f"{len(prompt)} prompts are more than the {MOST_CHOICES} of one request.", "prompt")
    if len(set(map(type, prompt))) > 1:
        raise errors.invalid("'prompt' mixes texts, token ids and lists of token ids; use one kind.", "prompt")
    return [prompt] if is_one else prompt


def check_ids(ids: Sequence[int], info: EngineInfo, param: str) -> None:
    """Raises ApiError for an id that is not in the vocabulary."""
    if ids and not 0 <= min(ids) <= max(ids) < info.vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise errors.invalid(
            f"'{param}' holds the token id {wrong}; this model's are 0 to {info.vocab_size - 1}.",
            param,
            "invalid_token",
        )


def _truncate(ids: list[int], request: GenerationRequest, info: EngineInfo, max_tokens: int | None) -> list[int]:
    """The last ids of a prompt, as many as are to be kept; -1: as many as leave room for the output."""
    most = request.truncate_prompt_tokens
    if most is None:
        return ids
    if most == 0:
        name = "truncate_prompt_tokens"
        raise errors.invalid(f"'{name}' keeps so many tokens, from 1 on, or with -1 as many as fit.", name)
    if most < 0:
        most = max(1, info.max_model_len - (1 if max_tokens is None else max_tokens))
    return ids[-most:]


def _text(ids: Sequence[int], model: ServedModel, skips_special: bool) -> str:
    bytes_of = model.tokenizer.text_bytes if skips_special else model.tokenizer.token_bytes
    return b"".join(map(bytes_of, ids)).decode(errors="replace")


def _num_characters(value: object) -> int:
    """Of all texts in a value of JSON, and one for each value."""
    if isinstance(value, str):
        return 1 + len(value)
    if isinstance(value, dict):
        return 1 + sum(map(_num_characters, value.values())) + sum(map(_num_characters, value))
    return 1 + sum(map(_num_characters, value)) if isinstance(value, list | tuple) else 1


def _weight(message: Message) -> int:
    """About how many characters a template may write out of a message, and how many values it may look at."""
    texts = [message.content] if isinstance(message.content, str) else [part.text for part in message.content or ()]
    return _num_characters(texts) + _num_characters(message.tool_calls) + len(message.reasoning_content or "")


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them."""
    tally = Tally()
    return [_plain_message(message, index, tally) for index, message in enumerate(messages)]


def _plain_message(message: Message, index: int, tally: Tally) -> dict[str, Any]:
    """A message as templates expect it: fields that were not given are absent, and content is one text.

    tally: of the JSON in the conversation's strings.
    """
    fields: dict[str, Any] = msgspec.to_builtins(message)
    if isinstance(message.content, list):
        texts = []
        for number, part in enumerate(message.content):
            if part.type not in ("text", "input_text") or part.text is None:
                param = f"messages[{index}].content[{number}]"
                raise errors.invalid(f"'{param}' is not a text part; this server reads text only.", param)
            texts.append(part.text)
        fields["content"] = "\n".join(texts)
    for number, call in enumerate(fields.get("tool_calls") or ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:  # templates write the arguments out themselves
                function["arguments"] = decode_text(function["arguments"], tally)
            except ValueError:
                param = f"messages[{index}].tool_calls[{number}].function.arguments"
                raise errors.invalid(f"'{param}' is not valid JSON.", param) from None
    return {"content": None, **fields}


def _job(
    request: GenerationRequest,
    model: ServedModel,
    info: EngineInfo,
    prompts: Sequence[tuple[tuple[int, ...], str]],
    *,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
    echo: bool,
    grammar: str | None,
    param: str,
) -> Job:
    for name in ("logit_bias", "stop_token_ids"):
        check_ids(list(getattr(request, name) or ()), info, name)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    asked = [k for k in (request.prompt_logprobs, logprobs if echo else None) if k is not None]
    params = _sampling_params(request, model, stops, logprobs, max(asked, default=None), grammar)
    checked = []
    for ids, text in prompts:
        room = info.max_model_len - len(ids)
        if max_tokens is not None:
            tokens = max_tokens
        elif default_max_tokens is not None:
            tokens = min(default_max_tokens, room)
        else:
            tokens = room
        if tokens > room or (max_tokens is None and room < 1):
            raise errors.context_length(len(ids), max_tokens, info.max_model_len, param)
        if params.min_tokens > tokens:
            raise errors.invalid(
                f"'min_tokens' is {params.min_tokens}, but at most {tokens} are generated.", "min_tokens"
            )
        checked.append(Prompt(ids, text, msgspec.structs.replace(params, max_tokens=tokens)))
    options = request.stream_options
    job = Job(
        prompts=tuple(checked),
        n=params.n,
        end_token_ids=(*(() if params.ignore_eos else model.end_token_ids), *params.stop_token_ids),
        stops=StopStrings(stops),
        min_tokens=params.min_tokens,
        cache_salt=request.cache_salt or "",
        skip_special_tokens=request.skip_special_tokens is not False,
        echo=echo,
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
        return_token_ids=bool(request.return_token_ids),
        include_usage=bool(options and options.include_usage),
        include_timing=bool(request.include_timing),
    )
    _check_cost(job, param)
    return job


def _sampling_params(
    request: GenerationRequest,
    model: ServedModel,
    stops: Sequence[str],
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: str | None,
) -> SamplingParams:
    """The request's wishes, then the model's, then OpenAI's."""
    defaults = msgspec.structs.asdict(model.defaults)
    wished = {name: value if (given := getattr(request, name)) is None else given for name, value in defaults.items()}
    wished["top_k"] = max(0, wished["top_k"])
    return SamplingParams(
        min_tokens=request.min_tokens or 0,
        seed=None if request.seed is None else request.seed % 2**63,
        n=request.n or 1,
        stop=tuple(stops),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=bool(request.ignore_eos),
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        logit_bias=tuple(sorted((request.logit_bias or {}).items())),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
        **wished,
    )


def _check_cost(job: Job, param: str) -> None:
    """Every field may be legal, and the whole still more than one request may ask for."""
    n, num_prompts = job.n, len(job.prompts)
    if not 1 <= num_prompts * n <= MOST_CHOICES:
        raise errors.invalid(
            f"{num_prompts} prompts with n = {n} are {num_prompts * n} choices; 1 to {MOST_CHOICES} are allowed.",
            "n" if n > 1 else param,
        )
    if job.prompt_entries > MOST_ENTRIES:
        raise errors.invalid(
            f"The prompts have {job.prompt_entries} tokens and log-probabilities in all choices together, more than "
            f"{MOST_ENTRIES}. Send less in one request, or lower 'n' or 'prompt_logprobs'.",
            "n" if n > 1 else param,
        )
