"""The plan hint: the cache plan of a prompt as a trusted front end sends it, in tokens.

It is the payload of an action `ACTION`, version `VERSION`, in vLLM's ``kv_hints`` envelope.
`schema` is published as ``plan_hint.schema.json`` beside this file.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_cachescope.prompt.plan import Span
from vllm_cachescope.tenancy.scope import MAX_NAME, Caller, Scope, ScopeKeys

ACTION = "cachescope.plan"
VERSION = "1.0"

MAX_SPANS = 64
"""Most spans of one plan."""

_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class Refusal(StrEnum):
    """Why a hint does not count. The prompt is cached automatically then."""

    UNTRUSTED = "untrusted"
    """The operator trusts no front end."""
    VERSION = "version"
    """The action has a version that is not known here."""
    SCHEMA = "schema"
    """The payload is not what the schema says, or there are several plans."""
    ORGANISATION = "organisation"
    """The name is none that an organisation can have."""
    GLOBAL = "global"
    """The organisation may not share with everyone."""
    TTL = "ttl"
    """The operator does not allow the lifetime."""
    SPANS = "spans"
    """Spans do not ascend, reach beyond the prompt, or widen in scope."""


class HintRefused(Exception):
    """A hint does not count.

    Attributes:
        reason: why.
    """

    def __init__(self, reason: Refusal) -> None:
        self.reason = reason
        super().__init__(reason.value)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class HintedSpan(_Strict):
    """Consecutive tokens with one scope and one lifetime. A breakpoint stands at their end."""

    end: Annotated[
        int,
        Field(ge=1, description="Position just past its last token, from the start of the prompt."),
    ]
    scope: Annotated[
        Literal["global", "org", "session"],
        Field(description="How widely it is shared. Scopes only narrow along the prompt."),
    ]
    ttl_s: Annotated[
        int, Field(ge=1, description="Lifetime in seconds: one that the operator allows.")
    ]


class PlanHint(_Strict):
    """The cache plan of one prompt. Tokens behind the last span are not kept behind the device."""

    organisation: Annotated[
        _Name,
        Field(description="Name or id of the organisation, as tenants and operators use it."),
    ]
    session: Annotated[_Name | None, Field(description="Its session.")] = None
    spans: Annotated[
        list[HintedSpan] | None,
        Field(
            min_length=1,
            max_length=MAX_SPANS,
            description="In the order of their ends; null for the operator's default.",
        ),
    ] = None

    def spans_of(self, length: int, caller: Caller, keys: ScopeKeys, nonce: str) -> list[Span]:
        """Return the spans of a prompt, up to its end.

        Args:
            length: the prompt's length in tokens.
            caller: the organisation and session that the hint names.
            keys: makes scope keys.
            nonce: unique to the prompt.

        Raises:
            HintRefused: if the spans do not fit the prompt, or each other.
        """
        spans: list[Span] = []
        for hinted in self.spans or ():
            scope = Scope.parse(hinted.scope)
            if spans and (hinted.end <= spans[-1].end or scope < spans[-1].scope):
                raise HintRefused(Refusal.SPANS)
            # What nobody can read again is not worth a copy.
            readable = scope is not Scope.SESSION or caller.session is not None
            key = keys.key(scope, caller, nonce)
            spans.append(Span(hinted.end, scope, key, hinted.ttl_s, readable))
        if not spans or spans[-1].end > length:
            raise HintRefused(Refusal.SPANS)
        last = spans[-1]
        if last.end < length:
            spans.append(Span(length, last.scope, last.key, last.ttl_s, covered=False))
        return spans


def read(version: object, payload: object) -> PlanHint:
    """Return the hint in an action of the name `ACTION`.

    Args:
        version: the action's version.
        payload: what it carries.

    Raises:
        HintRefused: if it is not of this version, or not as the schema says.
    """
    if version != VERSION:
        raise HintRefused(Refusal.VERSION)
    if not isinstance(payload, Mapping):
        raise HintRefused(Refusal.SCHEMA)
    try:
        return PlanHint.model_validate(dict(payload))
    except ValidationError:
        raise HintRefused(Refusal.SCHEMA) from None


def schema() -> dict[str, Any]:
    """Return the JSON schema of the payload."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{ACTION}:{VERSION}",
        **PlanHint.model_json_schema(),
    }
