"""The name by which ``--middleware`` of vLLM's API server finds CacheScope."""

from vllm_cachescope.connectors.vllm.api_server.middleware import Middleware

__all__ = ["Middleware"]
