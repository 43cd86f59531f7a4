"""The front ends of engines: which one puts prompts to them, and what it can do."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from types import FrameType

from vllm_cachescope.connectors.vllm.findings import Finding, Status

_RUST = "VLLM_USE_RUST_FRONTEND"


class Ability(StrEnum):
    """What a front end can do for the cache."""

    MARKS = "it honours marks, and replies tell what was cached"
    CODE = "prompts marked with PromptCache are cached so, others automatically"
    AUTOMATIC = (
        "it reads no marks: prompts are cached automatically, by cache_salt, and replies tell "
        "no more than vLLM's do"
    )
    UNKNOWN = "prompts that come without marks are cached automatically, by cache_salt"


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """A front end.

    Attributes:
        name: what it is.
        ability: what it can do.
    """

    name: str
    ability: Ability

    def __str__(self) -> str:
        return f"{self.name}; {self.ability}"

    @property
    def finding(self) -> Finding:
        """What `cachescope check` says of it."""
        if self.ability in (Ability.MARKS, Ability.CODE):
            return Finding("front end", Status.OK, str(self))
        remedy = "vLLM's API server in Python, for marks and usage; see docs/frontends.md"
        if self == RUST:
            remedy = f"cachescope gateway in front of it, or {remedy}"
        return Finding("front end", Status.WARNING, str(self), remedy)


PYTHON = FrontEnd("vLLM's API server in Python", Ability.MARKS)
GRPC = FrontEnd("vLLM's gRPC server", Ability.AUTOMATIC)
RUST = FrontEnd("vLLM's Rust server", Ability.AUTOMATIC)
DYNAMO = FrontEnd("a Dynamo worker", Ability.AUTOMATIC)
OFFLINE = FrontEnd("a Python program", Ability.CODE)
ELSEWHERE = FrontEnd("none here, with --headless", Ability.UNKNOWN)
UNKNOWN = FrontEnd("not recognised", Ability.UNKNOWN)


def is_rust() -> bool:
    """Whether the environment asks ``vllm serve`` for vLLM's Rust server."""
    return os.environ.get(_RUST, "0") not in ("", "0")


def of_launch(grpc: bool, headless: bool) -> FrontEnd:
    """Return the front end of ``vllm serve``.

    Args:
        grpc: whether it was given ``--grpc``.
        headless: whether it was given ``--headless``.
    """
    if grpc:
        return GRPC
    if headless:
        return ELSEWHERE
    return RUST if is_rust() else PYTHON


def of_caller() -> FrontEnd:
    """Return the front end that is making its engine's configuration: a caller of this function."""
    return of_stack(_places(sys._getframe()))


def of_stack(places: Iterable[tuple[str, str]]) -> FrontEnd:
    """Return the front end in a call stack.

    Args:
        places: the module and the function of each call.
    """
    known = set(places)
    modules = {module for module, _ in known}
    if any(module.startswith("dynamo.") for module in modules):
        return DYNAMO
    if modules & {"vllm.entrypoints.launchers.grpc_server", "vllm.entrypoints.grpc_server"}:
        return GRPC
    if any(module.startswith("smg_grpc_servicer.") for module in modules):
        return GRPC
    if "vllm.entrypoints.cli.serve" in modules:
        return of_launch(
            grpc=False, headless=("vllm.entrypoints.cli.serve", "run_headless") in known
        )
    if modules & {
        "vllm.entrypoints.launchers.api_server.entry",
        "vllm.entrypoints.openai.api_server",
    }:
        return PYTHON
    if modules & {"vllm.entrypoints.llm", "vllm.v1.engine.llm_engine"}:
        return OFFLINE
    return UNKNOWN


def _places(frame: FrameType | None) -> Iterable[tuple[str, str]]:
    while frame is not None:
        spec = frame.f_globals.get("__spec__")
        # A module that is run with `python -m` is named __main__.
        name = getattr(spec, "name", None) or frame.f_globals.get("__name__", "")
        yield name, frame.f_code.co_name
        frame = frame.f_back
