"""The plugin that vLLM loads in each of its processes, since the package is installed."""

from contextlib import suppress

from vllm_cachescope.config import CONNECTOR, make_up_secret


def register() -> None:
    """Make the connector known to vLLM, hook block hashing, and attach the API side.

    Changes nothing for a vLLM that does not name the connector.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from vllm_cachescope.connectors.vllm import config_check
    from vllm_cachescope.connectors.vllm.api_server import attachment
    from vllm_cachescope.connectors.vllm.engine import hashing

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            CONNECTOR, "vllm_cachescope.connectors.vllm.engine.connector", CONNECTOR
        )
    # vLLM loads plugins before it starts processes, so that all of them inherit one secret.
    make_up_secret()
    attachment.install()
    config_check.install(attachment.require)
    # The connector refuses to run without the hook; a vLLM that runs without it is left alone.
    with suppress(hashing.HookNotInForce):
        hashing.install()
