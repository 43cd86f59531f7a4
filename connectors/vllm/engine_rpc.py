"""The way from the API process to the connector in the engine process.

vLLM lets its API process call methods of `EngineCore` by name; one more method of it passes calls
on to the connector. They run between two steps, on the scheduler's thread.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

_METHOD = "cachescope"


def install() -> None:
    """Give vLLM's EngineCore the method. To be called in the engine's process."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, _METHOD, _run)


def _run(core: Any, command: str, args: list[Any]) -> Any:
    # In one list: vLLM lets through no more arguments than the method has parameters.
    return getattr(core.scheduler.connector, f"command_{command}")(*args)


async def call(engine: "EngineClient", command: str, *args: Any) -> list[Any]:
    """Run the connector's ``command_<command>`` in every engine; return their answers."""
    client = engine.engine_core
    if hasattr(client, "call_utility_all_async"):
        return list(await client.call_utility_all_async(_METHOD, command, list(args)))
    # vLLM 0.31 asks all of its engines too, and returns the first one's answer.
    return [await client.call_utility_async(_METHOD, command, list(args))]
