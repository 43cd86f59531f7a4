"""A request as its client sent it, before anything was put right in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_cachescope.diagnosis.fingerprint import Fingerprint
from vllm_cachescope.prompt.request import PromptRequest
from vllm_cachescope.repair.repair import Repair


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A request that may be repaired, as its client sent it.

    Attributes:
        request: the request.
        body: its body.
        repairs: what was put right in it; nothing if it is served as it came.
        fingerprint: its fingerprint, if it was made on another thread; None to make it.
    """

    request: PromptRequest
    body: Mapping[str, Any]
    repairs: tuple[Repair, ...] = ()
    fingerprint: Fingerprint | None = None
