"""`/v1/chat/completions`: the next turn of a conversation."""

import asyncio
import bisect
import dataclasses
import functools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmlab.data.chat import ChatTemplate, Conversation, Message, Piece, prompt_of
from llmlab.data.rows import conversation
from llmlab.infer.choose import Judge
from llmlab.infer.engine_step import TOP
from llmlab.infer.request import CUT, Event, Request
from llmlab.infer.retrieval import Found, asked_with
from llmlab.infer.service import Ticket
from llmlab.infer.spoken import Spoken
from llmlab.infer.text_stream import Stops
from llmlab.serve.best import Answer, choosing, ranked
from llmlab.serve.completions import usage_of
from llmlab.serve.door import stack_of
from llmlab.serve.embeddings import vectors
from llmlab.serve.errors import ApiError, Json
from llmlab.serve.fields import Fields, fields_of
from llmlab.serve.formats import call_limit, limit_for
from llmlab.serve.limits import Limits
from llmlab.serve.logprobs import Entry, Scores, for_chat
from llmlab.serve.models import Served, chosen, events, limits_of, too_long
from llmlab.serve.prompts import reading
from llmlab.serve.sampling import SETTINGS, Asked, asked, room_for
from llmlab.serve.sse import event_stream
from llmlab.serve.thinking import LEAST, MOST, budget_for
from llmlab.serve.tools import Declared, Offer, as_json, as_said, offered

FIELDS = (
    *(*SETTINGS, "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"),
    *("tools", "tool_choice", "truncation", "passages", "best_of", "choose", LEAST, MOST),
)


async def chat(request: HttpRequest) -> Response:
    """The endpoint."""
    fields, limits = await fields_of(request, FIELDS), limits_of(request)
    model = chosen(request, fields)
    settings, offer = asked(fields, model, limits), offered(fields)
    judge: Judge | None = request.app.state.judge
    wanted = choosing(fields, settings, min(limits.n, model.service.capacity), judge)
    template = template_of(model)
    # First a place, and then the work: what is read at once is bounded by it.
    ticket = stack_of(request.scope).enter_context(model.service.admit(wanted.samples))
    turns = await reading(turns_of, fields, limits)
    if offer.tools:
        template = template.with_tools(offer.entries())
    beside: dict[str, Any] = {}
    if fields.flag("passages"):
        turns, found = await _with_passages(fields, model, template, turns)
        beside["passages"] = [{"source": each.passage.source, "text": each.passage.text} for each in found]
    prompt, most = await _prompt(fields, model, template, turns, offer)
    sampling, form = settings.sampling, template.call_form(prompt)
    if fields.get("tool_choice") == "none" and form and isinstance(form.before[0], int):
        sampling = dataclasses.replace(sampling, bias=dict(sampling.bias) | {form.before[0]: -100.0})
    want_scores = fields.flag("logprobs")
    if "top_logprobs" in fields and not want_scores:
        raise fields.wrong("top_logprobs", "it needs logprobs=true")
    if offer.forced and "response_format" in fields:
        raise fields.wrong(
            "tool_choice", "an answer that has to be a call has no other form: leave out response_format"
        )
    structures = functools.partial(model.structures, template.stop_ids)
    if form and form.thinking and (LEAST in fields or MOST in fields):
        # The budget ends the thinking with its marker, and the call begins with what follows that.
        form = form._replace(thinking=(), before=(*form.thinking[1:], *form.before))
    limit = await call_limit(form, offer.forms(template), structures)
    limit = limit or await limit_for(fields.get("response_format"), structures)
    like = Request(
        tuple(prompt),
        most,
        sampling,
        stop_ids=() if settings.ignore_eos else template.stop_ids,
        top=fields.integer("top_logprobs", 0, 0, TOP),
        limit=await budget_for(fields, model, template.stop_ids, prompt, most, limit),
    )
    ticket.begin(like, n=wanted.samples)
    head = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": f"step-{model.opened.step}",
    }
    choices = [
        _Choice(index, model, Spoken(template, prompt), settings, offer.tools, want_scores)
        for index in range(wanted.samples)
    ]
    pieces = _pieces(ticket, choices, limits.seconds)
    if settings.stream:
        return event_stream(_chunks(pieces, head, beside, model, settings, len(prompt), want_scores))
    try:
        async with asyncio.timeout(limits.seconds):
            given, written = await _whole(pieces, model, wanted.samples, want_scores)
            if wanted.by:
                answers = [choice.answer(one) for choice, one in zip(choices, given, strict=True)]
                order = await ranked(answers, turns, wanted.by, judge)
                given = [given[place] | why for place, why in order[: settings.n]]
    except TimeoutError:
        raise too_long(limits.seconds) from None
    numbered = [{"index": index} | one for index, one in enumerate(given)]
    usage = usage_of(len(prompt), written)
    return Json(head | beside | {"object": "chat.completion", "choices": numbered, "usage": usage})


