"""A request of the Responses API as a request of the chat API, which is all that the engine's side knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orcaserve.serve import errors
from orcaserve.serve.decode_body import decode_text
from orcaserve.serve.protocol import (
    ChatRequest,
    Function,
    FunctionName,
    JsonSchema,
    Message,
    ResponseFormat,
    Tool,
    ToolChoice,
)
from orcaserve.serve.responses_protocol import FunctionTool, InputItem, InputPart, ResponsesRequest
from orcaserve.serve.tally import Tally

LOGPROBS = "message.output_text.logprobs"  # in a request's `include`
# What chat's fields are called here.
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format.schema",
    "response_format": "text.format",
}
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """Raises ApiError for what chat has no words for."""
    _refuse(request)
    says_logprobs = has_logprobs(request)
    return ChatRequest(
        messages=_messages(request),
        model=request.model,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        seed=request.seed,
        logprobs=says_logprobs,
        top_logprobs=request.top_logprobs if says_logprobs else None,
        tools=[_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or [])],
        tool_choice=_tool_choice(request),
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_response_format(request),
        chat_template_kwargs=request.chat_template_kwargs,
        user=request.user,
        priority=request.priority,
        timeout=request.timeout,
        cache_salt=request.cache_salt,
    )


def has_logprobs(request: ResponsesRequest) -> bool:
    """Whether it asks for log-probabilities."""
    return request.top_logprobs is not None or LOGPROBS in (request.include or ())


def _refuse(request: ResponsesRequest) -> None:
    if request.background:
        raise errors.unsupported("background", "wait for the response, or stream it")
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name) is not None:
            raise errors.unsupported(name, "nothing is stored; send the whole conversation as 'input'")
    if request.prompt is not None:
        raise errors.unsupported("prompt", "there are no stored prompts; send 'instructions' and 'input'")
    if request.tools and has_logprobs(request):
        raise errors.unsupported("include", "log-probabilities go with text alone; leave out 'tools'")


def _messages(request: ResponsesRequest) -> list[Message]:
    messages = [Message("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        return [*messages, Message("user", request.input)]
    tally = Tally()
    turn: Message | None = None  # the assistant's, of which more may come: reasoning, words and calls are one message
    for index, item in enumerate(request.input):
        param = f"input[{index}]"
        match item.type or "message":
            case "message" if item.role != "assistant":
                turn = None
                messages.append(_said(item, param))
            case "function_call_output":
                turn = None
                messages.append(Message("tool", _text(item.output, f"{param}.output"), tool_call_id=item.call_id))
            case "message" | "reasoning" | "function_call" as kind:
                if turn is None or not _goes_on(turn, kind):
                    turn = Message("assistant")
                    messages.append(turn)
                _extend(turn, kind, item, param, tally)
            case other:
                raise errors.invalid(
                    f"'{param}' is of type '{other[:64]}'; this server takes messages, reasoning, and calls of "
                    "functions with their outputs.",
                    f"{param}.type",
                    "unsupported_value",
                )
    return messages


def _said(item: InputItem, param: str) -> Message:
    """A message of anybody but the assistant."""
    if item.role not in ("user", "system", "developer"):
        raise errors.invalid(f"'{param}.role' has to be user, assistant, system or developer.", f"{param}.role")
    return Message("system" if item.role == "developer" else item.role, _text(item.content, f"{param}.content"))


def _goes_on(turn: Message, kind: str) -> bool:
    """Whether this can follow in one message of the assistant: reasoning, then words, then calls."""
    if kind == "function_call":
        return True
    return turn.tool_calls is None and turn.content is None and (kind == "message" or turn.reasoning_content is None)


def _extend(turn: Message, kind: str, item: InputItem, param: str, tally: Tally) -> None:
    if kind == "message":
        turn.content = _text(item.content, f"{param}.content")
    elif kind == "reasoning":
        given = item.content or item.summary or ""
        turn.reasoning_content = _text(given, f"{param}.{'content' if item.content else 'summary'}")
    else:
        for name in ("call_id", "name", "arguments"):
            if getattr(item, name) is None:
                raise errors.invalid(f"'{param}.{name}' is required.", f"{param}.{name}", "missing_required_parameter")
        try:
            decode_text(item.arguments or "", tally)
        except ValueError:
            raise errors.invalid(f"'{param}.arguments' is not valid JSON.", f"{param}.arguments") from None
        function = {"name": item.name, "arguments": item.arguments}
        call: dict[str, Any] = {"id": item.call_id, "type": "function", "function": function}
        turn.tool_calls = [*(turn.tool_calls or []), call]


def _text(content: str | Sequence[InputPart] | None, param: str) -> str:
    if content is None:
        raise errors.invalid(f"'{param}' is required.", param, "missing_required_parameter")
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in (*_TEXTS, "refusal") or text is None:
            param = f"{param}[{index}]"
            raise errors.invalid(f"'{param}' is not a text part; this server reads text only.", param)
        texts.append(text)
    return "\n".join(texts)


def _tool(tool: FunctionTool, param: str) -> Tool:
    if tool.type != "function":
        raise errors.invalid(
            f"'{param}' is of type '{tool.type[:64]}'; this server has functions only.", param, "unsupported_value"
        )
    if not tool.name:
        raise errors.invalid(f"'{param}.name' is required.", f"{param}.name", "missing_required_parameter")
    return Tool(
        function=Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    )


def _tool_choice(request: ResponsesRequest) -> Any:
    choice = request.tool_choice
    if choice is None or isinstance(choice, str):
        return choice
    if choice.type != "function" or not choice.name:
        raise errors.invalid(
            "'tool_choice' is 'none', 'auto', 'required', or a function by its name.", "tool_choice", "invalid_value"
        )
    return ToolChoice(function=FunctionName(choice.name))


def _response_format(request: ResponsesRequest) -> ResponseFormat | None:
    of = request.text.format if request.text is not None else None
    if of is None:
        return None
    schema = None
    if of.type == "json_schema":
        if of.json_schema is None:
            name = "text.format.schema"
            raise errors.invalid(f"'{name}' is required.", name, "missing_required_parameter")
        schema = JsonSchema(json_schema=of.json_schema, name=of.name, description=of.description, strict=of.strict)
    return ResponseFormat(type=of.type, json_schema=schema)
