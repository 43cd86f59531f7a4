"""The types of single values: durations, waits, scopes, names of tiers, regular expressions."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from vllm_cachescope.durations import parse_duration, parse_wait
from vllm_cachescope.tenancy.scope import Scope


class Model(BaseModel):
    """A mapping of the configuration: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _duration(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


def _wait(value: object) -> object:
    return parse_wait(value) if isinstance(value, str) else value


def _scope(value: object) -> object:
    if isinstance(value, str):
        try:
            return Scope.parse(value)
        except KeyError:
            names = ", ".join(scope.label for scope in Scope)
            raise ValueError(f"{value!r} is not a scope; allowed: {names}") from None
    return value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"this is not a regular expression: {error}") from None
    return value


Duration = Annotated[int, BeforeValidator(_duration), Field(strict=True, gt=0)]
"""Whole seconds; written as ``"5m"`` or as a number of seconds."""

Wait = Annotated[float, BeforeValidator(_wait), Field(gt=0, allow_inf_nan=False)]
"""Seconds and fractions of a second; written as ``"250ms"``, ``"5s"`` or as a number of seconds."""

ScopeName = Annotated[Scope, BeforeValidator(_scope)]
"""A scope; written as ``"global"``, ``"org"`` or ``"session"``."""

TierName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
"""The name of a tier in reports and metrics."""

Pattern = Annotated[str, AfterValidator(_pattern)]
"""A regular expression."""
