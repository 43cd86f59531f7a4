"""mitmproxy's own flow files: values in typed netstrings (tnetstrings), one after the other."""

import gzip
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_cachescope.cli.traffic.call import TrafficError
from vllm_cachescope.cli.traffic.endings import ending_in
from vllm_cachescope.cli.traffic.envelope import Envelope, as_body
from vllm_cachescope.cli.traffic.times import seconds_of
from vllm_cachescope.cli.traffic.usage import usage_in

_MAX_DEPTH = 64
_MAX_BODY = 256 << 20  # bytes that a compressed body may unfold to


def is_file(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is one of mitmproxy's: ``1234:9:websocket;…``."""
    size, colon, rest = head[:20].partition(b":")
    return bool(colon) and size.isdigit() and rest[:1].isdigit()


def envelopes(data: bytes) -> Iterator[Envelope]:
    """Yield the requests in a flow file, in its order.

    Raises:
        TrafficError: if the file is damaged.
    """
    at = 0
    while at < len(data):
        flow, at = _value(data, at, 0)
        request = flow.get(b"request") if isinstance(flow, Mapping) else None
        if isinstance(request, Mapping):
            response = flow.get(b"response")
            answer = _content(response).decode("utf-8", "replace") if response else None
            yield Envelope(
                as_body(_content(request).decode("utf-8", "surrogateescape")),
                seconds_of(request.get(b"timestamp_start")),
                None,
                _headers(request),
                _text(request.get(b"path")),
                usage=usage_in(answer),
                ended=ending_in(answer),
            )


def _headers(message: Mapping[Any, Any]) -> dict[str, str]:
    pairs = message.get(b"headers")
    return {
        _text(pair[0]).lower(): _text(pair[1])
        for pair in (pairs if isinstance(pairs, list) else ())
        if isinstance(pair, list) and len(pair) == 2
    }


def _content(message: Mapping[Any, Any]) -> bytes:
    content = message.get(b"content")
    if not isinstance(content, bytes):
        return b""
    if _headers(message).get("content-encoding") == "gzip":
        try:
            return zlib.decompressobj(wbits=31).decompress(content, _MAX_BODY)
        except (zlib.error, gzip.BadGzipFile):
            return b""
    return content


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def _value(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    """Return the value at ``at`` and where it ends. Texts come as bytes, as keys do."""
    colon = data.find(b":", at, at + 16)
    digits = data[at:colon] if colon > 0 else b""
    if not digits.isdigit() or depth > _MAX_DEPTH:
        raise TrafficError("a damaged flow file of mitmproxy")
    start, end = colon + 1, colon + 1 + int(digits)
    kind, inner = data[end : end + 1], data[start:end]
    if kind in (b",", b";"):
        return inner, end + 1
    if kind in (b"#", b"^"):
        try:
            return (int(inner) if kind == b"#" else float(inner)), end + 1
        except ValueError:
            raise TrafficError("a damaged flow file of mitmproxy") from None
    if kind in (b"!", b"~"):
        return (inner == b"true") if kind == b"!" else None, end + 1
    if kind not in (b"]", b"}"):
        raise TrafficError("a damaged flow file of mitmproxy")
    items: list[Any] = []
    where = 0
    while where < len(inner):
        item, where = _value(inner, where, depth + 1)
        items.append(item)
    if kind == b"]":
        return items, end + 1
    keys = items[::2]
    if len(items) % 2 or not all(isinstance(key, bytes) for key in keys):
        raise TrafficError("a damaged flow file of mitmproxy")
    return dict(zip(keys, items[1::2], strict=True)), end + 1
