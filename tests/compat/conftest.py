"""The engine of tests/engine, on whatever vLLM is installed."""

from tests.engine.conftest import engine, shared_engine, tiny_model

__all__ = ["engine", "shared_engine", "tiny_model"]
