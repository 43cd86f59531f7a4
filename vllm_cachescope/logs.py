"""CacheScope's loggers, below vLLM's own: an operator's settings for ``vllm`` hold for them too."""

import logging


def logger_of(module: str) -> logging.Logger:
    """Return the logger of one of our modules.

    Args:
        module: the module's ``__name__``. ``vllm_cachescope.tiers.remote`` logs as
            ``vllm.cachescope.tiers.remote``.
    """
    return logging.getLogger("vllm.cachescope" + module.removeprefix("vllm_cachescope"))
