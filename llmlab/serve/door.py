"""Who may come in, with how much, and what happens when they leave: the one middleware around every endpoint.

A client that goes away cancels what it asked for, whether it was to be streamed or not, and all that was entered into
the request's `ExitStack` is left: slots and pages are free at once.
"""

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmlab.serve.errors import ApiError, response
from llmlab.serve.limits import Limits

OPEN_PATHS = ("/", "/health")  # without a key: the page asks for it, and whoever watches over servers has none
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_STACK = "llmlab.stack"


class Door:
    """The app behind keys (if any), limits and the rule that browsers may only come from our own page.

    hosts: the names under which the server may be called; none: any. Without keys, a page from elsewhere that resolves
    its own name to this machine could otherwise read and write here.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str] = (), limits: Limits, hosts: Sequence[str] = ()):
        self._app, self._limits = app, limits
        self._keys = [_digest(key) for key in keys]
        self._hosts = {*_LOOPBACK, *hosts} if hosts else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def sent(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await response(error)(scope, receive, send)
            return
        except _GoneError:
            return
        with contextlib.ExitStack() as stack:
            scope[_STACK] = stack
            gone = asyncio.create_task(_gone(receive))
            answer = asyncio.create_task(self._answer(scope, _replay(body, gone), sent))
            try:
                await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (gone, answer):
                    task.cancel()
                results = await asyncio.gather(gone, answer, return_exceptions=True)
        if isinstance(results[1], Exception) and not begun:
            await response(results[1])(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises ApiError where this client, or the page that sends it, may not come in."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = _host_of("//" + headers.get(b"host", ""))
        origin = headers.get(b"origin")
        if self._hosts is not None and host not in self._hosts:
            raise ApiError(403, f"this server is not called {host!r}: use its address, or start it with a key")
        if origin is not None and origin.partition("//")[2] != headers.get(b"host", ""):
            raise ApiError(403, f"pages from {origin!r} may not use this server")
        if not self._keys or scope["path"] in OPEN_PATHS:
            return
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        given = _digest(key.strip())
        # All are compared, each in constant time: how long it takes says nothing.
        if not sum([hmac.compare_digest(given, known) for known in self._keys]) or kind.lower() != "bearer":
            raise ApiError(401, "this server asks for a key: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self._limits.body
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        parts, size = list[bytes](), int(declared) if declared.isdigit() and len(declared) < 20 else 0
        more = size <= most
        size = size if not more else 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while more and size <= most:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    parts.append(message.get("body", b""))
                    size, more = size + len(parts[-1]), message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {self._limits.body_seconds:g} s") from None
        if size > most:
            raise ApiError(413, f"the request is larger than {most:,} bytes: send less at a time")
        return b"".join(parts)


def stack_of(scope: Scope) -> contextlib.ExitStack:
    """What is left when the request is over, answered or not."""
    return scope[_STACK]


class _GoneError(Exception):
    """The client left before it had said what it wants."""


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, gone: "asyncio.Task[None]") -> Receive:
    """The body that was read, and the client's leaving."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        await asyncio.wait([gone])
        return {"type": "http.disconnect"}

    return receive


def _host_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
