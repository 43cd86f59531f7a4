"""The settings of front ends other than our own API side."""

from typing import Annotated

from pydantic import Field

from vllm_cachescope.config.values import Model


class FrontEndSettings(Model):
    """What stands between clients and the engines, where it is not vLLM's API server in Python.

    Attributes:
        trusted: whether nobody but a front end that the operator trusts can put prompts to the
            engines. Then salts and plans in ``kv_hints`` name organisations. With a port that
            clients reach they could claim to be any organisation.
        metrics_port: first TCP port at which engines serve their own metrics, each engine one
            higher than the one before; None for none.
        metrics_host: the address that these ports are bound to.
    """

    trusted: Annotated[bool, Field(strict=True)] = False
    metrics_port: Annotated[int, Field(strict=True, ge=1, le=65535)] | None = None
    metrics_host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