def template_of(model: Served) -> ChatTemplate:
    """How this model spells conversations.

    Raises:
      ApiError: it has no way to.
    """
    if model.template is None:
        message = f"the model {model.name!r} has no chat template: use /v1/completions"
        raise ApiError(400, message, param="model", code="no_chat_template")
    return model.template


class _Piece(NamedTuple):
    """What comes of one choice: `delta` as the stream has it, or the end."""

    choice: int
    delta: dict[str, Any]
    entries: list[Entry]
    finish: str | None
    tokens: int


class _Choice:
    """One answer as it is said."""

    def __init__(
        self,
        index: int,
        model: Served,
        spoken: Spoken,
        settings: Asked,
        tools: Sequence[Declared],
        want_scores: bool,
    ):
        self.index, self.done, self._tools = index, False, tools
        self._tokenizer = model.opened.tokenizer
        self._spoken, self._stops = spoken, Stops(settings.stop)
        self._scores = Scores(self._tokenizer) if want_scores else None
        self._length = self._tokens = self._calls = 0

    def add(self, event: Event) -> list[_Piece]:
        """What one more event makes of it."""
        said = list[Piece]()
        if event.token is not None:
            self._tokens += 1
            if self._scores and event.finish != "stop" and self._tokenizer.decode_bytes([event.token]):
                self._scores.add(event)
            said = self._spoken.add(event.token)
        if event.finish is not None:
            said += self._spoken.end()
        pieces = []
        for piece in said:
            if self._stops.stopped:
                break
            if piece.call:
                delta = {"index": self._calls} | as_json(piece.call, self._tools)
                self._calls += 1
                pieces.append(self._piece({"tool_calls": [delta]}))
            elif piece.kind == "thinking":
                pieces.append(self._piece({"reasoning_content": piece.text}))
            else:
                pieces += self._text(self._stops.add(piece.text))
        stopped = self._stops.stopped
        if event.finish is not None and not stopped:
            pieces += self._text(self._stops.end())
        self.done = stopped or event.finish is not None
        if self.done:
            finish = "length" if event.finish in CUT and not stopped else "tool_calls" if self._calls else "stop"
            pieces.append(_Piece(self.index, {}, [], finish, self._tokens))
        return pieces

    def answer(self, given: dict[str, Any]) -> Answer:
        """As a judge takes it, of the choice that a client is given."""
        calls = self._spoken.message.calls[: self._calls]
        said, thought = given["message"]["content"] or "", given["message"].get("reasoning_content", "")
        message = Message("assistant", said, thinking=thought, calls=calls)
        return Answer(message, cut=given["finish_reason"] == "length")

    def _text(self, text: str) -> list[_Piece]:
        self._length += len(text)
        entries = self._scores.upto(self._length) if self._scores else []
        return [_Piece(self.index, {"content": text}, entries, None, self._tokens)] if text else []

    def _piece(self, delta: dict[str, Any]) -> _Piece:
        """What is no text, and whose tokens are not reported."""
        if self._scores:
            self._scores.restart(self._length)
        return _Piece(self.index, delta, [], None, self._tokens)


