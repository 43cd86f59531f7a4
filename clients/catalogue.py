"""The clients that are run, each with its packages and its way through a session."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from clients import agents
from clients.desk import Desk
from clients.gateway import litellm
from clients.installation import Packages, npm, pip
from clients.libraries import library


@dataclass(frozen=True, slots=True)
class Client:
    """A client of the server.

    Attributes:
        name: what to call it in the table and in ``--only``.
        folder: where it is installed; several may share one.
        packages: what is installed there.
        run: takes it through one tool call and a resumed session.
    """

    name: str
    folder: str
    packages: Packages
    run: Callable[[Desk], None]


def _own(package: str) -> Packages:
    return Packages("", (f"{package}=={metadata.version(package)}",))


_AI_SDK = npm(
    *("ai@6.0.326", "@ai-sdk/anthropic@3.0.140", "@ai-sdk/openai@3.0.141"),
    *("@ai-sdk/openai-compatible@2.0.92", "zod@4.6.7"),
)
_LITELLM = pip("litellm[proxy]==1.108.7")
_PYDANTIC_AI = pip("pydantic-ai-slim[anthropic,openai]==2.68.0")
_LANGCHAIN = pip("langchain==1.5.2", "langchain-anthropic==1.7.10", "langchain-openai==1.7.4")
_OPENHANDS = pip("openhands-sdk==1.58.2", "openhands-tools==1.58.2", python="python3.12")

CLIENTS = (
    Client(
        "claude-code", "claude-code", npm("@anthropic-ai/claude-code@2.1.197"), agents.claude_code
    ),
    Client("codex", "codex", npm("@openai/codex@0.169.0"), agents.codex),
    Client("opencode", "opencode", npm("opencode-ai@1.18.33"), agents.opencode),
    Client("cline", "cline", npm("cline@3.0.65"), agents.cline),
    Client("openhands", "openhands", _OPENHANDS, library("openhands_agent.py")),
    Client("anthropic", "", _own("anthropic"), library("anthropic_sdk.py")),
    Client("openai-chat", "", _own("openai"), library("openai_chat.py")),
    Client("openai-responses", "", _own("openai"), library("openai_responses.py")),
    *(
        Client(f"ai-sdk-{kind}", "ai-sdk", _AI_SDK, library("ai_sdk.mjs", kind))
        for kind in ("anthropic", "openai", "compatible")
    ),
    *(
        Client(f"{name}-{kind}", name, packages, library(program, kind))
        for name, packages, program in (
            ("pydantic-ai", _PYDANTIC_AI, "pydantic_ai_agent.py"),
            ("langchain", _LANGCHAIN, "langchain_agent.py"),
        )
        for kind in ("anthropic", "openai")
    ),
    *(
        Client(f"litellm-{route}", "litellm", _LITELLM, litellm(route, program))
        for route, program in (
            ("anthropic", "anthropic_sdk.py"),
            ("openai", "openai_chat.py"),
            ("hosted_vllm", "openai_chat.py"),
        )
    ),
)
