"""POST /v1/responses: a chat's pieces as the items of a response, and as the events of how they come to be."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from orcaserve.core.request import TokenLogprobs
from orcaserve.serve.choice import Piece
from orcaserve.serve.errors import ApiError
from orcaserve.serve.generate import Generation
from orcaserve.serve.job import Job
from orcaserve.serve.logprobs import chat_logprobs
from orcaserve.serve.protocol import TokenLogprob, Usage
from orcaserve.serve.reply import THINK, THOUGHT, Call, Part, Thought
from orcaserve.serve.responses_protocol import (
    EventType,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ReasoningConfig,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    TextConfig,
    TextFormat,
)
from orcaserve.serve.sse import Named
from orcaserve.serve.tokenizer import Tokenizer

_encode = msgspec.json.Encoder().encode


class ResponsesWriter:
    """Turns the pieces of one job into items. Owner of the response as it stands, and of the events' numbers."""

    def __init__(self, request: ResponsesRequest, job: Job, tokenizer: Tokenizer, id: str, model: str) -> None:
        """id: of the response, without "resp_"."""
        self._request = request
        self._job = job
        self._id = id
        self._model = model
        self._created = int(time.time())
        self._token_bytes = tokenizer.token_bytes
        self._reply = job.reply()
        self._thought = ThoughtTokens(tokenizer, job)
        self._items: list[OutputItem] = []
        self._text: list[str] = []  # of the last item, if it is open
        self._is_open = False
        self._entries: list[TokenLogprobs] = []  # that no event has told yet, and those that one has
        self._told: list[TokenLogprob] = []
        self._number = 0
        self._is_cut = False

    async def whole(self, generation: Generation) -> bytes:
        """The response's JSON."""
        async for _, piece in generation:
            self._take(piece)
        return _encode(self._finished(generation.usage))

    async def chunks(self, generation: Generation) -> AsyncGenerator[Named]:
        """Its events. What fails after the first of them is told by the last one."""
        async with generation:
            try:
                async for _, piece in generation:
                    if self._number == 0:
                        yield self._named(self._event("response.created", response=self._response("in_progress")))
                        yield self._named(self._event("response.in_progress", response=self._response("in_progress")))
                    for event in self._take(piece):
                        yield self._named(event)
            except ApiError as error:
                if self._number == 0:
                    raise
                response = self._response("failed")
                response.error = ResponseError("server_error", error.body.error.message)
                yield self._named(self._event("response.failed", response=response))
                return
            response = self._finished(generation.usage)
            end: EventType = "response.incomplete" if self._is_cut else "response.completed"
            yield self._named(self._event(end, response=response))

    # -- items ---------------------------------------------------------------------------------------------------

    def _take(self, piece: Piece) -> list[ResponseEvent]:
        """What a piece adds to the items, as events."""
        parts = self._reply.feed(piece.text)
        self._thought.take(piece.token_ids)
        if self._job.logprobs is not None:
            self._entries += piece.logprobs
        events: list[ResponseEvent] = []
        if piece.finish_reason is not None:
            parts += self._reply.finish()
            self._is_cut = piece.finish_reason == "length"
        for part in parts:
            events += self._add(part)
        if piece.finish_reason is not None:
            events += self._close("incomplete" if self._is_cut else "completed")
        return events

    def _add(self, part: Part) -> list[ResponseEvent]:
        if isinstance(part, Call):
            return [*self._close("completed"), *self._call(part)]
        events = []
        kind = ReasoningItem if isinstance(part, Thought) else OutputMessage
        if not self._is_open or not isinstance(self._items[-1], kind):
            events += [*self._close("completed"), *self._begin(kind)]
        text = part.text if isinstance(part, Thought) else part
        self._text.append(text)
        if isinstance(part, Thought):
            return [*events, self._of_part("response.reasoning_text.delta", delta=text)]
        return [*events, self._of_part("response.output_text.delta", delta=text, logprobs=self._logprobs())]

    def _begin(self, kind: type[ReasoningItem] | type[OutputMessage]) -> list[ResponseEvent]:
        self._is_open = True
        part: OutputText | ReasoningText
        if kind is ReasoningItem:
            part = ReasoningText(text="")
            self._items.append(ReasoningItem(id=self._item_id("rs"), status="in_progress", summary=[], content=[]))
        else:
            part = OutputText(text="", annotations=[], logprobs=[])
            self._items.append(OutputMessage(id=self._item_id("msg"), status="in_progress", content=[]))
        return [self._of_item("response.output_item.added"), self._of_part("response.content_part.added", part=part)]

    def _close(self, status: ItemStatus) -> list[ResponseEvent]:
        """Ends the item that is open, if one is."""
        if not self._is_open:
            return []
        self._is_open = False
        item, text = self._items[-1], "".join(self._text)
        self._text = []
        item.status = status
        if isinstance(item, ReasoningItem):
            thought = ReasoningText(text=text)
            item.content = [thought]
            events = [
                self._of_part("response.reasoning_text.done", text=text),
                self._of_part("response.content_part.done", part=thought),
            ]
        elif isinstance(item, OutputMessage):
            self._logprobs()
            logprobs = list(self._told)
            said = OutputText(text=text, annotations=[], logprobs=logprobs)
            item.content = [said]
            events = [
                self._of_part("response.output_text.done", text=text, logprobs=logprobs),
                self._of_part("response.content_part.done", part=said),
            ]
        else:
            events = []
        return [*events, self._of_item("response.output_item.done")]

    def _call(self, call: Call) -> list[ResponseEvent]:
        """A call, which is told when it is complete."""
        item = FunctionCallItem(
            id=self._item_id("fc"),
            status="in_progress",
            call_id=f"call_{secrets.token_hex(12)}",
            name=call.name,
            arguments="",
        )
        self._items.append(item)
        events = [
            self._of_item("response.output_item.added"),
            self._event(
                "response.function_call_arguments.delta",
                output_index=len(self._items) - 1,
                item_id=item.id,
                delta=call.arguments,
            ),
            self._event(
                "response.function_call_arguments.done",
                output_index=len(self._items) - 1,
                item_id=item.id,
                name=call.name,
                arguments=call.arguments,
            ),
        ]
        item.arguments, item.status = call.arguments, "completed"
        return [*events, self._of_item("response.output_item.done")]

    # -- the response --------------------------------------------------------------------------------------------

    def _finished(self, usage: Usage) -> ResponseObject:
        response = self._response("incomplete" if self._is_cut else "completed")
        if self._is_cut:
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        response.usage = ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(self._thought.count),
            usage.total_tokens,
        )
        return response

    def _response(self, status: str) -> ResponseObject:
        """As it stands."""
        request, params = self._request, self._job.prompts[0].params
        text = request.text or TextConfig()
        return ResponseObject(
            id=f"resp_{self._id}",
            created_at=self._created,
            status=status,  # type: ignore[arg-type]
            model=self._model,
            output=list(self._items),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_logprobs=request.top_logprobs or 0,
            tools=request.tools or [],
            tool_choice=request.tool_choice or "auto",
            parallel_tool_calls=request.parallel_tool_calls is not False,
            text=TextConfig(format=text.format or TextFormat(type="text"), verbosity=text.verbosity),
            reasoning=request.reasoning or ReasoningConfig(),
            truncation=request.truncation or "disabled",
            metadata=request.metadata or {},
            user=request.user,
        )

    def _item_id(self, kind: str) -> str:
        return f"{kind}_{self._id}_{len(self._items)}"

    def _logprobs(self) -> list[TokenLogprob]:
        """Of the tokens since these were asked for last. All belong to the message: beside tools there are none."""
        if self._job.logprobs is None:
            return []
        entries, self._entries = self._entries, []
        new = chat_logprobs(entries, self._job.logprobs, self._token_bytes).content
        self._told += new
        return new

    # -- events --------------------------------------------------------------------------------------------------

    def _event(self, type: EventType, **fields: object) -> ResponseEvent:
        self._number += 1
        return ResponseEvent(type=type, sequence_number=self._number - 1, **fields)  # type: ignore[arg-type]

    def _of_item(self, type: EventType) -> ResponseEvent:
        """About the last item, as it stands."""
        return self._event(type, output_index=len(self._items) - 1, item=msgspec.structs.replace(self._items[-1]))

    def _of_part(self, type: EventType, **fields: object) -> ResponseEvent:
        """About the only part of the last item."""
        place = {"output_index": len(self._items) - 1, "item_id": self._items[-1].id, "content_index": 0}
        return self._event(type, **place, **fields)

    @staticmethod
    def _named(event: ResponseEvent) -> Named:
        return Named(event.type, _encode(event))


