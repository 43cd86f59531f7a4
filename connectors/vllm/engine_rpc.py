"""Calls to the connector in the engine's process, from the one that has vLLM's engine client.

vLLM's engine clients call methods of `EngineCore` by name. One more method, which `install` adds,
passes calls on to the connector. A call runs between two steps, on the scheduler's thread.
"""

from typing import Any

_METHOD = "cachescope"


def install() -> None:
    """Add the method to vLLM's `EngineCore`. To be called in the engine's process."""
    from vllm.v1.engine.core import EngineCore

    setattr(EngineCore, _METHOD, _pass_on)


def connector_of(core: Any, method: str) -> Any:
    """Return the connector of an `EngineCore` that has ``method``; None if none has."""
    connector = core.scheduler.connector
    # It may be one of several, in vLLM's `MultiConnector`.
    candidates = [connector, *getattr(connector, "_connectors", ())]
    return next((one for one in candidates if hasattr(one, method)), None)


def _pass_on(core: Any, command: str, args: list[Any]) -> Any:
    # In one list: vLLM lets through no more arguments than the method has parameters.
    name = f"command_{command}"
    return getattr(connector_of(core, name), name)(*args)


async def call(engine_client: Any, command: str, *args: Any) -> list[Any]:
    """Call a command of the connector in every engine.

    Args:
        engine_client: vLLM's `AsyncLLM`.
        command: ``sweep`` for the connector's method ``command_sweep``.
        args: its arguments, which msgpack has to be able to encode.

    Returns:
        The answer of each engine, by rank.
    """
    # Not in vLLM's `EngineClient`, the type that its API server knows.
    client = engine_client.engine_core
    if hasattr(client, "call_utility_all_async"):
        return list(await client.call_utility_all_async(_METHOD, command, list(args)))
    # vLLM 0.31 asks every engine as well, and returns the answer of the first.
    return [await client.call_utility_async(_METHOD, command, list(args))]


def call_offline(llm_engine: Any, command: str, *args: Any) -> list[Any]:
    """Call a command of the connector in the engine of an `LLM`; see `call`.

    Args:
        llm_engine: vLLM's `LLMEngine`.
        command: as of `call`.
        args: as of `call`.
    """
    client = llm_engine.engine_core
    if hasattr(client, "call_utility"):
        return [client.call_utility(_METHOD, command, list(args))]
    # The engine is in this process.
    return [_pass_on(client.engine_core, command, list(args))]
