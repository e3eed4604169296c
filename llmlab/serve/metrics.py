"""`/metrics`: what the server does, in Prometheus' text format."""

from collections.abc import Iterable, Iterator

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from llmlab.infer.service import Histogram
from llmlab.serve.models import Served

_Value = tuple[str, float]  # labels, and how much


async def metrics(request: HttpRequest) -> Response:
    """The endpoint."""
    text = "\n".join(_lines(list(request.app.state.models.values())))
    return PlainTextResponse(f"{text}\n", media_type="text/plain; version=0.0.4")


def _lines(models: list[Served]) -> Iterator[str]:
    def each(name: str) -> list[_Value]:
        return [(_labels(model), model.service.load[name]) for model in models]

    yield from _family("running", "gauge", "Requests that have a slot.", each("running"))
    yield from _family("waiting", "gauge", "Requests that wait for a slot.", each("waiting"))
    yield from _family("pages_used", "gauge", "Pages of the cache in use.", each("pages_used"))
    yield from _family("pages", "gauge", "Pages of the cache.", each("pages"))
    counts = [(_labels(m), m.service.metrics) for m in models]
    prompt = [(labels, m.prompt_tokens) for labels, m in counts]
    yield from _family("prompt_tokens_total", "counter", "Tokens of prompts.", prompt)
    yield from _family("tokens_total", "counter", "Tokens written.", [(labels, m.tokens) for labels, m in counts])
    refused = [(labels, m.refused) for labels, m in counts]
    yield from _family("refused_total", "counter", "Requests refused, as the queue was full.", refused)
    ends = [
        (_labels(model, finish=finish), count)
        for model in models
        for finish, count in sorted(model.service.metrics.finished.items())
    ]
    yield from _family("finished_total", "counter", "Requests that have ended, by how.", ends)
    for name, help, of in (
        ("first_token_seconds", "From a request to its first token.", lambda m: m.service.metrics.first_seconds),
        ("between_tokens_seconds", "From a token to the next.", lambda m: m.service.metrics.between_seconds),
    ):
        yield from _head(name, "histogram", help)
        for model in models:
            yield from _histogram(name, model, of(model))


def _family(name: str, kind: str, help: str, values: Iterable[_Value]) -> Iterator[str]:
    yield from _head(name, kind, help)
    yield from (f"llmlab_{name}{{{labels}}} {value}" for labels, value in values)


def _histogram(name: str, model: Served, histogram: Histogram) -> Iterator[str]:
    total = 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        yield f"llmlab_{name}_bucket{{{_labels(model, le=bound)}}} {total}"
    yield f"llmlab_{name}_sum{{{_labels(model)}}} {histogram.sum}"
    yield f"llmlab_{name}_count{{{_labels(model)}}} {total}"


def _head(name: str, kind: str, help: str) -> Iterator[str]:
    yield f"# HELP llmlab_{name} {help}"
    yield f"# TYPE llmlab_{name} {kind}"


def _labels(model: Served, **more: str) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in {"model": model.name, **more}.items())


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