class ThoughtTokens:
    """Counts the tokens of a response's reasoning, its marks included: the same number however the tokens come.

    Owner of the text that is not yet known to be reasoning or something else.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job) -> None:
        self.count = 0
        self._token_bytes: Callable[[int], bytes] = tokenizer.token_bytes
        self._text_bytes = tokenizer.text_bytes if job.skip_special_tokens else tokenizer.token_bytes
        self._kept = job.kept
        self._place = "thought" if job.is_thinking else "begin" if job.thinks else "over"
        self._held = b""
        self._num_held = 0  # tokens at the beginning that may turn out to be its mark

    def take(self, ids: Sequence[int]) -> None:
        for id in ids:
            if self._place == "over":
                return
            self._held += self._token_bytes(id) if id in self._kept else self._text_bytes(id)
            if self._place == "begin":
                self._begin()
            else:
                self.count += 1
            if self._place == "thought":
                if THOUGHT.encode() in self._held:
                    self._place = "over"
                self._held = self._held[1 - len(THOUGHT) :]

    def _begin(self) -> None:
        self._num_held += 1
        seen, mark = self._held.lstrip(), THINK.encode()
        if seen.startswith(mark):
            self._place, self.count = "thought", self._num_held
        elif not mark.startswith(seen):
            self._place = "over"
