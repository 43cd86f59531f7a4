"""The findings of a check: what was looked at, how it is, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from vllm_cachescope.config import ConfigError
from vllm_cachescope.logs import logger_of

logger = logger_of(__name__)


class Status(StrEnum):
    """How something is: it works, it works less well than it could, or it does not work."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at, in a word or two.
        status: how it is.
        found: what was found, in one line.
        remedy: what to do; empty where there is nothing to do.
    """

    subject: str
    status: Status
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        said = f"{self.subject}: {self.found}"
        return f"{said}; allowed: {self.remedy}" if self.remedy else said


def settle(findings: Iterable[Finding]) -> None:
    """Log a line for each warning.

    Raises:
        ConfigError: if there are failures, with all of them in one message.
    """
    failures = []
    for finding in findings:
        if finding.status is Status.FAILURE:
            failures.append(str(finding))
        elif finding.status is Status.WARNING:
            logger.warning("%s", finding)
    if failures:
        raise ConfigError("; ".join(failures))
