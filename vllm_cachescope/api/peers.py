"""The API processes of one server, each of which diagnoses the requests that it serves."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Peers:
    """The API processes of a server, as one of them sees them.

    Attributes:
        count: how many there are.
        rank: the number of this one, from 0.
    """

    count: int = 1
    rank: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return who answers, for an answer that only this process can give; nothing if there is
        no other."""
        return {} if self.count == 1 else {"api_process": self.rank, "api_processes": self.count}


ALONE = Peers()
"""The one API process of a server that has no other."""
