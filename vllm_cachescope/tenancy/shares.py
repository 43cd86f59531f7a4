"""The shares of something bounded: how much of it each account holds, and who holds most."""

import heapq
from collections.abc import Callable

_SLACK = 1024
"""How many outdated entries the heap may have before it is made anew."""


class Shares:
    """How much each account holds of something that all of them share.

    When it runs short, the account that holds most gives way. So an account with no more than an
    equal share loses nothing, whatever the others do. Each operation takes amortised O(log n) of
    n accounts.

    Attributes:
        total: how much all accounts hold.
    """

    def __init__(self) -> None:
        self.total = 0
        self._held: dict[str, int] = {}
        # One entry for each change; an account's entry counts if it says what the account holds.
        self._heap: list[tuple[int, str]] = []

    def held(self, account: str) -> int:
        """Return how much ``account`` holds."""
        return self._held.get(account, 0)

    def add(self, account: str, amount: int) -> None:
        """Note that ``account`` holds ``amount`` more, or less if it is negative."""
        held = self.held(account) + amount
        self.total += amount
        if held:
            self._held[account] = held
            heapq.heappush(self._heap, (-held, account))
        else:
            self._held.pop(account, None)
        if len(self._heap) > 2 * len(self._held) + _SLACK:
            self._heap = [(-held, account) for account, held in self._held.items()]
            heapq.heapify(self._heap)

    def largest(self) -> str:
        """Return the account that holds most.

        Raises:
            IndexError: if none holds anything.
        """
        while self.held(self._heap[0][1]) != -self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][1]


def own_account(org: str) -> str:
    """Return the account of an organisation where each answers for itself."""
    return org


AccountOf = Callable[[str], str]
"""Returns the account of an organisation, by its id."""
