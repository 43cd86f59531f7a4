"""The opening of a diagnosis that the reply is to tell of: it may end while the request runs."""

from dataclasses import dataclass

from vllm_cachescope.api.pending_diagnosis import PendingDiagnosis


@dataclass(slots=True)
class Opening:
    """The opening of a diagnosis.

    Attributes:
        pending: the diagnosis; None if it is not open yet, or cannot be opened.
        is_over: whether that is settled.
    """

    pending: PendingDiagnosis | None = None
    is_over: bool = False
