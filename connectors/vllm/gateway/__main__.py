"""The gateway's process: ``python -m … SETTINGS HOST PORT UPSTREAM ENGINE…``, as the command line
starts it."""

import json
import logging
import sys

import uvloop

from vllm_cachescope.config import ConfigError
from vllm_cachescope.connectors.vllm import config_check
from vllm_cachescope.connectors.vllm.gateway.app import known_api_keys, serve


def main(settings: str, host: str, port: str, upstream: str, *engines: str) -> int:
    """Serve until the process is told to end; return 2 on a mistake in the configuration."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s %(message)s")
    try:
        config = config_check.load_checked(json.loads(settings))
        uvloop.run(serve(config, upstream, engines, host, int(port), known_api_keys()))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
