"""A connector with faults of the engine that tests bring about, while files say so."""

import os
from pathlib import Path
from unittest import mock

from tests.engine.clock import DrivenConnector
from vllm_cachescope.connectors.vllm.engine import prompt_plans
from vllm_cachescope.connectors.vllm.engine.miss_explainer import MissExplainer

DIRECTORY = "CACHESCOPE_TEST_FAULTS"
"""Environment variable with the directory in which a file with a fault's name brings it about."""

ANOTHER_SECRET = "another secret"
"""The engine has another secret than the API server."""

FORGETFUL = "forgetful"
"""The engine forgets how blocks were lost: a bug."""


class FaultyConnector(DrivenConnector):
    """The product's connector, with faults."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        directory = Path(os.environ[DIRECTORY])
        unseal, explain = prompt_plans.unseal, MissExplainer.explain

        def unseal_or_not(sealed, secret):
            wrong = b"!" if (directory / ANOTHER_SECRET).exists() else b""
            return unseal(sealed, secret + wrong)

        def explain_or_not(explainer, *arguments):
            if (directory / FORGETFUL).exists():
                return (), None
            return explain(explainer, *arguments)

        mock.patch.object(prompt_plans, "unseal", unseal_or_not).start()
        mock.patch.object(MissExplainer, "explain", explain_or_not).start()
