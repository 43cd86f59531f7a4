"""A body as it was sent, to be corrected in place."""

import json
from dataclasses import dataclass

from vllm_cachescope.cli.traffic.envelope import Envelope
from vllm_cachescope.repair.editable_body import EditableBody


@dataclass(slots=True)
class SentBody(EditableBody):
    """A recorded request body that may be changed.

    Attributes:
        source: file and line.
        envelope: what else is known of the request.
    """

    source: str
    envelope: Envelope

    @property
    def conversation(self) -> tuple[str | None, str]:
        """What is equal for all requests of a conversation, as far as the request says."""
        session = self.envelope.session or self.body.get("session_id")
        if not isinstance(session, str):
            session = json.dumps(self.body.get("metadata"), sort_keys=True, default=str)
        return session, str(self.body.get("model") or self.body.get("modelId"))
