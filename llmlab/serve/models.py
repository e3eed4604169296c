"""The models that are served, by name, and a request's wait for what they write."""

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import NamedTuple

from starlette.requests import Request as HttpRequest

from llmlab.core.errors import UserError, nearest
from llmlab.data.chat import ChatTemplate, template_for
from llmlab.infer.embed import Embedder
from llmlab.infer.request import Event
from llmlab.infer.retrieval import Found
from llmlab.infer.service import Service, Ticket
from llmlab.infer.structured import Structures
from llmlab.infer.thinking import Thinking
from llmlab.serve.errors import ApiError
from llmlab.serve.fields import Fields
from llmlab.serve.limits import Limits
from llmlab.workdir.open import Opened

Find = Callable[[str], list[Found]]


class Served(NamedTuple):
    """One model. template: None where its tokenizer has none: it completes, and does not chat.

    preferences: the file that votes on its answers are appended to. structures, thinking: what limits answers that end
    with these ids to a form, and their thinking to a budget. find: what gives passages to a question; None where there
    is no index.
    """

    name: str
    opened: Opened
    service: Service
    template: ChatTemplate | None
    preferences: str
    created: int
    longest_token: int
    embedder: Embedder
    structures: Callable[[tuple[int, ...]], Structures]
    thinking: Callable[[tuple[int, ...]], Thinking]
    find: Find | None

    @property
    def reach(self) -> int:
        """The positions of the model."""
        return self.opened.model.config.max_positions


def served(name: str, opened: Opened, service: Service, preferences: str, find: Find | None = None) -> Served:
    """A model under this name."""
    try:
        template = template_for(opened.tokenizer)
    except UserError:
        template = None
    longest = max(1, int(opened.tokenizer.token_bytes().max()))
    embedder = Embedder(opened.model, opened.params, opened.tokenizer)
    vocab_size = opened.model.config.vocab_size
    structures = functools.cache(lambda stop_ids: Structures(opened.tokenizer, vocab_size, stop_ids))
    thinking = functools.cache(lambda stop_ids: Thinking(opened.tokenizer, vocab_size, stop_ids))
    created = int(time.time())
    parts = (preferences, created, longest, embedder, structures, thinking, find)
    return Served(name, opened, service, template, *parts)


def chosen(request: HttpRequest, fields: Fields) -> Served:
    """The model that a request names, or the first."""
    models: Mapping[str, Served] = request.app.state.models
    name = fields.text("model", next(iter(models)))
    if name not in models:
        message = f"there is no model {name[:100]!r}: {nearest(name[:100], models)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return models[name]


def limits_of(request: HttpRequest) -> Limits:
    """What one request may ask for."""
    return request.app.state.limits


async def events(ticket: Ticket, seconds: float) -> AsyncIterator[tuple[int, Event]]:
    """What comes of a ticket, for so many seconds."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                came = await anext(ticket)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise too_long(seconds) from None
        yield came


def too_long(seconds: float) -> ApiError:
    """The error that a request took more than its time."""
    message = f"the request took longer than {seconds:g} s: ask for fewer tokens, or fewer samples"
    return ApiError(400, message, code="time_limit")
