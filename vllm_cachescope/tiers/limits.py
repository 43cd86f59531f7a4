"""The limits of a remote tier: what it may cost the engine."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a remote tier may cost: waiting, memory, connections, probes.

    Attributes:
        load_deadline_s: how long one request may wait for the tier, in seconds.
        load_share: the share of the time that computing a request's blocks would take for which
            the request may wait instead, where that is longer than ``load_deadline_s``, as long
            as the store sends something every ``load_deadline_s``. 0.25, say.
        timeout_s: how long anything that no request waits for may take, in seconds.
        inflight_bytes: bytes queued or under way, in each direction.
        connections: threads that read, each with a connection of its own.
        failures: failures in a row after which the store is left alone.
        first_probe_s: time to the first probe after that, in seconds.
        longest_probe_s: longest time between probes, in seconds.
    """

    load_deadline_s: float
    load_share: float
    timeout_s: float
    inflight_bytes: int
    connections: int
    failures: int
    first_probe_s: float
    longest_probe_s: float
