"""`/v1/completions`: text goes on, from text or ids, one prompt or many."""

import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmlab.infer.engine_step import TOP
from llmlab.infer.request import CUT, Event, Request
from llmlab.infer.service import Ticket
from llmlab.infer.text_stream import TextStream
from llmlab.serve.door import stack_of
from llmlab.serve.errors import Json
from llmlab.serve.fields import Fields, fields_of
from llmlab.serve.formats import limit_for
from llmlab.serve.limits import Limits
from llmlab.serve.logprobs import Entry, Scores, for_completions
from llmlab.serve.models import Served, chosen, events, limits_of
from llmlab.serve.prompts import ids_of, prompts_of
from llmlab.serve.sampling import SETTINGS, Asked, asked, room_for
from llmlab.serve.sse import event_stream

FIELDS = (*SETTINGS, "prompt", "suffix", "max_tokens", "echo", "logprobs", "best_of", "add_special_tokens")


class _Wanted(NamedTuple):
    """What this endpoint asks beside the settings. samples: of each prompt, of which the best `n` are given."""

    prompts: list[str | list[int]]
    echo: bool
    logprobs: int | None
    samples: int


async def completions(request: HttpRequest) -> Response:
    """The endpoint."""
    fields, limits = await fields_of(request, FIELDS), limits_of(request)
    model = chosen(request, fields)
    settings, wanted = asked(fields, model, limits), _wanted(fields, model, limits)
    bos, tokenizer = fields.flag("add_special_tokens", True), model.opened.tokenizer
    ticket = stack_of(request.scope).enter_context(model.service.admit(len(wanted.prompts) * wanted.samples))
    prompts = await ids_of(wanted.prompts, model, bos=bos)
    limit = await limit_for(fields.get("response_format"), lambda: model.structures((tokenizer.eos_id,)))
    requests = []
    for prompt in prompts:
        most = room_for(fields, "max_tokens", 16, model, len(prompt))
        if not most and wanted.samples > 1:
            raise fields.wrong("n", "max_tokens=0 scores a prompt, which is the same for all samples: ask for 1")
        if not most and not wanted.echo:
            raise fields.wrong("max_tokens", "0 writes nothing: it is for echo=true, which scores a prompt")
        like = Request(
            prompt,
            most,
            settings.sampling,
            stop_ids=() if settings.ignore_eos else (tokenizer.eos_id,),
            top=wanted.logprobs or 0,
            scored=wanted.echo,
        )
        requests.append(like if limit is None else dataclasses.replace(like, limit=limit.fresh()))
    ticket.begin(*requests, n=wanted.samples)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.name,
        "system_fingerprint": f"step-{model.opened.step}",
    }
    pieces, length = _pieces(ticket, model, settings, wanted, limits.seconds), sum(map(len, prompts))
    if settings.stream:
        return event_stream(_chunks(pieces, head, model, settings, wanted, length))
    return Json(head | await _whole(pieces, model, settings, wanted, length))


class _Piece(NamedTuple):
    """What comes of one choice: more text, or its end."""

    choice: int
    text: str
    entries: list[Entry]
    finish: str | None
    tokens: int
    logp: float = 0.0


class _Choice:
    """One text as it is written."""

    def __init__(self, index: int, model: Served, settings: Asked):
        self.index, self.done, self.begun = index, False, False
        self._settings, self._tokenizer = settings, model.opened.tokenizer
        self._text = TextStream(self._tokenizer, settings.stop)
        self._scores, self._length, self._tokens, self._logp = Scores(self._tokenizer), 0, 0, 0.0

    def begin(self, prompt: Sequence[Event]) -> _Piece:
        """What is echoed."""
        self.begun = True
        for event in prompt:
            self._scores.add(event)
        ids = [event.token for event in prompt if event.token is not None]
        text = self._tokenizer.decode_bytes(ids).decode(errors="replace")
        self._length = len(text)
        return _Piece(self.index, text, self._scores.rest(), None, 0)

    def add(self, event: Event) -> _Piece:
        """What one more event makes of it."""
        text = ""
        if event.token is not None:
            self._tokens += 1
            self._logp += event.logp or 0.0
            self._scores.add(event)
            if event.finish != "stop":
                text = self._text.add(event.token)
        if event.finish is not None and not self._text.stopped:
            text += self._text.end()
        self._length += len(text)
        stopped = self._text.stopped
        self.done = stopped or event.finish is not None
        entries = self._scores.rest() if self.done and not stopped else self._scores.upto(self._length)
        finish = None
        if self.done:
            finish = "length" if event.finish in CUT and not stopped else "stop"
        return _Piece(self.index, text, entries, finish, self._tokens, self._logp)


