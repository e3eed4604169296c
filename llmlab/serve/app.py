"""The app: every endpoint of the server, over models that are open already."""

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from llmlab.core.errors import LlmlabError
from llmlab.data.rows import BadRowError
from llmlab.infer.choose import Judge
from llmlab.infer.service import Closing, Failed, Overloaded
from llmlab.serve.chat import chat
from llmlab.serve.completions import completions
from llmlab.serve.door import Door
from llmlab.serve.embeddings import embeddings
from llmlab.serve.errors import ApiError, Json, response
from llmlab.serve.fields import fields_of
from llmlab.serve.limits import Limits
from llmlab.serve.metrics import metrics
from llmlab.serve.models import Served
from llmlab.serve.page import page
from llmlab.serve.preferences import preferences
from llmlab.serve.tokens import detokenize, tokenize, tokenizer_info
from llmlab.serve.tools import own_tools, run_tool

_FORESEEN = (ApiError, BadRowError, LlmlabError, Overloaded, Closing, Failed, RecursionError)


def make_app(
    models: Mapping[str, Served],
    *,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = (),
    limits: Limits = Limits(),
    judge: Judge | None = None,
) -> Starlette:
    """The app. Its lifespan's end finishes what was admitted.

    Args:
      models: by name; the first is taken where a request names none.
      keys: one of which every request must have, but for the page and its health; none: no key is asked for.
      hosts: names beside the loopback's under which the server may be called; none: any.
      judge: what chooses among answers, of whichever model; None: only how many of them agree.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        for model in models.values():
            await model.service.close()

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/health", _health),
            Route("/metrics", metrics),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/tokenizer_info", tokenizer_info),
            Route("/tools", _tools),
            Route("/tools/{name}", _tool, methods=["POST"]),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/embeddings", embeddings, methods=["POST"]),
            Route("/v1/preferences", preferences, methods=["POST"]),
        ],
        middleware=[Middleware(Door, keys=keys, limits=limits, hosts=hosts)],
        exception_handlers={HTTPException: _no_such, Exception: _error} | dict.fromkeys(_FORESEEN, _error),
        lifespan=lifespan,
    )
    app.state.models, app.state.limits, app.state.judge = dict(models), limits, judge
    return app


async def _health(request: HttpRequest) -> Response:
    errors = [model.service.error for model in request.app.state.models.values()]
    if any(error is not None for error in errors):
        return Json({"status": "stopped on an error"}, 503)
    return Json({"status": "ok"})


async def _models(request: HttpRequest) -> Response:
    return Json({"object": "list", "data": [_listed(model) for model in request.app.state.models.values()]})


async def _model(request: HttpRequest) -> Response:
    name = request.path_params["name"]
    if name not in request.app.state.models:
        raise ApiError(404, f"there is no model {name[:100]!r}", param="model", code="model_not_found")
    return Json(_listed(request.app.state.models[name]))


def _listed(model: Served) -> dict[str, object]:
    listed: dict[str, object] = {"id": model.name, "object": "model", "created": model.created, "owned_by": "llmlab"}
    listed |= {"max_model_len": model.reach, "step": model.opened.step}
    return listed | {"chat": model.template is not None, "index": model.find is not None}


async def _tools(request: HttpRequest) -> Response:
    return Json({"object": "list", "data": own_tools()})


async def _tool(request: HttpRequest) -> Response:
    fields = await fields_of(request, ("arguments",))
    return Json({"content": run_tool(request.path_params["name"], fields.text("arguments"))})


async def _no_such(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    why = "only by another method" if error.status_code == 405 else "nothing"
    return response(ApiError(error.status_code, f"there is {why} at {request.url.path[:100]}"))


async def _error(request: HttpRequest, error: Exception) -> Response:
    return response(error)
