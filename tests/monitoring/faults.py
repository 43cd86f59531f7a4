"""A connector with faults of the engine that tests bring about, while files say so."""

import os
from pathlib import Path
from unittest import mock

from tests.engine.clock import DrivenConnector
from vllm_cachescope.cache.eviction_history import EvictionHistory
from vllm_cachescope.connectors.vllm.engine import prompt_plans

DIRECTORY = "CACHESCOPE_TEST_FAULTS"
"""Environment variable with the directory in which a file with a fault's name brings it about."""

ANOTHER_SECRET = "another secret"
"""The engine has another secret than the API server."""

FORGETFUL = "forgetful"
"""The engine forgets how blocks left it: a bug."""


class FaultyConnector(DrivenConnector):
    """The product's connector, with faults."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        directory = Path(os.environ[DIRECTORY])
        unseal, find = prompt_plans.unseal, EvictionHistory.find

        def unseal_or_not(sealed, secret):
            wrong = b"!" if (directory / ANOTHER_SECRET).exists() else b""
            return unseal(sealed, secret + wrong)

        def find_or_not(history, key):
            return None if (directory / FORGETFUL).exists() else find(history, key)

        mock.patch.object(prompt_plans, "unseal", unseal_or_not).start()
        mock.patch.object(EvictionHistory, "find", find_or_not).start()
