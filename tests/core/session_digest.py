"""A digest of a demo conversation, for a process to compare with another one's."""

import json
from hashlib import sha256

from demo.session import AgentSession


def digest(session: AgentSession) -> str:
    return sha256(json.dumps(session.body(session.turns - 1)).encode()).hexdigest()
