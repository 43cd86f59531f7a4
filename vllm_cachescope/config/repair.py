"""The settings of repair: what is put right in requests, and for which organisations."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ByteSize, Field

from vllm_cachescope.config.values import Duration, Model

_MAX_PATTERN = 1024  # characters


def linear(pattern: str) -> Any:
    """Return ``pattern`` compiled by RE2, which takes time linear in the text whatever either is.

    Raises:
        ValueError: if it is no pattern of RE2's, or RE2 is not installed.
    """
    try:
        import re2
    except ImportError:
        raise ValueError(
            "patterns need RE2: pip install 'vllm-cachescope[repair]' (google-re2)"
        ) from None
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"this is not a regular expression of RE2's: {text}") from None


def _checked(pattern: str) -> str:
    if linear(pattern).match("") is not None:
        raise ValueError("the pattern matches an empty text; it has to name something")
    return pattern


class VolatileHead(Model):
    """Text at the head of a system block that may be another one in each request.

    Attributes:
        pattern: a regular expression of RE2's that matches the text, from the block's first
            character on, or from where the text that another pattern matched ends.
        action: whether its first value in the session stays in its place (``hold``), or it is said
            behind the last breakpoint instead (``move``).
    """

    pattern: Annotated[str, Field(min_length=1, max_length=_MAX_PATTERN), AfterValidator(_checked)]
    action: Literal["hold", "move"] = "hold"


Parameter = Annotated[str, Field(pattern=r"^chat_template_kwargs\.[A-Za-z_][A-Za-z0-9_]{0,63}$")]
"""The path of a parameter of the chat template."""


class RepairChoice(Model):
    """What is put right for an organisation; nothing by default.

    Attributes:
        tools_order: tools in the order in which the session first used them.
        json_form: tools and inputs of tool calls with keys and white space as they first came.
        latched_field: fields of tools that say the same as their absence, as they first came.
        latched_params: parameters of the chat template that keep the session's first value.
        volatile_head: what may change at the head of system blocks.
    """

    tools_order: Annotated[bool, Field(strict=True)] = False
    json_form: Annotated[bool, Field(strict=True)] = False
    latched_field: Annotated[bool, Field(strict=True)] = False
    latched_params: Annotated[tuple[Parameter, ...], Field(max_length=16)] = ()
    volatile_head: Annotated[tuple[VolatileHead, ...], Field(max_length=16)] = ()

    @property
    def is_on(self) -> bool:
        """Whether anything is put right at all."""
        return bool(
            self.tools_order
            or self.json_form
            or self.latched_field
            or self.latched_params
            or self.volatile_head
        )


class RepairSettings(RepairChoice):
    """What is put right for all organisations but those in `orgs`.

    Attributes:
        orgs: what is put right for single organisations instead, by a name in `Config.tenants`, a
            gateway's name, or an id as ``GET /cachescope/breaks`` shows it.
        ttl: how long after its last request a session's first values are kept.
        max_bytes: memory for the first values of all sessions, in each API process.
    """

    orgs: dict[str, RepairChoice] = Field(default_factory=dict)
    ttl: Duration = 6 * 3600
    max_bytes: Annotated[ByteSize, Field(ge=2**16)] = ByteSize(2**26)