async def _pieces(ticket: Ticket, choices: Sequence[_Choice], seconds: float) -> AsyncIterator[_Piece]:
    async for index, event in events(ticket, seconds):
        choice = choices[index]
        if choice.done:
            continue
        for piece in choice.add(event):
            yield piece
        if choice.done and event.finish is None:
            ticket.drop(index)


async def _chunks(
    pieces: AsyncIterator[_Piece],
    head: dict[str, Any],
    beside: dict[str, Any],
    model: Served,
    settings: Asked,
    prompt: int,
    want_scores: bool,
) -> AsyncIterator[dict[str, Any]]:
    """beside: what comes once, with the first of them."""
    head = head | {"object": "chat.completion.chunk"}
    usage: dict[str, Any] = {"usage": None} if settings.usage else {}
    for index in range(settings.n):
        role = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        yield head | {"choices": [role]} | usage | (beside if index == 0 else {})
    written = 0
    async for piece in pieces:
        written += piece.tokens if piece.finish else 0
        scores = {"content": for_chat(piece.entries, model.opened.tokenizer), "refusal": None} if want_scores else None
        choice = {"index": piece.choice, "delta": piece.delta, "logprobs": scores, "finish_reason": piece.finish}
        yield head | {"choices": [choice]} | usage
    if settings.usage:
        yield head | {"choices": [], "usage": usage_of(prompt, written)}


async def _whole(
    pieces: AsyncIterator[_Piece], model: Served, samples: int, want_scores: bool
) -> tuple[list[dict[str, Any]], int]:
    """Every choice but for its index, and how many tokens were written."""
    texts = [{"content": "", "reasoning_content": ""} for _ in range(samples)]
    calls: list[list[Any]] = [[] for _ in range(samples)]
    entries: list[list[Entry]] = [[] for _ in range(samples)]
    ends: list[tuple[str | None, int]] = [(None, 0)] * samples
    async for piece in pieces:
        for name, value in piece.delta.items():
            if name == "tool_calls":
                calls[piece.choice] += [{k: v for k, v in call.items() if k != "index"} for call in value]
            else:
                texts[piece.choice][name] += value
        entries[piece.choice] += piece.entries
        ends[piece.choice] = piece.finish, piece.tokens
    choices = []
    for index in range(samples):
        message: dict[str, Any] = {"role": "assistant", "content": texts[index]["content"], "refusal": None}
        if texts[index]["reasoning_content"]:
            message["reasoning_content"] = texts[index]["reasoning_content"]
        if calls[index]:
            message |= {"tool_calls": calls[index], "content": message["content"] or None}
        scores = None
        if want_scores:
            scores = {"content": for_chat(entries[index], model.opened.tokenizer), "refusal": None}
        choices.append({"message": message, "logprobs": scores, "finish_reason": ends[index][0]})
    return choices, sum(tokens for _, tokens in ends)


def turns_of(fields: Fields, limits: Limits) -> Conversation:
    """The messages of a request, as the model has said its own."""
    given = fields.get("messages")
    if isinstance(given, list) and len(given) > limits.turns:
        why = f"{len(given):,} turns are more than {limits.turns:,}: leave the earliest out"
        raise fields.wrong("messages", why, code="context_length_exceeded")
    return conversation(as_said(given))


