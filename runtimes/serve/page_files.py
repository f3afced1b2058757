"""The page at `/`: three files that come with this package, and nothing else; a browser is told to load no more."""

from __future__ import annotations

import hashlib
from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""path -> file, type"""
PATHS = tuple(FILES)
"""they hold nothing of the package, and need no key"""

_FOLDER = Path(__file__).parent / "page"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


async def page_file(http: HttpRequest) -> Response:
    """Answer with one of the files; a browser that has it is told so."""
    name, kind = FILES[http.url.path]
    data = (_FOLDER / name).read_bytes()
    headers = {**_HEADERS, "etag": f'"{hashlib.sha256(data).hexdigest()[:16]}"'}
    if http.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(data, headers={**headers, "content-type": kind})
