"""What vLLM loads in each of its processes because the package is installed."""

import logging
import os
import secrets
from contextlib import suppress

from vllm_cachescope.config import CONNECTOR, MADE_UP, SECRET_VARIABLE


def register() -> None:
    """Make the connector known to vLLM and hook block hashing.

    Changes nothing for a vLLM that does not name the connector.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vllm_cachescope.connectors.vllm import hashing, startup

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            CONNECTOR, "vllm_cachescope.connectors.vllm.connector", CONNECTOR
        )
    # vLLM gives handlers to its own logger only; without them ours would be silent.
    logger = logging.getLogger("vllm_cachescope")
    if not logger.handlers:
        logger.handlers = logging.getLogger("vllm").handlers
        logger.setLevel(logging.getLogger("vllm").level)
    # vLLM loads plugins before it starts processes, so that all of them inherit one secret.
    os.environ.setdefault(SECRET_VARIABLE, MADE_UP + secrets.token_hex(32))
    startup.install()
    # The connector refuses to run without the hook; a vLLM that runs without it is left alone.
    with suppress(hashing.HookNotInForce):
        hashing.install()
