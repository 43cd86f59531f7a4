"""The versions of vLLM that CacheScope was run on."""

from vllm_cachescope.logs import logger_of

TRIED = ("0.31", "0.32", "0.33")
"""Major and minor versions. `make compat` runs on each; `docs/compatibility.md` says what."""

logger = logger_of(__name__)


def was_tried(version: str) -> bool:
    """Whether somebody has run CacheScope on this vLLM, by its major and minor version.

    Args:
        version: vLLM's version, such as ``"0.32.0+cpu"``.
    """
    return ".".join(version.split(".")[:2]) in TRIED


def warn_if_untried(version: str) -> None:
    """Log a warning if nobody has run CacheScope on this vLLM.

    Args:
        version: vLLM's version, such as ``"0.32.0+cpu"``.
    """
    if not was_tried(version):
        logger.warning(
            "CacheScope was never run on vLLM %s, but on %s. A hook that is missing is said at "
            "start-up; watch cachescope_prompt_tokens_total all the same",
            version,
            ", ".join(TRIED),
        )
