"""The check of the configuration before vLLM loads anything: one message for a mistake."""

import gc
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import wraps
from multiprocessing.process import BaseProcess
from types import SimpleNamespace, TracebackType
from typing import Any

from vllm_cachescope.config import CONNECTOR, Config, ConfigError, load
from vllm_cachescope.config.exposure import refuse_secrets
from vllm_cachescope.connectors.vllm import front_ends, memory, private_files, store_factory
from vllm_cachescope.connectors.vllm.findings import Finding, Status, settle
from vllm_cachescope.logs import logger_of
from vllm_cachescope.usage.prices import read_prices

_MULTI = "MultiConnector"

logger = logger_of(__name__)


def load_checked(extra_config: Mapping[str, Any]) -> Config:
    """Return the configuration in ``kv_connector_extra_config``, checked as far as that can be
    done before a model is loaded. The command line, the engine and the API side all load it here.

    Raises:
        ConfigError: if it cannot be used, or holds secrets that others can read there.
    """
    refuse_secrets(extra_config)
    config = load(extra_config)
    config.check(store_factory.check)
    check_ledger(config)
    return config


def check_ledger(config: Config) -> None:
    """Check the file of prices, and the ledger's address, without connecting to its database.

    Raises:
        ConfigError: if either cannot be used, or what it needs is not installed.
    """
    if config.prices is not None:
        read_prices(config.prices)
    if config.ledger is None:
        return
    try:
        from vllm_cachescope.usage import database
    except ImportError as error:
        raise ConfigError(
            f"ledger: it needs SQLAlchemy ({error}); install it with pip install "
            "'vllm-cachescope[ledger]'"
        ) from error
    database.address(config.ledger)


def read(kv_transfer_config: Any) -> Config:
    """Return CacheScope's configuration from vLLM's ``--kv-transfer-config``.

    Raises:
        ConfigError: if there is none, or it cannot be used.
    """
    own = own_transfer(kv_transfer_config)
    if own is None:
        raise ConfigError(
            "--middleware names CacheScope, and --kv-transfer-config does not; give it "
            f'"kv_connector": "{CONNECTOR}" and "kv_role": "kv_both"'
        )
    return load_checked(own.kv_connector_extra_config)


def own_transfer(kv_transfer_config: Any) -> Any:
    """Return what configures CacheScope: ``kv_transfer_config`` itself, or one of the connectors
    in vLLM's ``MultiConnector``; None if there is none.

    A connector with a module of its own is ours if it is derived from ours.
    """
    if kv_transfer_config is None:
        return None
    outer = _with_attributes(kv_transfer_config)
    inner = outer.kv_connector_extra_config.get("connectors") if _is(outer, _MULTI) else ()
    candidates = [outer, *map(_with_attributes, inner or ())]
    return next((one for one in candidates if _is_ours(one)), None)


def _with_attributes(transfer: Any) -> Any:
    """Return a connector's configuration as vLLM's `KVTransferConfig` has it, if it is a mapping:
    `EngineArgs` and ``MultiConnector`` take those, too."""
    if not isinstance(transfer, Mapping):
        return transfer
    return SimpleNamespace(**{"kv_connector_extra_config": {}, **transfer})


def _is(transfer: Any, name: str) -> bool:
    return getattr(transfer, "kv_connector", None) == name


def _is_ours(transfer: Any) -> bool:
    path = getattr(transfer, "kv_connector_module_path", None)
    if _is(transfer, CONNECTOR) or not path:
        return _is(transfer, CONNECTOR)
    # vLLM imports it as well, in each of its processes, and says if that fails.
    with suppress(ImportError):
        derived = getattr(importlib.import_module(path), transfer.kv_connector, None)
        return isinstance(derived, type) and any(it.__name__ == CONNECTOR for it in derived.mro())
    return False


def install(require: Callable[[], None]) -> None:
    """Have every vLLM that is to run the connector check its configuration first. Installing
    twice is harmless.

    Args:
        require: what else must hold then. Raises `ConfigError` if it does not.
    """
    # Only a process that parses vLLM's arguments has this module by now.
    arg_utils: Any = sys.modules.get("vllm.engine.arg_utils")
    arguments = getattr(arg_utils, "EngineArgs", None)
    if arguments is None or hasattr(arguments.create_engine_config, "is_checked"):
        return
    arguments.create_engine_config = _checking_first(arguments.create_engine_config, require)
    _refuse_before_logging()
    sys.excepthook = _without_traceback(sys.excepthook)


