"""HTTP archives (HAR), as browsers, proxies and mitmproxy's ``hardump`` write them."""

import base64
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_cachescope.cli.traffic.endings import ending_in
from vllm_cachescope.cli.traffic.envelope import Envelope, as_body, headers_of, text_of
from vllm_cachescope.cli.traffic.times import seconds_of
from vllm_cachescope.cli.traffic.usage import usage_in


def is_record(record: Mapping[str, Any]) -> bool:
    """Whether a document is an archive."""
    log = record.get("log")
    return isinstance(log, Mapping) and isinstance(log.get("entries"), list)


def envelopes(record: Mapping[str, Any]) -> Iterator[Envelope]:
    """Yield the requests in an archive, in its order; those without a body as well."""
    for entry in record["log"]["entries"]:
        if isinstance(entry, Mapping) and isinstance(request := entry.get("request"), Mapping):
            posted, answer = request.get("postData"), entry.get("response")
            content = answer.get("content") if isinstance(answer, Mapping) else None
            text = _decoded(content)
            yield Envelope(
                as_body(posted.get("text")) if isinstance(posted, Mapping) else None,
                seconds_of(entry.get("startedDateTime")),
                None,
                headers_of(request.get("headers")),
                text_of(request.get("url")),
                usage=usage_in(text),
                ended=ending_in(text),
            )


def _decoded(content: object) -> str | None:
    if not isinstance(content, Mapping):
        return None
    text = content.get("text")
    if not isinstance(text, str) or content.get("encoding") != "base64":
        return text if isinstance(text, str) else None
    try:
        return base64.b64decode(text).decode("utf-8", "replace")
    except ValueError:
        return None
