"""One HTTP request on its way through the API process."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm_cachescope.prompt import PromptRequest
from vllm_cachescope.report import Report
from vllm_cachescope.scopes import Caller


@dataclass(slots=True)
class Exchange:
    """What the middleware and the engine's side tell each other about a request.

    Attributes:
        caller: on whose behalf it runs.
        request: the request as the cache sees it; None on a path whose body is not read, which
            is cached as one unmarked prompt.
        body: the body as the server sees it, cache markers and all.
        reports: what became of each of its prompts, by the prompt's nonce. The engine's side
            puts in an estimate as soon as the first token is there and the truth when it knows.
    """

    caller: Caller
    request: PromptRequest | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    reports: dict[str, Report] = field(default_factory=dict)


current_exchange: ContextVar[Exchange | None] = ContextVar("cachescope_exchange", default=None)
"""The exchange that the running code works for; None outside one."""