async def _pieces(
    ticket: Ticket, model: Served, settings: Asked, wanted: _Wanted, seconds: float
) -> AsyncIterator[_Piece]:
    """What all choices say, in the order in which it comes."""
    count = len(wanted.prompts) * wanted.samples
    choices = [_Choice(index, model, settings) for index in range(count)]
    echoes: list[list[Event]] = [[] for _ in wanted.prompts]
    async for index, event in events(ticket, seconds):
        choice, echo = choices[index], echoes[index // wanted.samples]
        if event.in_prompt:
            echo.append(event)
            continue
        if choice.done:
            continue
        if wanted.echo and not choice.begun:
            yield choice.begin(echo)
        piece = choice.add(event)
        yield piece
        if choice.done and event.finish is None:
            ticket.drop(index)


async def _chunks(
    pieces: AsyncIterator[_Piece], head: dict[str, Any], model: Served, settings: Asked, wanted: _Wanted, length: int
) -> AsyncIterator[dict[str, Any]]:
    written = 0
    usage: dict[str, Any] = {"usage": None} if settings.usage else {}
    async for piece in pieces:
        written += piece.tokens if piece.finish else 0
        if piece.text or piece.entries or piece.finish:
            yield head | {"choices": [_choice(piece.choice, piece, model, wanted)]} | usage
    if settings.usage:
        yield head | {"choices": [], "usage": usage_of(length, written)}


async def _whole(
    pieces: AsyncIterator[_Piece], model: Served, settings: Asked, wanted: _Wanted, length: int
) -> dict[str, Any]:
    count = len(wanted.prompts) * wanted.samples
    whole = [_Piece(index, "", [], None, 0) for index in range(count)]
    async for piece in pieces:
        before = whole[piece.choice]
        whole[piece.choice] = _Piece(
            *(piece.choice, before.text + piece.text, before.entries + piece.entries),
            *(piece.finish, piece.tokens, piece.logp),
        )
    written = sum(piece.tokens for piece in whole)
    best: list[_Piece] = []
    for begin in range(0, count, wanted.samples):
        group = whole[begin : begin + wanted.samples]
        best += sorted(group, key=lambda piece: -_mean(piece))[: settings.n] if wanted.samples > settings.n else group
    return {
        "choices": [_choice(index, piece, model, wanted) for index, piece in enumerate(best)],
        "usage": usage_of(length, written),
    }


def usage_of(prompt: int, written: int) -> dict[str, int]:
    """What a request took."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _choice(index: int, piece: _Piece, model: Served, wanted: _Wanted) -> dict[str, Any]:
    scores = None if wanted.logprobs is None else for_completions(piece.entries, model.opened.tokenizer)
    return {"index": index, "text": piece.text, "logprobs": scores, "finish_reason": piece.finish}


def _mean(piece: _Piece) -> float:
    """By which the best are chosen: the log-probability of a token written."""
    return piece.logp / piece.tokens if piece.tokens else float("-inf")


def _wanted(fields: Fields, model: Served, limits: Limits) -> _Wanted:
    if "suffix" in fields:
        raise fields.wrong("suffix", "models here write what follows a prompt, not what stands between two")
    n, stream = fields.integer("n", 1, 1, limits.n), fields.flag("stream")
    samples = fields.integer("best_of", n, n, min(limits.n, model.service.capacity))
    if stream and samples > n:
        raise fields.wrong("best_of", "the best can be known at the end only: leave stream out")
    prompts = prompts_of(fields, "prompt", model, limits)
    if len(prompts) * samples > model.service.capacity:
        most = model.service.capacity
        raise fields.wrong("prompt", f"{len(prompts)} prompts of {samples} samples are more than {most}: send fewer")
    logprobs = None
    if fields.get("logprobs") is not None and fields.get("logprobs") is not False:
        logprobs = 1 if fields.get("logprobs") is True else fields.integer("logprobs", 0, 0, TOP)
    return _Wanted(prompts, fields.flag("echo"), logprobs, samples)