async def _with_passages(
    fields: Fields, model: Served, template: ChatTemplate, turns: Conversation
) -> tuple[Conversation, list[Found]]:
    """The conversation, and the passages that now stand before its last question: as many as there is room for."""
    if model.find is None:
        raise fields.wrong("passages", "there is no index here: llmlab serve --index=DIR serves with one")
    questions = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if not questions:
        raise fields.wrong("passages", "there is no turn of the user's to find any for")
    before, question, after = turns[: questions[-1]], turns[questions[-1]].content, turns[questions[-1] + 1 :]
    if len(question) > model.reach * model.longest_token:  # for which there is no room in any case
        return turns, []
    found = await vectors(model.find, question)
    # What comes before may be left out where that is asked for.
    kept = [turn for turn in before if turn.role == "system" or fields.get("truncation") != "middle"]
    room = model.reach - _answer_room(fields, model)

    def fitting() -> list[Found]:
        fits = found
        while fits and len(prompt_of(template, (*kept, asked_with(fits, question), *after))) > room:
            fits = fits[:-1]
        return fits

    found = await reading(fitting)
    return (*before, asked_with(found, question), *after), found


def _limit_name(fields: Fields) -> str:
    return "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"


def _answer_room(fields: Fields, model: Served) -> int:
    """The positions that are kept for the answer."""
    return fields.integer(_limit_name(fields), max(1, model.reach // 4), 1, model.reach)


async def _prompt(
    fields: Fields, model: Served, template: ChatTemplate, turns: Conversation, offer: Offer
) -> tuple[list[int], int]:
    """The ids of the conversation with an answer opened, and how many tokens that may have."""
    name = _limit_name(fields)
    truncation = fields.choice("truncation", "none", ("none", "middle"))
    size = sum(len(turn.content) for turn in turns) + sum(len(str(tool)) for tool in offer.tools)
    if truncation == "none" and size > model.reach * model.longest_token:
        why = f"{size:,} characters are more than the model's {model.reach:,} positions hold: shorten them"
        raise fields.wrong("messages", why, code="context_length_exceeded")
    if truncation == "middle":
        room = model.reach - _answer_room(fields, model)
        prompt = await reading(trimmed, template, turns, room)
        if not prompt:
            why = f"the last turn alone leaves no room in the model's {model.reach:,} positions: shorten it"
            raise fields.wrong("messages", why, code="context_length_exceeded")
    else:
        prompt = await reading(lambda: prompt_of(template, turns))
        if len(prompt) >= model.reach:
            why = f"{len(prompt):,} tokens fill the model's {model.reach:,} positions: shorten them, or set truncation"
            raise fields.wrong("messages", f"{why} to middle", code="context_length_exceeded")
    most = room_for(fields, name, model.reach - len(prompt), model, len(prompt))
    if not most:
        raise fields.wrong(name, "0 writes nothing: ask for at least 1")
    return prompt, most


def trimmed(template: ChatTemplate, turns: Sequence[Message], room: int) -> list[int]:
    """The ids of as much of a conversation as `room` holds, with an answer opened; none where it is too little.

    What goes first are the exchanges after the first question and its answer, earliest first, then that one; never a
    turn of the system, nor the last question and what follows it.
    """
    system = [turn for turn in turns if turn.role == "system"]
    spoken = [turn for turn in turns if turn.role != "system"]
    questions = [place for place, turn in enumerate(spoken) if turn.role == "user"] or [0]
    first = spoken[: questions[1]] if len(questions) > 1 else []
    # Where what comes after the first exchange may begin; last of all, the last question alone.
    begins = [None, *questions[2:], None]

    @functools.cache
    def ids(place: int) -> list[int]:
        begin = begins[place]
        shorter = spoken[questions[-1] :] if begin is None else [*first, *spoken[begin:]]
        return prompt_of(template, turns if place == 0 else (*system, *shorter))

    def fits(place: int) -> bool:
        return len(ids(place)) <= room

    # From the shortest on, each twice as long as the one before: what is far too long is never put together.
    most = len(begins)
    back = next(2**power for power in range(most.bit_length() + 1) if 2**power > most or not fits(most - 2**power))
    place = bisect.bisect_left(range(most), True, max(0, most - back), most - back // 2, key=fits)
    return ids(place) if place < most else []
