"""What vLLM loads in each of its processes because the package is installed."""

import logging
from contextlib import suppress

from vllm_cachescope.config import CONNECTOR, make_up_secret


def register() -> None:
    """Make the connector known to vLLM and hook block hashing.

    Changes nothing for a vLLM that does not name the connector.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vllm_cachescope.connectors.vllm import config_check
    from vllm_cachescope.connectors.vllm.engine import hashing

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            CONNECTOR, "vllm_cachescope.connectors.vllm.engine.connector", CONNECTOR
        )
    log_as_vllm()
    # vLLM loads plugins before it starts processes, so that all of them inherit one secret.
    make_up_secret()
    config_check.install()
    # The connector refuses to run without the hook; a vLLM that runs without it is left alone.
    with suppress(hashing.HookNotInForce):
        hashing.install()


class _AsVllm(logging.Handler):
    """Logs what vLLM would log, where it does, as it is configured by then."""

    def emit(self, record: logging.LogRecord) -> None:
        """Have vLLM's handlers, and nobody else's, take ``record``."""
        theirs = logging.getLogger("vllm")
        if theirs.isEnabledFor(record.levelno):
            for handler in theirs.handlers:
                if record.levelno >= handler.level:
                    handler.handle(record)


def log_as_vllm() -> None:
    """Have our loggers log as vLLM's does. One that has handlers or a level keeps them."""
    # vLLM gives handlers and a level to its own logger only, after it has loaded us; and the root
    # logger of a server lets nothing below an error pass.
    for name in ("vllm_cachescope", "cachescope.breaks"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(_AsVllm())
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.DEBUG)
