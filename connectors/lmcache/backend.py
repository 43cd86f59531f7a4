"""An adapter that all threads of a tier share, made anew whenever it fails."""

import threading
from collections.abc import Callable

from lmcache.v1.distributed.l2_adapters import L2AdapterConfigBase, L2AdapterInterface

from vllm_cachescope.connectors.lmcache.adapters import Entry, Kind, create_l2_adapter, name
from vllm_cachescope.connectors.lmcache.entries import Entries
from vllm_cachescope.connectors.lmcache.handshake import Handshake
from vllm_cachescope.connectors.lmcache.memory import Staging
from vllm_cachescope.connectors.lmcache.session import Call, Session
from vllm_cachescope.connectors.lmcache.upkeep import Upkeep
from vllm_cachescope.logs import logger_of
from vllm_cachescope.tiers.leases import Leases
from vllm_cachescope.tiers.store import StoreFailed, StoreLate

logger = logger_of(__name__)

CLOSE_S = 1.0
"""How long closing may take beyond the timeout, in seconds: the native adapters take half of it."""

STUCK = 4
"""After so many timeouts a task of the adapter's is not expected to end any more."""


class Backend:
    """An adapter, and what else the threads of a tier share. Safe to use from several threads.

    The first thread that connects has the adapter made and the upkeep started; the last one that
    disconnects ends both. Never are there two adapters at once: some own their device.

    Args:
        config: the adapter's.
        staging: memory for the objects on their way.
        timeout_s: how long any one thing may take, in seconds.
        namespace: of this engine's entries.
        secret_digest: tells our secret from others; see `keyspace.secret_digest`.
        leases: grants and reads the leases of entries.
        clock: the tier's clock.
        wall_clock: Unix time in seconds.

    Attributes:
        staging: see above.
        entries: the entries in the store.
        upkeep: records uses, and drops what has expired.
    """

    def __init__(
        self,
        config: L2AdapterConfigBase,
        staging: Staging,
        timeout_s: float,
        namespace: str,
        secret_digest: bytes,
        leases: Leases,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.staging = staging
        self.entries = Entries(
            config, staging, namespace, leases, timeout_s, clock, wall_clock, self.session
        )
        self.upkeep = Upkeep(self.entries, timeout_s, clock, self.session)
        self._handshake = Handshake(staging, namespace, secret_digest, self.entries.now_ms)
        self._canary = name(Entry(namespace, b""), Kind.CANARY)
        self._config = config
        self._timeout_s = timeout_s
        self._clock = clock
        # Held while an adapter is made or closed.
        self._connecting = threading.Lock()
        self._making: Call[L2AdapterInterface] | None = None
        self._session: Session | None = None
        # Of the threads that use the adapter, and of starting and ending the upkeep.
        self._lock = threading.Lock()
        self._users: set[object] = set()

    def alive(self) -> bool:
        """Whether there is an adapter that has not failed."""
        return self._session is not None and self._session.alive

    def session(self) -> Session:
        """Return the session there is.

        Raises:
            StoreFailed: if there is none.
        """
        session = self._session
        if session is None or not session.alive:
            raise StoreFailed("there is no adapter")
        return session

    def connect(self, user: object, deadline: float) -> Session:
        """Have an adapter that works, for one of the threads that share it.

        Args:
            user: stands for the thread; see `disconnect`.
            deadline: until when that is waited for.

        Raises:
            StoreFailed: if there is none to be had.
            StoreUnfit: if the tier must not run on it.
        """
        with self._lock:
            self._users.add(user)
        if not self._connecting.acquire(timeout=max(0.0, deadline - self._clock())):
            raise StoreLate("the adapter is still being made")
        try:
            if not self.alive():
                self._session = self._new_session(deadline)
        finally:
            self._connecting.release()
        with self._lock:
            if self._users:
                self.upkeep.start()
        return self.session()

    def disconnect(self, user: object) -> None:
        """A thread does not use the adapter any more; the last one closes it."""
        with self._lock:
            self._users.discard(user)
            if self._users:
                return
            upkeep = self.upkeep.stop()
        if upkeep is not None:
            upkeep.join(self._timeout_s)
        with self._connecting:
            if self._users:
                return
            patience = self._clock() + self._timeout_s + CLOSE_S
            try:
                if self._making is not None:
                    self._making.result(patience).close()
                    self._making = None
                if self._session is not None:
                    self._session.retire("the engine goes down").result(patience)
                    self._session = None
            except StoreFailed as error:
                logger.warning("LMCache's adapter does not close: %s", error)

    def shake_hands(self, session: Session, deadline: float) -> None:
        """Make sure that the tier may still run on the adapter; see `Handshake.shake`."""
        self._handshake.shake(session, deadline)

    def undo_handshake(self, session: Session, deadline: float) -> None:
        """Leave nothing of ours in the store; see `Handshake.undo`."""
        self._handshake.undo(session, deadline)

    def memory(self) -> dict[str, int]:
        """Return what the adapter says of its memory, in bytes.

        Raises:
            StoreFailed: if there is no adapter.
        """
        usage = self.session().adapter.get_usage()
        return {
            "used_bytes": usage.total_bytes_used,
            "capacity_bytes": usage.total_capacity_bytes,
        }

    def _new_session(self, deadline: float) -> Session:
        if self._session is not None:
            try:
                self._session.retire("").result(deadline)
            except StoreLate:
                raise
            except StoreFailed as error:
                logger.warning("LMCache's adapter did not close well: %s", error)
            self._session = None
        if self._making is None:
            self._making = Call(
                lambda: create_l2_adapter(self._config, self.staging.desc), self._clock
            )
        try:
            adapter = self._making.result(deadline)
        except StoreLate:
            # It may be there the next time.
            raise
        except StoreFailed:
            self._making = None
            raise
        self._making = None
        stuck_s = STUCK * self._timeout_s
        session = Session(adapter, self._canary, self.staging, stuck_s, self._clock)
        try:
            self.shake_hands(session, deadline)
        except Exception as error:
            session.retire(str(error))
            self._session = session
            raise
        return session
