"""`/`: the page to talk to, one file that needs nothing outside itself and may run nothing but its own script."""

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response


async def page(request: HttpRequest) -> Response:
    """The endpoint."""
    content, policy = _content()
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return HTMLResponse(content, headers=headers)


@functools.cache
def _content() -> tuple[str, str]:
    """The page, and the policy that lets its one script and its one style run, by their hashes."""
    text = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    allowed = {tag: _hash(re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _hash(found: re.Match[str] | None) -> str:
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
