"""The clock of a Redis server, as reckoned by ours."""

CLOCK_S = 20.0
"""How long the server's time is reckoned by our clock after it was asked, in seconds."""


class ServerClock:
    """The server's clock as reckoned by ours. A tier's threads share one: with a reckoning
    each, the times that two threads write would not be in order.

    Attributes:
        ahead_s: how far the server's clock is ahead of ours, in seconds; None until the server was
            asked.
    """

    def __init__(self) -> None:
        self.ahead_s: float | None = None
        self._asked_at = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether the server should be asked for its time.

        Args:
            now: our time, in seconds.
        """
        return now >= self._asked_at + CLOCK_S

    def learn(self, server_s: float, asked: float, answered: float) -> None:
        """Take the server's answer.

        The server read its clock between ``asked`` and ``answered``. A reckoning that agrees with
        that stays as it is, so that times written before stay in order with later ones; any other
        gives way to the middle of the two.

        Args:
            server_s: the server's time, in seconds.
            asked, answered: our times before the question and after the answer, in seconds.
        """
        self._asked_at = answered
        least, most = server_s - answered, server_s - asked
        if self.ahead_s is None or not least <= self.ahead_s <= most:
            self.ahead_s = (least + most) / 2
