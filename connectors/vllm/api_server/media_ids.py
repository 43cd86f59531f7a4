"""The ids that clients give to images and other media, in place of a digest of the content.

vLLM takes such an id on trust, in block hashes and in its caches of processed media: whoever is
first to send an id says what everyone reads under it. Here an id counts inside its organisation.
"""

from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from vllm_cachescope.api.request_context import current_request
from vllm_cachescope.tenancy.caller import ANONYMOUS
from vllm_cachescope.tenancy.scope import fields_digest

_Ids = Mapping[str, str | Sequence[str | None]]


def confine(renderer: Any, secret: bytes) -> None:
    """Have ``renderer``, vLLM's, know each client's ids by a keyed hash of id and organisation."""
    process = renderer._process_multimodal_async

    def _process_multimodal_async(
        *args: Any, mm_uuids: _Ids | None = None, **options: Any
    ) -> Awaitable[Any]:
        context = current_request.get()
        org = ANONYMOUS if context is None else context.caller.org
        own = None if mm_uuids is None else _confined(mm_uuids, org, secret)
        result: Awaitable[Any] = process(*args, mm_uuids=own, **options)
        return result

    renderer._process_multimodal_async = _process_multimodal_async


def forget_unsent(renderer: Any, prompt: Any) -> None:
    """Have ``renderer`` send the media of a prompt that never reached the engine with the next
    prompt that has them; it takes them as sent once it has rendered them."""
    cache = renderer.mm_processor_cache
    if cache is None or not isinstance(prompt, dict):
        return
    for hashes in (prompt.get("mm_hashes") or {}).values():
        for one in hashes:
            cache.invalidate(one)


def _confined(ids: _Ids, org: str, secret: bytes) -> dict[str, str | list[str | None]]:
    def own(name: str) -> str:
        return fields_digest(secret, "media", org, name).hex()

    return {
        kind: own(names)
        if isinstance(names, str)
        else [None if name is None else own(name) for name in names]
        for kind, names in ids.items()
    }