def _checking_first(create: Callable[..., Any], require: Callable[[], None]) -> Callable[..., Any]:
    @wraps(create)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = own_transfer(self.kv_transfer_config)
        if own is None:
            return create(self, *args, **kwargs)
        config = read(own)
        require()
        # Not in the API servers that a first one starts: its engines have taken their memory.
        if multiprocessing.parent_process() is None:
            logger.info("Front end: %s", front_ends.of_caller())
            settle(surroundings(own.kv_connector_extra_config, config, engines_here(self)))
        asked = self.enable_prefix_caching
        vllm_config = create(self, *args, **kwargs)
        settle([prefix_caching(vllm_config, asked), *match_unit(vllm_config)])
        return vllm_config

    create_engine_config.is_checked = True  # type: ignore[attr-defined]
    return create_engine_config


def surroundings(
    extra_config: Mapping[str, Any], config: Config, engines: int
) -> Iterator[Finding]:
    """Yield what can be told at once of what the configuration needs from its machine.

    Args:
        extra_config: vLLM's ``kv_connector_extra_config``.
        config: the configuration that was read from it.
        engines: how many engines there will be on this machine.
    """
    try:
        yield memory.check(int(config.cpu_bytes), engines, memory.measure())
    except (OSError, ValueError, KeyError) as error:
        # No start fails because a system tells of its memory in another way.
        yield Finding("cpu_bytes", Status.WARNING, f"how much fits cannot be told: {error!r}")
    yield from private_files.check(extra_config, config)


def engines_here(engine_args: Any) -> int:
    """Return how many engines vLLM starts on this machine for its `EngineArgs`."""
    if getattr(engine_args, "data_parallel_rank", None) is not None:
        return 1
    local = getattr(engine_args, "data_parallel_size_local", None)
    return int(local or getattr(engine_args, "data_parallel_size", None) or 1)


def prefix_caching(vllm_config: Any, asked: bool | None) -> Finding:
    """Return whether vLLM caches prefixes at all.

    Args:
        vllm_config: what vLLM has made of its arguments.
        asked: ``enable_prefix_caching`` as the operator gave it; None for vLLM's default.
    """
    key = "enable_prefix_caching"
    if vllm_config.cache_config.enable_prefix_caching:
        return Finding(key, Status.OK, "it is on")
    found = {
        None: "vLLM turns it off for this model by default, and CacheScope stands on it",
        False: "it was turned off, and CacheScope stands on it",
        True: "vLLM cannot cache prefixes of this model here, and CacheScope stands on that",
    }[asked]
    remedy = "a vLLM without the connector" if asked else "--enable-prefix-caching"
    return Finding(key, Status.FAILURE, found, remedy)


def match_unit(vllm_config: Any) -> Iterator[Finding]:
    """Yield what is wrong with vLLM's ``prefix_match_unit``, if anything is.

    Where a model keeps the state of linear attention, vLLM with a unit finer than a block (how long
    that is shows once the model is loaded) also caches the end of a prompt inside a block, under a
    key of its own. No lifetime and no quota would ever reach it.
    """
    cache = vllm_config.cache_config
    # Older releases have no such setting.
    unit = getattr(cache, "prefix_match_unit", None)
    if unit is not None and cache.mamba_cache_mode == "align":
        found = f"with {unit}, parts of this model's blocks would be cached that never expire"
        yield Finding("prefix_match_unit", Status.FAILURE, found, "none for this model")


def _refuse_before_logging() -> None:
    """Have vLLM refuse secrets in its arguments before it logs those arguments."""
    for name, module in list(sys.modules.items()):
        log = vars(module).get("log_non_default_args") if name.startswith("vllm.") else None
        if log is not None and not hasattr(log, "is_refusing"):
            vars(module)["log_non_default_args"] = _refusing_first(log)


def _refusing_first(log: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(log)
    def log_non_default_args(args: Any, *others: Any, **options: Any) -> Any:
        if (own := own_transfer(getattr(args, "kv_transfer_config", None))) is not None:
            refuse_secrets(own.kv_connector_extra_config)
        return log(args, *others, **options)

    log_non_default_args.is_refusing = True  # type: ignore[attr-defined]
    return log_non_default_args


@contextmanager
def ended_by_mistakes() -> Iterator[None]:
    """End the process with nothing but the message on a mistake that only the engine can see, if
    the engine has a process of its own."""
    try:
        yield
    except ConfigError as error:
        if multiprocessing.parent_process() is None:
            raise
        print(error, file=sys.stderr)
        raise SystemExit(os.EX_CONFIG) from None


def _without_traceback(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return an excepthook that prints a `ConfigError` without a traceback: a mistake of the
    operator's is at no place in our code."""

    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ConfigError):
            print(error, file=sys.stderr)
        elif not _was_said_by_an_engine():
            inner(kind, error, trace)

    return excepthook


def _was_said_by_an_engine() -> bool:
    """Whether a process of ours ended in `ended_by_mistakes`."""
    # vLLM's own exception lists how the engine's processes ended, but not those that it has yet
    # to wait for; the objects that stand for them know by now.
    return any(
        issubclass(type(it), BaseProcess) and it.exitcode == os.EX_CONFIG for it in gc.get_objects()
    )
