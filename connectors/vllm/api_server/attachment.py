"""Attaches the API side to vLLM's API server: the connector's configuration is enough."""

import pkgutil
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from vllm_cachescope.config import ConfigError
from vllm_cachescope.connectors.vllm import config_check
from vllm_cachescope.logs import logger_of

_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_MIDDLEWARE = "vllm_cachescope.connectors.vllm.server.Middleware"
_API_SERVERS = (_ENTRY, "vllm.entrypoints.openai.api_server")

logger = logger_of(__name__)


def install() -> None:
    """Have vLLM's API server attach the API side, if this process is one. Installing twice is
    harmless."""
    entry = sys.modules.get(_ENTRY)
    if entry is None or _is_attaching(entry):
        return
    build, init = getattr(entry, "build_app", None), getattr(entry, "init_app_state", None)
    if build is not None and init is not None:
        vars(entry).update(build_app=_attaching(build), init_app_state=_connecting(init))


def require() -> None:
    """Make sure that no API server runs without the API side. To be called when the connector is
    configured, before a model is loaded.

    Raises:
        ConfigError: if this process is an API server that nothing can be attached to.
    """
    install()
    if any(name in sys.modules for name in _API_SERVERS) and not _is_attaching(
        sys.modules.get(_ENTRY)
    ):
        raise ConfigError(
            f"this vLLM's API server cannot be attached to: there is no {_ENTRY} with build_app "
            "and init_app_state; allowed: vLLM 0.31 to 0.33"
        )


def _is_attaching(entry: Any) -> bool:
    return hasattr(getattr(entry, "build_app", None), "is_attaching")


def _attaching(build: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(build)
    def build_app(args: Any, *others: Any, **options: Any) -> Any:
        transfer = getattr(args, "kv_transfer_config", None)
        is_named = any(_is_ours(name) for name in args.middleware)
        if is_named:
            config_check.read(transfer)
        elif config_check.own_transfer(transfer) is not None:
            args.middleware = [*args.middleware, _MIDDLEWARE]
            is_named = True
        app = build(args, *others, **options)
        if is_named:
            app.state.cachescope = None
        return app

    build_app.is_attaching = True  # type: ignore[attr-defined]
    return build_app


def _is_ours(middleware: str) -> bool:
    # Not before: only an API server needs these imports.
    from vllm_cachescope.connectors.vllm.api_server.middleware import Middleware

    # vLLM imports it as well, and says if that fails.
    with suppress(ImportError, AttributeError, ValueError):
        named = pkgutil.resolve_name(middleware)
        return isinstance(named, type) and issubclass(named, Middleware)
    return False


def _connecting(init: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @wraps(init)
    async def init_app_state(engine_client: Any, state: Any, *others: Any, **options: Any) -> None:
        await init(engine_client, state, *others, **options)
        if not hasattr(state, "cachescope"):
            return
        from vllm_cachescope.connectors.vllm.api_server.middleware import connect

        # Not when the server says that it starts: what is raised then stops nothing.
        try:
            state.cachescope = connect(state)
        except ConfigError:
            raise
        except Exception as error:
            logger.debug("The API side could not be attached", exc_info=True)
            raise ConfigError(f"this vLLM's API server cannot be attached to: {error!r}") from error

    return init_app_state
