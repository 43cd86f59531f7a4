"""The files of the page, and the headers that keep it from loading or running anything else."""

from collections.abc import Mapping
from hashlib import sha256
from importlib import resources
from pathlib import PurePath

from starlette.responses import RedirectResponse, Response

from vllm_cachescope.api.answers import Refused

DIRECTORY = "page_assets"
"""Where the files are, in this package."""

PAGE = "page.html"

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No string becomes markup or code: the browser refuses innerHTML and the like.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": _POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Headers of everything that the page and its data are answered with."""


class PageFiles:
    """The files, read once."""

    def __init__(self) -> None:
        directory = resources.files(__package__) / DIRECTORY
        self._files = {
            file.name: file.read_bytes()
            for file in directory.iterdir()
            if PurePath(file.name).suffix in _TYPES
        }

    @property
    def names(self) -> list[str]:
        """The names of all files."""
        return list(self._files)

    def answer(self, path: str, name: str | None, headers: Mapping[str, str]) -> Response:
        """Return the response with a file.

        Args:
            path: the path that was asked for.
            name: the file's name; None for the page itself.
            headers: the request's headers, names in lower case.

        Raises:
            Refused: if there is no such file.
        """
        if path.endswith("/"):
            # The page's links are relative, so that it may be mounted anywhere.
            return RedirectResponse("../cachescope", 308, HEADERS)
        name = name or PAGE
        if (content := self._files.get(name)) is None:
            raise Refused(404, "not_found_error", "the page has no such file")
        tag = f'"{sha256(content).hexdigest()[:32]}"'
        # Asked again each time, and sent only if it has changed: another version may run by now.
        kept = HEADERS | {"cache-control": "no-cache", "etag": tag}
        if headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=kept)
        return Response(content, 200, kept, _TYPES[PurePath(name).suffix])
