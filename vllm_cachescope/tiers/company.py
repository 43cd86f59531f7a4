"""Company: whether a request that has loaded its blocks waits a moment for others that still load.

A step of the engine, once begun, keeps out whatever is ready a little later, and a few tokens more
hardly make it longer. Where an engine does nothing but load, the first of several prompts to arrive
would begin a step of its own, and the others would come a step later. It waits no longer than such
a step takes: what it can lose is what the others can gain.
"""


class Company:
    """The requests that wait for company. Times are in seconds on one clock. Not thread-safe."""

    def __init__(self) -> None:
        self._ready_at: dict[str, float] = {}
        self._is_computing = False

    def end_step(self, tokens: int) -> None:
        """Note that a step with so many tokens to compute was scheduled. While there are some the
        steps follow each other anyway, and nobody waits."""
        self._is_computing = tokens > 0

    def may_go(self, request_id: str, now: float, others_load: bool, step_s: float) -> bool:
        """Whether a request whose blocks are there may be scheduled now.

        Args:
            request_id: the request.
            now: the time.
            others_load: whether blocks of others are being loaded.
            step_s: how long a step with few tokens takes; 0 while that is not known.
        """
        if self._is_computing or not others_load:
            return True
        return now - self._ready_at.setdefault(request_id, now) >= step_s

    def end(self, request_id: str) -> None:
        """A request is scheduled, or over."""
        self._ready_at.pop(request_id, None)
