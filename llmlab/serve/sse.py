"""Answers that come piece by piece, as server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from llmlab.serve.errors import api_error


def event_stream(chunks: AsyncIterator[dict[str, Any]]) -> StreamingResponse:
    """Each chunk as an event, then `[DONE]`. An error on the way is an event too, as the status is long sent."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_lines(chunks), media_type="text/event-stream", headers=headers)


async def _lines(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    try:
        async for chunk in chunks:
            yield _line(chunk)
    except Exception as error:
        yield _line(api_error(error).body())
    yield "data: [DONE]\n\n"


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
