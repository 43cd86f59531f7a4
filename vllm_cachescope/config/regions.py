"""The scope and the TTL of each region of a prompt where the client names none."""

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from vllm_cachescope.config.values import Duration, Model, ScopeName
from vllm_cachescope.prompt.request import Region
from vllm_cachescope.prompt.segments import RegionDefault
from vllm_cachescope.tenancy.scope import Scope


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class WrittenDefault(RegionDefault):
    """A `RegionDefault` as a configuration writes it: ``{scope: org, ttl: 5m}``."""

    scope: ScopeName = Scope.ORG
    ttl_s: Annotated[Duration, Field(alias="ttl")] = 300


class Regions(Model):
    """The defaults of the three regions.

    Attributes:
        tools: default of the tools.
        system: default of the system prompt.
        messages: default of the messages.
    """

    tools: WrittenDefault = WrittenDefault()
    system: WrittenDefault = WrittenDefault()
    messages: WrittenDefault = WrittenDefault()

    @model_validator(mode="after")
    def _scopes_narrow(self) -> Self:
        scopes = [self.of(region).scope for region in Region]
        if scopes != sorted(scopes):
            raise ValueError(
                "default scopes may only narrow from tools to system to messages, not "
                + ", ".join(scope.label for scope in scopes)
            )
        return self

    def of(self, region: Region) -> RegionDefault:
        """Return the default of ``region``."""
        return (self.tools, self.system, self.messages)[region]
