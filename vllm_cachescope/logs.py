"""Our loggers, below vLLM's own: what an operator sets for ``vllm`` holds for them as well."""

import logging


def logger_of(module: str) -> logging.Logger:
    """Return the logger of one of our modules.

    Args:
        module: the module's ``__name__``. ``vllm_cachescope.tiers.remote`` logs as
            ``vllm.cachescope.tiers.remote``.
    """
    return logging.getLogger("vllm.cachescope" + module.removeprefix("vllm_cachescope"))
