"""The libraries: for each a program, run twice, that keeps its conversation in a file."""

from collections.abc import Callable
from pathlib import Path

from clients.desk import FILE, QUESTION, Desk
from clients.order import order

PROGRAMS = Path(__file__).parent / "programs"


def library(program: str, *arguments: str, model: str = "toy") -> Callable[[Desk], None]:
    """Return what runs ``program`` with ``arguments`` in the environment of its library."""

    def run(desk: Desk) -> None:
        for prompt in (_prompt(program, desk), QUESTION):
            desk.run(
                *(_interpreter(program, desk), str(PROGRAMS / program), *arguments, prompt),
                BASE_URL=desk.url,
                API_KEY=desk.key,
                MODEL=model,
                SESSION=f"session of {desk.key}",
                PREFIX=str(desk.prefix),
                # LiteLLM, which OpenHands uses, would ask the web for prices.
                LITELLM_LOCAL_MODEL_COST_MAP="True",
            )

    return run


def _prompt(program: str, desk: Desk) -> str:
    if program == "openhands_agent.py":
        arguments = {"command": "view", "path": desk.file}
        return order("file_editor", **arguments, security_risk="LOW", summary="a look")
    return order("read_file", path=FILE)


def _interpreter(program: str, desk: Desk) -> str:
    if program.endswith(".mjs"):
        return "node"
    return desk.program("python")
